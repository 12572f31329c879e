"""Files that lie about under the name of another kind."""

import io
import re
import zipfile
from pathlib import Path

import pytest

from dtbert.weights import CheckpointError, load_model
from tests.weights.checkpoints import make_tensors, write


def zipped(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, "content")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>Not found</html>", "a web page"),
        (b"<HTML><head>", "a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "a server's message"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file, a model of TensorFlow's"),
        (b"\x1c\0\0\0TFL3\x14\0\x20\0", "a model of TensorFlow's"),
        (b"\x08\x01\x12\xd3\x91\x02\x0a\x0a", "a model of TensorFlow's"),
        (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0\x3a", "an ONNX model"),
        (b"GGUF\x03\0\0\0", "a GGUF file"),
        (b"\x1f\x8b\x08\0", "a gzip file"),
        (zipped("config.json", "model.weights.h5"), "a zip archive"),
        (b'{"error": "Repository not found"}', "JSON"),
        (b"Invalid username or password.", "a text, which begins 'Invalid username or password.'"),
        (b"", "empty"),
    ],
)
@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "config.json"])
def test_file_of_another_kind_is_named(tmp_path: Path, name: str, content: bytes, named: str) -> None:
    folder = write(tmp_path, make_tensors())
    if name.endswith(".bin"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(content)
    plain = name == "config.json" and named.startswith(("JSON", "a text"))
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*: {'' if plain else f'it is {named}'}"):
        load_model(folder)


def test_pickle_and_safetensors_under_each_others_names_are_told_how_to_be_named(tmp_path: Path) -> None:
    safe = write(tmp_path / "safe", make_tensors())
    (safe / "model.safetensors").rename(safe / "pytorch_model.bin")
    pickled = write(tmp_path / "pickled", make_tensors(), "pytorch_model.bin")
    (pickled / "pytorch_model.bin").rename(pickled / "model.safetensors")
    for folder, ending in ((safe, "safetensors"), (pickled, "bin")):
        with pytest.raises(CheckpointError, match=rf"give it a name that ends in \.{ending}"):
            load_model(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_damaged_file_is_not_taken_for_another_kind(tmp_path: Path, name: str) -> None:
    folder = write(tmp_path, make_tensors(), name)
    (folder / name).write_bytes((folder / name).read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="is not a whole") as caught:
        load_model(folder)
    assert "it is" not in str(caught.value)
