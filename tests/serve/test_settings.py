"""Limits and keys."""

from pathlib import Path
from typing import Any

import pytest

from dtbert.serve.settings import Settings, read_api_keys

KEYS = ["an-old-key-of-somebody", "K3y_of_another_one-0123456789"]


def test_keys_are_read_by_line_and_known_whole(tmp_path: Path) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(f"# ours\n{KEYS[0]}\n\n  {KEYS[1]}  \r\n", "utf-8")
    settings = Settings(api_keys=read_api_keys(path))
    assert all(settings.knows(key) for key in KEYS)
    for other in ("", KEYS[0][:-1], KEYS[0] + " ", KEYS[0].upper(), "# ours", KEYS[0] + KEYS[1], "\ud800" * 20):
        assert not settings.knows(other), other
    assert not any(key in repr(settings) for key in KEYS)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("# none\n", "there is no key in it"),
        (f"{KEYS[0]}\nshort\n", "key 2 must have at least 16"),
        (f"{KEYS[0]} {KEYS[1]}\n", "key 1 .* without spaces"),
        ("schlüssel-der-lang-genug-ist\n", "key 1 .* ASCII"),
    ],
)
def test_a_file_without_usable_keys_is_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "keys.txt"
    path.write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message) as refused:
        read_api_keys(path)
    assert str(path) in str(refused.value)
    assert not any(key in str(refused.value) for key in KEYS)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_queue": 0}, "max_queue must be at least 1, not 0"),
        ({"max_wait": 11}, "max_wait must be from 0 to 10 seconds, not 11"),
        ({"deadline": 0}, "deadline must be above 0"),
        ({"shed": (0.5, 0.7)}, "shed must fall from one budget to the next, not 0.5, 0.7"),
    ],
)
def test_limits_that_make_no_sense_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
