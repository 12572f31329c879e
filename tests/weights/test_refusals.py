"""A hub that refuses, and a cache that is full or cannot be written."""

import logging
import re
from pathlib import Path

import pytest
from huggingface_hub import constants
from torch import Tensor

from dtbert.weights import load_model, resolve_source, to_hub_tensors
from tests.weights.checkpoints import assert_same
from tests.weights.conftest import Connect
from tests.weights.hub_server import Hub

REFUSALS = {
    "gated": (403, "GatedRepo"),
    "gated-401": (401, "GatedRepo"),
    "token": (401, ""),
    "forbidden": (403, ""),
    "gone": (404, "RepoNotFound"),
    "revision": (404, "RevisionNotFound"),
}


@pytest.mark.parametrize("refuse", REFUSALS.values(), ids=REFUSALS)
@pytest.mark.parametrize("pinned", [True, False], ids=["commit", "main"])
def test_model_in_the_cache_is_used_when_the_hub_refuses_and_that_is_said(
    connect: Connect,
    files: dict[str, bytes],
    tensors: dict[str, Tensor],
    caplog: pytest.LogCaptureFixture,
    refuse: tuple[int, str],
    pinned: bool,
) -> None:
    hub = connect(Hub("org/name", {"main": files}))
    load_model("org/name")
    hub.refuse = refuse
    with caplog.at_level(logging.WARNING, "dtbert"):
        model = load_model("org/name", revision=hub.commit("main") if pinned else None)
    assert_same(to_hub_tensors(model), tensors)
    (said,) = (record.getMessage() for record in caplog.records)
    assert re.fullmatch(rf"the hub refuses \([^\n]*{refuse[0]}[^\n]*\): using the copy of org/name in its cache", said)


@pytest.mark.parametrize("refuse", REFUSALS.values(), ids=REFUSALS)
def test_refusal_is_an_error_where_the_cache_has_no_weights(
    connect: Connect, files: dict[str, bytes], refuse: tuple[int, str]
) -> None:
    hub = connect(Hub("org/name", {"main": {"config.json": files["config.json"]}}))
    with pytest.raises(FileNotFoundError, match="no weights"):
        resolve_source("org/name")
    hub.refuse = refuse
    with pytest.raises(OSError, match=r"hf auth login|no revision None"):
        resolve_source("org/name")


def test_revision_that_lost_its_config_is_an_error_whatever_is_cached(
    connect: Connect, files: dict[str, bytes]
) -> None:
    hub = connect(Hub("org/name", {"main": files}))
    resolve_source("org/name")
    hub.revisions["main"] = {}
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        resolve_source("org/name")


def test_cache_that_cannot_be_written_is_named_with_the_variable_that_moves_it(
    connect: Connect, files: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(Hub("org/name", {"main": files}))
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(OSError, match=rf"cannot write config\.json .* {tmp_path}/file/cache: .* set HF_HOME") as caught:
        resolve_source("org/name")
    assert "load it again" not in str(caught.value)
