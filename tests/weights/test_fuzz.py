"""Damaged files: whatever the bytes, a clear error or a model of the right shapes; no crash, no hang, nothing else."""

import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from dtbert.weights import CheckpointError, load_model
from dtbert.weights.quantize import is_quantizable, quantize_rows
from tests.weights.checkpoints import CONFIG, hub_tensors, make_tensors

SMALL = {
    **CONFIG,
    "vocab_size": 9,
    "hidden_size": 4,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 8,
}
# torch comments on the odd protocol numbers that damage makes.
pytestmark = pytest.mark.filterwarnings("ignore:Detected pickle protocol:UserWarning")

torch.manual_seed(0)
TENSORS = make_tensors(config=SMALL)
SHAPES = {name: tensor.shape for name, tensor in TENSORS.items()}


def int8_file() -> bytes:
    stored = {}
    for name, tensor in TENSORS.items():
        if is_quantizable(tuple(tensor.shape)):
            stored[name], stored[f"{name}.scale"] = quantize_rows(tensor)
        else:
            stored[name] = tensor.half()
    return save(stored, {"format": "pt"})


def pickle_file(archive: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(TENSORS, buffer, _use_new_zipfile_serialization=archive)
    return buffer.getvalue()


FILES = {
    "model.safetensors": save(TENSORS, {"format": "pt"}),
    "model.int8.safetensors": int8_file(),
    "zip.bin": pickle_file(True),
    "legacy.bin": pickle_file(False),
}
SAFETENSORS = ["model.safetensors", "model.int8.safetensors"]

Load = Callable[[str, bytes], str]


@pytest.fixture(scope="module")
def load(tmp_path_factory: pytest.TempPathFactory) -> Load:
    """Load a file of these bytes: "loaded", or "refused" with one of the documented errors."""
    folder: Path = tmp_path_factory.mktemp("fuzz")
    (folder / "config.json").write_text(json.dumps(SMALL))

    def load_bytes(name: str, content: bytes) -> str:
        (folder / name).write_bytes(content)
        try:
            model = load_model(folder / name, backend="reference")
        except (CheckpointError, OSError):
            return "refused"
        tensors = hub_tensors(model)
        assert {key: tensor.shape for key, tensor in tensors.items()} == SHAPES
        assert all(tensor.isfinite().all() for tensor in tensors.values())
        return "loaded"

    return load_bytes


@pytest.mark.parametrize("name", FILES)
def test_whole_file_loads(load: Load, name: str) -> None:
    assert load(name, FILES[name]) == "loaded"


@pytest.mark.parametrize("name", FILES)
@given(st.data())
def test_truncated_file_is_refused(load: Load, name: str, data: st.DataObject) -> None:
    content = FILES[name]
    assert load(name, content[: data.draw(st.integers(0, len(content) - 1))]) == "refused"


@pytest.mark.parametrize("name", SAFETENSORS)
@given(st.binary(min_size=1, max_size=64))
def test_file_with_something_behind_it_is_refused(load: Load, name: str, tail: bytes) -> None:
    assert load(name, FILES[name] + tail) == "refused"


@pytest.mark.parametrize("name", FILES)
@given(st.data())
def test_flipped_bits_are_refused_or_give_the_right_shapes(load: Load, name: str, data: st.DataObject) -> None:
    content = bytearray(FILES[name])
    # Half of the flips hit the header of a safetensors file; in its data most cannot be told from weights.
    header = len(content) - sum(tensor.nbytes for tensor in TENSORS.values()) if name in SAFETENSORS else len(content)
    limit = data.draw(st.sampled_from([max(header, 8), len(content)]))
    for place in data.draw(st.lists(st.integers(0, 8 * limit - 1), min_size=1, max_size=8)):
        content[place // 8] ^= 1 << place % 8
    load(name, bytes(content))


@pytest.mark.parametrize("name", FILES)
@given(st.binary(max_size=400))
def test_random_bytes_are_refused(load: Load, name: str, content: bytes) -> None:
    assert load(name, content) == "refused"


@pytest.mark.parametrize("name", SAFETENSORS)
@given(st.one_of(st.integers(0, 2**64 - 1), st.integers(0, 5000)))
def test_absurd_header_length_is_refused(load: Load, name: str, length: int) -> None:
    whole = FILES[name]
    if length != struct.unpack("<Q", whole[:8])[0]:
        assert load(name, struct.pack("<Q", length) + whole[8:]) == "refused"


def split(name: str) -> tuple[dict[str, Any], bytes]:
    (length,) = struct.unpack("<Q", FILES[name][:8])
    return json.loads(FILES[name][8 : 8 + length]), FILES[name][8 + length :]


def join(header: object, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + data


ABSURD_NUMBERS = st.one_of(
    st.integers(-3, 300), st.sampled_from([2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 2**64, 2**200]), st.floats()
)
ABSURD_ENTRIES = st.one_of(
    st.none(), st.booleans(), st.text(max_size=5), ABSURD_NUMBERS, st.lists(ABSURD_NUMBERS, max_size=4)
)


@pytest.mark.parametrize("name", SAFETENSORS)
@given(st.data())
def test_header_that_lies_is_refused_or_gives_the_right_shapes(load: Load, name: str, data: st.DataObject) -> None:
    header, content = split(name)
    names = [key for key in header if key != "__metadata__"]
    for _ in range(data.draw(st.integers(1, 3))):
        entry = header[data.draw(st.sampled_from(names))]
        field = data.draw(st.sampled_from(["dtype", "shape", "data_offsets"]))
        if field == "dtype":
            dtypes = ["F64", "F32", "F16", "BF16", "I8", "U8", "BOOL", "I64", "F8_E4M3", "F4", "C64", "?"]
            entry[field] = data.draw(st.one_of(st.sampled_from(dtypes), ABSURD_ENTRIES))
        else:
            entry[field] = data.draw(ABSURD_ENTRIES)
    load(name, join(header, content))


@pytest.mark.parametrize("name", SAFETENSORS)
@given(st.data())
def test_tensors_that_overlap_or_are_mis_sized_are_refused(load: Load, name: str, data: st.DataObject) -> None:
    header, content = split(name)
    victim = header[data.draw(st.sampled_from([key for key in header if key != "__metadata__"]))]
    begin, end = victim["data_offsets"]
    moved = data.draw(st.tuples(st.integers(0, len(content)), st.integers(0, len(content) + 50)))
    if moved != (begin, end):
        victim["data_offsets"] = list(moved)
        assert load(name, join(header, content)) == "refused"


@pytest.mark.parametrize("header", [[], {}, None, "text", 3, {"__metadata__": 3}, {"a": {}}, {"__metadata__": {}}])
def test_header_of_another_kind_is_refused(load: Load, header: object) -> None:
    assert load("model.safetensors", join(header, b"")) == "refused"


def test_header_nested_a_million_deep_is_refused(load: Load) -> None:
    text = b'{"a":' * 200_000
    assert load("model.safetensors", struct.pack("<Q", len(text)) + text) == "refused"


def test_misaligned_data_loads(load: Load) -> None:
    # Files of other writers need not be padded.
    header, content = split("model.safetensors")
    text = json.dumps(header).encode()
    text += b" " * (3 - len(text) % 8)
    assert load("model.safetensors", struct.pack("<Q", len(text)) + text + content) == "loaded"


@given(st.data())
def test_archive_with_a_damaged_pickle_is_refused_or_gives_the_right_shapes(load: Load, data: st.DataObject) -> None:
    # With the right checksum, so that the damage reaches the unpickler.
    whole = FILES["zip.bin"]
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        pickled = next(archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))
    damaged = bytearray(pickled)
    for place in data.draw(st.lists(st.integers(0, len(pickled) - 1), min_size=1, max_size=6)):
        damaged[place] = data.draw(st.integers(0, 255))
    checksums = [struct.pack("<I", zlib.crc32(one)) for one in (pickled, damaged)]
    assert whole.count(pickled) == 1
    load("zip.bin", whole.replace(pickled, bytes(damaged)).replace(*checksums))
