"""Places are the same by their names, and files are written whole."""

from pathlib import Path

import fsspec
import pytest

from dtbert.jobs.places import Place


def test_a_name_leads_to_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    local = {name: str(tmp_path / name) for name in ("a/b", "a::b", "~nobody of this name/b", "a#b?c")}
    for name, expected in {**local, "memory://a/b": "memory:///a/b"}.items():
        place = Place.of(name)
        assert place.name == expected
        assert Place.of(place.name) == place
        assert (place / "c").name == f"{expected}/c"
    assert Place.of(f"file://{tmp_path}").name == str(tmp_path)


@pytest.mark.parametrize("name", ["nothing://a/b", "s4://bucket"])
def test_an_unknown_kind_of_place_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: "):
        Place.of(name)


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_file_is_replaced_whole_and_nothing_is_left_beside_it(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place.of(str(tmp_path / "file") if kind == "local" else "memory://places/file")
    for content in (b"first", b"second and longer", b""):
        place.write(content)
        assert place.fs.cat_file(place.path) == content
        assert len(place.fs.find(place.path.rpartition("/")[0])) == 1

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    # Until the last step what was there is there.
    place.write(b"before")
    monkeypatch.setattr(
        *((Path, "replace") if kind == "local" else (fsspec.get_filesystem_class("memory"), "mv")), killed
    )
    with pytest.raises(KeyboardInterrupt):
        place.write(b"after")
    assert place.fs.cat_file(place.path) == b"before"
