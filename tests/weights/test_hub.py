"""Loading from the hub, against a real HTTP server on loopback; nothing here needs a network."""

import logging
import os
import pickle
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from torch import Tensor

import dtbert.weights.hub
from dtbert.weights import load_model, resolve_source, to_hub_tensors
from dtbert.weights.download import Remote
from tests.weights.checkpoints import assert_same, make_tensors, write
from tests.weights.conftest import Connect, files_of, point_to
from tests.weights.hub_server import Hub, serve


def closed_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return server.getsockname()[1]


def test_hub_id_downloads_what_is_needed_and_nothing_else(
    connect: Connect, files: dict[str, bytes], tensors: dict[str, Tensor]
) -> None:
    measured = {"schedules.json", "cascade.json", "no_answer.json"}
    needed = {"tokenizer.json", "vocab.txt", "tokenizer_config.json", *measured}
    unneeded = {"training_args.bin", "pytorch_model.bin", "model.int8.safetensors", "README.md", "tf_model.h5"}
    others = {name: f"this is {name}".encode() for name in needed | unneeded}
    hub = connect(Hub("org/name", {"main": files | others}))
    folder = resolve_source("org/name")
    assert sorted(hub.asked("GET")) == sorted(needed | {"config.json", "model.safetensors"})
    assert not unneeded & set(hub.asked("HEAD"))
    assert {path.name for path in folder.iterdir()} == needed | {"config.json", "model.safetensors"}
    assert_same(to_hub_tensors(load_model("org/name")), tensors)


def test_second_load_asks_once_and_downloads_nothing(connect: Connect, files: dict[str, bytes]) -> None:
    hub = connect(Hub("name", {"main": files}))
    first = resolve_source("name")
    hub.requests.clear()
    assert resolve_source("name") == first
    assert set(hub.requests) == {("HEAD", "config.json", None)}


def test_revision_is_the_one_asked_for(connect: Connect, tmp_path: Path, files: dict[str, bytes]) -> None:
    tensors = make_tensors()
    other = files_of(write(tmp_path / "other", tensors))
    hub = connect(Hub("org/name", {"main": files, "refs/pr/2": other}))
    assert_same(to_hub_tensors(load_model("org/name", revision="refs/pr/2")), tensors)
    assert_same(to_hub_tensors(load_model("org/name", revision=hub.commit("refs/pr/2"))), tensors)
    assert resolve_source("org/name") != resolve_source("org/name", "refs/pr/2")


@pytest.mark.parametrize("form", ["model.int8.safetensors", "pytorch_model.bin"])
def test_fallback_is_used_and_said(
    connect: Connect, tmp_path: Path, tensors: dict[str, Tensor], form: str, caplog: pytest.LogCaptureFixture
) -> None:
    files = files_of(write(tmp_path / "published", tensors, form))
    arguments = {"training_args.bin": pickle.dumps("arguments")}
    hub = connect(Hub("org/name", {"main": files | arguments}))
    with caplog.at_level(logging.WARNING, "dtbert"):
        assert_same(to_hub_tensors(load_model("org/name")), tensors)
    assert caplog.records[0].getMessage() == f"org/name has no model.safetensors at this revision: using {form}"
    assert "training_args.bin" not in hub.asked("HEAD") + hub.asked("GET")
    # What is not there is remembered: the second time asks for the config alone.
    hub.requests.clear()
    resolve_source("org/name")
    assert set(hub.asked("HEAD")) == {"config.json"}


