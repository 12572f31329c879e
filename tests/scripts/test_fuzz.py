"""The campaign of absurd files, texts and schedules: a short round of it, and that it finds what is wrong."""

import json
import random

import pytest

from scripts import fuzz


@pytest.mark.parametrize("kind", fuzz.KINDS)
def test_short_round_finds_nothing(kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = fuzz.main(["--only", kind, "--rounds", "150"])
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    assert json.loads(out) == {"kinds": [kind], "seed": 0, "cases": 150, "failed": 0}


def test_case_is_made_again_from_its_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def odd(choose: random.Random, _: fuzz.Room) -> None:
        drawn.append(choose.random())
        if len(drawn) == 3:
            raise KeyError("no such tensor")
        if len(drawn) == 2:
            raise ValueError("a documented error")

    monkeypatch.setitem(fuzz.KINDS, "files", odd)
    assert fuzz.main(["--only", "files", "--rounds", "4", "--seed", "9"]) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["failed"] == 1
    assert err.startswith("--only files --seed 9 --case 2\n")
    assert "KeyError: 'no such tensor'" in err
    assert len(set(drawn)) == 4
    fuzz.main(["--only", "files", "--seed", "9", "--case", "2"])
    assert drawn[4] == drawn[2]


def test_case_that_hangs_or_is_no_exception_is_a_failure(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(_: random.Random, __: fuzz.Room) -> None:
        while True:
            pass

    monkeypatch.setattr(fuzz, "PATIENCE", 1)
    monkeypatch.setitem(fuzz.KINDS, "texts", hang)
    assert fuzz.main(["--only", "texts", "--rounds", "1"]) == 1
    assert "it took longer than 1 seconds" in capsys.readouterr().err
