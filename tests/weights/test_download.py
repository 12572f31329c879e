"""A hub that is hostile or broken: nothing outside the cache is written, and nothing waits without end."""

import re
import time
from pathlib import Path

import pytest

from dtbert.weights import download, resolve_source
from tests.weights.conftest import Connect
from tests.weights.hub_server import Hub

PLACES = ["../../../planted", "{tmp}/planted", "..", ".", "", "a/b", "a\\b", "a" * 300, "x\x1b[2J", "~"]


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("etag", PLACES)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "vocab.txt"])
def test_etag_that_names_a_place_is_refused(
    connect: Connect, files: dict[str, bytes], tmp_path: Path, name: str, etag: str
) -> None:
    lie = {"ETag": etag.format(tmp=tmp_path)}
    hub = connect(Hub("org/name", {"main": {**files, "vocab.txt": b"[UNK]"}}, lies={("HEAD", name): lie}))
    before = everything(tmp_path)
    with pytest.raises(OSError, match="as the ETag of"):
        resolve_source("org/name")
    assert name not in hub.asked("GET")
    assert {path for path in everything(tmp_path) - before if not path.startswith("cache/models--org--name")} <= {
        "cache"
    }


@pytest.mark.parametrize("commit", [*PLACES, "main", "A" * 40, "a" * 39])
def test_commit_that_is_none_is_refused(connect: Connect, files: dict[str, bytes], tmp_path: Path, commit: str) -> None:
    lie = {"X-Repo-Commit": commit.format(tmp=tmp_path)}
    connect(Hub("org/name", {"main": files}, lies={("HEAD", "config.json"): lie}))
    before = everything(tmp_path)
    with pytest.raises(OSError, match=r"as the commit of config\.json"):
        resolve_source("org/name")
    assert everything(tmp_path) == before


def test_other_commit_than_was_asked_for_is_refused(connect: Connect, files: dict[str, bytes]) -> None:
    lie = {"X-Repo-Commit": "b" * 40}
    hub = connect(Hub("org/name", {"main": files}, lies={("HEAD", "model.safetensors"): lie}))
    with pytest.raises(OSError, match=r"as the commit of model\.safetensors"):
        resolve_source("org/name")
    hub.lies = {("HEAD", "config.json"): lie}
    with pytest.raises(OSError, match=r"as the commit of config\.json"):
        resolve_source("org/name", hub.commit("main"))


@pytest.mark.parametrize(
    "revision",
    ["../../../../planted", "/planted", "a//b", "a/../b", "a/./b", ".git", "-x", "a\\b", "a b", "a:b", "a\n", "", "a/"],
)
def test_revision_that_is_a_path_elsewhere_is_refused_without_a_request(
    connect: Connect, files: dict[str, bytes], tmp_path: Path, revision: str
) -> None:
    hub = connect(Hub("org/name", {"main": files, revision: files}))
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=re.escape(f"revision {revision!r} is no name of a branch, tag or commit")):
        resolve_source("org/name", revision)
    assert (hub.requests, everything(tmp_path)) == ([], before)


@pytest.mark.parametrize("revision", ["main", "refs/pr/2", "v1.0", "feature_x/y-z", "größer"])
def test_revision_as_git_allows_it_is_asked_for(connect: Connect, files: dict[str, bytes], revision: str) -> None:
    connect(Hub("org/name", {revision: files}))
    assert (resolve_source("org/name", revision) / "config.json").read_bytes() == files["config.json"]


def test_hub_that_is_busy_is_not_waited_for(connect: Connect, files: dict[str, bytes]) -> None:
    connect(Hub("org/name", {"main": files}, busy={"Retry-After": "3600"}))
    began = time.monotonic()
    with pytest.raises(OSError, match="asks to wait 3600 seconds"):
        resolve_source("org/name")
    assert time.monotonic() - began < 5


def test_download_that_drips_is_given_up(
    connect: Connect, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_PATIENCE", 0.2)
    hub = connect(Hub("org/name", {"main": files}))
    hub.drip = 0.01
    with pytest.raises(OSError, match=r"only \d+ bytes of config\.json came in"):
        resolve_source("org/name")
    assert not [path for path in everything(tmp_path) if "incomplete" in path]


@pytest.mark.parametrize(("method", "said"), [("HEAD", "cannot reach .*"), ("GET", r"config\.json .* broke off: ")])
def test_answer_that_does_not_come_is_not_waited_for(
    connect: Connect, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, method: str, said: str
) -> None:
    monkeypatch.setattr(download, "_PATIENCE", 0.2)
    connect(Hub("org/name", {"main": files}, stall={method: 0.6}))
    with pytest.raises(OSError, match=rf"{said}no answer in 0\.2 seconds"):
        resolve_source("org/name")


def test_body_that_would_have_to_be_unpacked_is_refused(connect: Connect, files: dict[str, bytes]) -> None:
    lie = {"Content-Encoding": "gzip"}
    connect(Hub("org/name", {"main": files}, lies={("GET", "model.safetensors"): lie}))
    with pytest.raises(OSError, match=r"sends model\.safetensors compressed"):
        resolve_source("org/name")


def test_body_longer_than_announced_is_refused(connect: Connect, files: dict[str, bytes], tmp_path: Path) -> None:
    connect(Hub("org/name", {"main": files}, lies={("HEAD", "model.safetensors"): {"Content-Length": "100"}}))
    with pytest.raises(OSError, match=r"more than the 100 bytes of model\.safetensors"):
        resolve_source("org/name")
    assert not list(tmp_path.rglob("cache/**/model.safetensors"))


def test_text_of_a_size_that_no_text_has_is_refused(connect: Connect, files: dict[str, bytes]) -> None:
    lie = {"Content-Length": str(2**40)}
    hub = connect(Hub("org/name", {"main": files}, lies={("HEAD", "config.json"): lie}))
    with pytest.raises(OSError, match=r"config\.json on the hub has 1,099,511,627,776 bytes"):
        resolve_source("org/name")
    assert hub.asked("GET") == []


def test_body_of_unknown_length_is_bounded(
    connect: Connect, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "_MOST_BYTES", 1000)
    lie = {"X-Linked-Size": "unknown"}
    connect(Hub("org/name", {"main": files}, lies={("HEAD", "model.safetensors"): lie}))
    with pytest.raises(OSError, match="more than the 1,000 bytes"):
        resolve_source("org/name")