def test_files_come_from_one_commit_when_the_branch_moves(
    connect: Connect, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = connect(Hub("org/name", {"main": files, "later": {**files, "model.safetensors": b"of another commit"}}))
    ask = dtbert.weights.hub.ask

    def ask_then_move(repo_id: str, name: str, revision: str | None) -> Remote:
        found = ask(repo_id, name, revision)
        if revision is None:
            old = hub.commit("main")
            hub.revisions[old] = hub.revisions.pop("main")
            hub.revisions["main"] = hub.revisions.pop("later")
            monkeypatch.setattr(Hub, "commit", lambda self, name: name if name == old else "f" * 40)
        return found

    monkeypatch.setattr(dtbert.weights.hub, "ask", ask_then_move)
    assert (resolve_source("org/name") / "model.safetensors").read_bytes() == files["model.safetensors"]


def test_download_cut_in_the_middle_is_resumed(
    connect: Connect, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    content = torch.randint(0, 256, (16 * 2**20,), dtype=torch.uint8).numpy().tobytes()
    cuts = {"model.safetensors": [12 * 2**20, 2**20 * 13], "config.json": [10]}
    hub = connect(Hub("org/name", {"main": {**files, "model.safetensors": content}}, cuts))
    folder = resolve_source("org/name")
    assert (folder / "model.safetensors").read_bytes() == content
    assert (folder / "config.json").read_bytes() == files["config.json"]
    ranges = [header for how, name, header in hub.requests if (how, name) == ("GET", "model.safetensors")]
    assert ranges == [None, f"bytes={12 * 2**20}-", f"bytes={13 * 2**20}-"]


def test_download_that_keeps_breaking_is_an_error_and_the_next_try_is_clean(
    connect: Connect, files: dict[str, bytes], tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    hub = connect(Hub("org/name", {"main": files}, {"model.safetensors": [1000] * 50}))
    with pytest.raises(OSError, match=r"model\.safetensors of 'org/name' broke off: .* load it again"):
        load_model("org/name")
    hub.cuts.clear()
    assert_same(to_hub_tensors(load_model("org/name")), tensors)


def test_offline_mode_reads_the_cache_and_asks_nobody(
    connect: Connect, files: dict[str, bytes], tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = connect(Hub("org/name", {"main": files, "refs/pr/2": files}))
    online = resolve_source("org/name")
    hub.requests.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert resolve_source("org/name") == online
    assert_same(to_hub_tensors(load_model("org/name")), tensors)
    for repo, revision in (("org/other", None), ("org/name", "refs/pr/2")):
        with pytest.raises(OSError, match=f"cannot reach {hub.endpoint} for '{repo}'"):
            resolve_source(repo, revision)
    assert hub.requests == []


def test_offline_cache_with_the_pickle_alone_is_enough(
    connect: Connect, tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = connect(Hub("org/name", {"main": files_of(write(tmp_path / "bin", tensors, "pytorch_model.bin"))}))
    for name in ("config.json", "pytorch_model.bin"):  # as somebody who knew what to fetch
        huggingface_hub.hf_hub_download("org/name", name, endpoint=hub.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_same(to_hub_tensors(load_model("org/name")), tensors)


def test_no_network_is_an_error_that_names_the_ways_to_get_weights(
    connect: Connect, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    connect(Hub("org/name", {"main": files}))
    point_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    began = time.monotonic()
    with pytest.raises(OSError, match="cannot reach http://127") as caught:
        load_model("org/name")
    assert time.monotonic() - began < 5, "no retries for half a minute"
    for way in ("the model inside the package", "local folder", "hf download org/name", "HF_HOME", "HF_HUB_OFFLINE=1"):
        assert way in str(caught.value)


def test_path_that_was_perhaps_meant_is_named(
    connect: Connect, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    connect(Hub("org/name", {"main": files}))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with pytest.raises(FileNotFoundError, match=r"the folder run is here, without best"):
        load_model("run/best")


def test_no_network_but_a_cache_uses_it_and_says_so(
    connect: Connect,
    files: dict[str, bytes],
    tensors: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    connect(Hub("org/name", {"main": files}))
    resolve_source("org/name")
    point_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    with caplog.at_level(logging.WARNING, "dtbert"):
        assert_same(to_hub_tensors(load_model("org/name")), tensors)
    assert [record.getMessage().partition(" (")[0] for record in caplog.records] == ["cannot reach the hub"]


def test_no_network_with_half_a_cache_is_an_error(
    connect: Connect, files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = connect(Hub("org/name", {"main": files}))
    huggingface_hub.hf_hub_download("org/name", "config.json", endpoint=hub.endpoint)
    point_to(f"http://127.0.0.1:{closed_port()}", monkeypatch)
    with pytest.raises(OSError, match="hf download org/name"):
        load_model("org/name")


def test_hub_without_the_model_revision_or_files_is_an_error(connect: Connect, files: dict[str, bytes]) -> None:
    hub = connect(Hub("org/name", {"main": files, "bare": {"config.json": b"{}"}, "empty": {}}))
    with pytest.raises(FileNotFoundError, match=r"no model 'org/nobody' on the hub.*no such file"):
        resolve_source("org/nobody")
    with pytest.raises(FileNotFoundError, match=r"'org/name' .* no revision 'v9'"):
        resolve_source("org/name", "v9")
    with pytest.raises(FileNotFoundError, match=r"'org/name' .* no weights: .* model\.safetensors"):
        resolve_source("org/name", "bare")
    with pytest.raises(FileNotFoundError, match=r"'org/name' .* no config\.json"):
        resolve_source("org/name", "empty")
    hub.refuse = (403, "GatedRepo")
    with pytest.raises(OSError, match="accept its terms"):
        resolve_source("org/name")
    hub.refuse = (500, "Broken")
    with pytest.raises(OSError, match="cannot reach http://127"):
        resolve_source("org/another")


@pytest.mark.parametrize("name", ["a--b/c", "a..b", "-a", "a" * 97])
def test_malformed_hub_id_is_an_error_without_a_request(connect: Connect, name: str) -> None:
    hub = connect(Hub("org/name", {}))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(repr(name))):
        resolve_source(name)
    assert hub.requests == []


def test_environment_variables_of_the_hub_are_obeyed(tmp_path: Path, files: dict[str, bytes]) -> None:
    code = "from dtbert.weights import resolve_source; print(resolve_source('org/name'))"

    def resolve(**variables: str) -> subprocess.CompletedProcess[str]:
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        environment |= {"HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1", **variables}
        return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)

    with serve(Hub("org/name", {"main": files})) as hub:
        online = resolve(HF_ENDPOINT=hub.endpoint).stdout.strip()
    assert Path(online).is_relative_to(tmp_path / "home")
    assert files_of(Path(online)) == files
    assert resolve(HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="1").stdout.strip() == online
