"""Checkpoints in several files, which an index lists."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dtbert.weights import CheckpointError, convert, load_encoder, load_model, resolve_source, weights_sha256
from tests.weights.checkpoints import CONFIG, assert_same, hub_tensors, make_tensors, write
from tests.weights.conftest import Connect, files_of
from tests.weights.hub_server import Hub

ENDINGS = {"safetensors": "model", "bin": "pytorch_model"}


def write_shards(folder: Path, tensors: Mapping[str, Tensor], ending: str, count: int = 3) -> Path:
    """The tensors dealt out to several files, and the index that lists them."""
    write(folder, tensors)
    (folder / "model.safetensors").unlink()
    stem = ENDINGS[ending]
    files = {}
    for place in range(count):
        name = f"{stem}-{place + 1:05}-of-{count:05}.{ending}"
        part = {key: tensors[key] for key in sorted(tensors)[place::count]}
        if ending == "bin":
            torch.save(part, folder / name)
        else:
            save_file(part, folder / name, {"format": "pt"})
        files |= dict.fromkeys(part, name)
    write_index(folder, ending, files)
    return folder


def write_index(folder: Path, ending: str, files: object) -> None:
    content = {"metadata": {"total_size": 1}, "weight_map": files}
    (folder / f"{ENDINGS[ending]}.{ending}.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("ending", ENDINGS)
def test_shards_are_the_tensors_of_one_file(tmp_path: Path, ending: str, caplog: pytest.LogCaptureFixture) -> None:
    tensors = make_tensors(pooler=True)
    folder = write_shards(tmp_path / "shards", tensors, ending)
    with caplog.at_level(logging.WARNING, "dtbert"):
        own = {name: tensor for name, tensor in tensors.items() if "pooler" not in name}
        assert_same(hub_tensors(load_model(folder)), own)
    assert [record.getMessage().partition(": ")[2][:18] for record in caplog.records] == (
        ["read from a pickle"] if ending == "bin" else []
    )
    assert_same(hub_tensors(load_model(next(folder.glob("*.index.json")))), own)
    bare = {name: tensor for name, tensor in tensors.items() if "qa_outputs" not in name}
    assert_same(hub_tensors(load_encoder(folder)), bare)
    assert_same(hub_tensors(load_model(convert(folder, tmp_path / "one"))), own)
    assert (tmp_path / "one" / "model.safetensors").is_file()


def test_shards_of_transformers_are_read(tmp_path: Path) -> None:
    import transformers

    theirs = transformers.BertForQuestionAnswering(transformers.BertConfig(**CONFIG))
    theirs.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 1
    assert_same(hub_tensors(load_model(tmp_path)), theirs.state_dict())


@pytest.mark.parametrize("ending", ENDINGS)
def test_digest_is_of_all_shards(tmp_path: Path, ending: str) -> None:
    tensors = make_tensors()
    first = weights_sha256(write_shards(tmp_path / "first", tensors, ending))
    assert weights_sha256(write_shards(tmp_path / "same", tensors, ending)) == first
    tensors["qa_outputs.bias"] += 1
    assert weights_sha256(write_shards(tmp_path / "other", tensors, ending)) != first


@pytest.mark.parametrize("ending", ENDINGS)
def test_shard_that_is_missing_or_lacks_a_tensor_is_named(tmp_path: Path, ending: str) -> None:
    folder = write_shards(tmp_path, make_tensors(), ending)
    first, second, third = (f"{ENDINGS[ending]}-0000{place}-of-00003.{ending}" for place in (1, 2, 3))
    (folder / third).rename(folder / "aside")
    with pytest.raises(FileNotFoundError, match=f"lists {third}, which is not beside it"):
        load_model(folder)
    (folder / "aside").rename(folder / third)
    names = json.loads(next(folder.glob("*.index.json")).read_text())["weight_map"]
    moved = min(name for name, file in names.items() if file == first)
    write_index(folder, ending, {**names, moved: second, "a.stranger": first})
    with pytest.raises(
        CheckpointError, match=rf"not in the files it names:\n  a\.stranger: {first}\n  {moved}: {second}"
    ):
        load_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "not JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
        ("{}", "weight_map: missing"),
        ('{"weight_map": {}}', "weight_map is empty"),
        ('{"weight_map": {"a": 3}}', r"weight_map\.a: expected a text, found 3"),
        ('{"weight_map": {"a": "../model.safetensors"}}', r"names '\.\./model\.safetensors'"),
        ('{"weight_map": {"a": "/etc/passwd"}}', "names '/etc/passwd'"),
        ('{"weight_map": {"a": "training_args.bin"}}', r"names 'training_args\.bin': expected names of \.safetensors"),
    ],
)
def test_index_that_is_none_is_an_error_that_names_it(tmp_path: Path, content: str, message: str) -> None:
    folder = write(tmp_path, make_tensors())
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors\.index\.json .*{message}"):
        load_model(folder)


@pytest.mark.parametrize("ending", ENDINGS)
def test_shards_of_the_hub_are_fetched_by_their_index_alone(
    connect: Connect, tmp_path: Path, tensors: dict[str, Tensor], ending: str
) -> None:
    files = files_of(write_shards(tmp_path / "published", tensors, ending))
    hub = connect(Hub("org/name", {"main": files | {f"other.{ending}": b"", "training_args.bin": b""}}))
    assert_same(hub_tensors(load_model("org/name")), tensors)
    assert set(hub.asked("GET")) == files.keys()
    hub.requests.clear()
    hub.refuse = (401, "GatedRepo")
    assert_same(hub_tensors(load_model("org/name")), tensors)


def test_shard_that_the_hub_lacks_or_that_is_a_path_is_an_error(
    connect: Connect, tmp_path: Path, tensors: dict[str, Tensor]
) -> None:
    folder = write_shards(tmp_path / "published", tensors, "safetensors")
    files = files_of(folder)
    del files["model-00002-of-00003.safetensors"]
    write_index(folder, "safetensors", {"a": "../../../refs/main.safetensors"})
    evil = {**files, "model.safetensors.index.json": (folder / "model.safetensors.index.json").read_bytes()}
    hub = connect(Hub("org/name", {"main": files, "evil": evil}))
    with pytest.raises(FileNotFoundError, match=r"no model-00002-of-00003\.safetensors, which its model\.safe"):
        resolve_source("org/name")
    hub.requests.clear()
    with pytest.raises(CheckpointError, match=r"names '\.\./\.\./\.\./refs/main\.safetensors'"):
        resolve_source("org/name", "evil")
    assert not any("refs" in name for _, name, _ in hub.requests)
