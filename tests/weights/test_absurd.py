"""Files that ask for what no machine has: refused before it is taken, by a documented error."""

import os
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from dtbert.weights import CheckpointError, convert, load_encoder, load_model, load_trainable
from dtbert.weights.checkpoint import open_checkpoint
from dtbert.weights.header import read_header
from tests.weights.checkpoints import CONFIG, make_tensors, write

WORDS = "bert.embeddings.word_embeddings.weight"
LOADS = [load_model, load_encoder, load_trainable]


@contextmanager
def at_most_more(size: int) -> Iterator[None]:
    """The process may take so many more bytes of memory."""
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.skipif(sys.platform != "linux", reason="bounds and reads the process' memory as Linux does")
@pytest.mark.parametrize("load", LOADS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_hidden_layers": 10**9},
        {"num_hidden_layers": 16_000},
        {"hidden_size": 10**9},
        {"hidden_size": 2**24},
        {"intermediate_size": 2**24},
        {"vocab_size": 2**30},
        {"vocab_size": 10**30},
        {"max_position_embeddings": 2**63},
        {"hidden_act": ["gelu"]},
        {"layer_norm_eps": 10**400},
        {"initializer_range": 10**400},
        {"hidden_size": None},
    ],
    ids=str,
)
@pytest.mark.parametrize("head", [True, False])
def test_absurd_config_is_refused_before_memory_is_taken(tmp_path: Path, load: Any, sizes: Any, head: bool) -> None:
    write(tmp_path, make_tensors(span_head=head), **sizes)
    with at_most_more(2**29), pytest.raises(ValueError, match=r"config\.json"):
        load(tmp_path)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, "[]", "null", '{"hidden_size": ' + "9" * 5000 + "}"]
)
def test_config_that_is_no_object_of_sizes_is_refused(tmp_path: Path, text: str) -> None:
    write(tmp_path, make_tensors())
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json: "):
        load_model(tmp_path)


def pickled(folder: Path, odd: Tensor, **config: object) -> Path:
    write(folder, {**make_tensors(), WORDS: odd}, "pytorch_model.bin", **config)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["meta", "nested", "quantized", "view of one value"])
def test_pickle_of_tensors_without_values_is_refused(tmp_path: Path, kind: str) -> None:
    words = make_tensors()[WORDS]
    odd = {
        "meta": lambda: torch.empty(words.shape, device="meta"),
        "nested": lambda: torch.nested.nested_tensor([words]),
        "quantized": lambda: torch.quantize_per_tensor(words, 0.1, 0, torch.qint8),
        "view of one value": lambda: torch.zeros(1).expand(words.shape),
    }[kind]()
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin must hold .* dense tensors"):
        load_model(pickled(tmp_path, odd))


def test_pickle_whose_tensors_are_one_memory_many_times_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 9}
    write(tmp_path, {}, "pytorch_model.bin", **sizes)
    tensors = make_tensors(config={**CONFIG, **sizes})
    one = torch.zeros(512 * 64)
    shared = {name: one[: tensor.numel()].view(tensor.shape) for name, tensor in tensors.items()}
    torch.save(shared, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin holds [\d,]+ bytes, its tensors would take [\d,]+"):
        load_model(tmp_path)


def test_tied_weights_are_no_such_pickle(tmp_path: Path) -> None:
    tensors = make_tensors()
    torch.save(
        {**tensors, "cls.predictions.decoder.weight": tensors[WORDS]},
        write(tmp_path, {}, "pytorch_model.bin") / "pytorch_model.bin",
    )
    load_model(tmp_path)


def test_compressed_pickle_is_not_unpacked(tmp_path: Path) -> None:
    file = write(tmp_path, make_tensors(), "pytorch_model.bin") / "pytorch_model.bin"
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is compressed"):
        load_model(tmp_path)


FILES = pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])


@FILES
@pytest.mark.parametrize("cut", [0, 4, 100, 4096, 9000])
def test_file_cut_while_it_is_read_is_an_error(tmp_path: Path, cut: int, name: str) -> None:
    file = write(tmp_path, make_tensors(), name) / name
    opened = open_checkpoint(tmp_path)
    opened.file.read(WORDS)
    with file.open("r+b") as writing:
        writing.truncate(cut)
    for tensor in opened.stored:
        with pytest.raises(CheckpointError, match="changed while it was read"):
            opened.file.read(tensor)


@FILES
def test_file_overwritten_while_it_is_read_is_an_error(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, make_tensors(), name) / name
    opened = open_checkpoint(tmp_path)
    opened.file.read(WORDS)
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="changed while it was read"):
        opened.file.read("qa_outputs.bias")


def rewrite(file: Path, order: Callable[[str], Any] = str, left_out: tuple[str, ...] = ()) -> None:
    """The parts of an archive in another order, one right behind the other."""
    with zipfile.ZipFile(file) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name in sorted(parts, key=order):
            if name.rpartition("/")[2] not in left_out:
                archive.writestr(name, parts[name])


def as_older(file: Path) -> None:
    """As torch wrote them before it noted how: by the text of their numbers."""
    rewrite(file, left_out=(".format_version", ".storage_alignment", "byteorder"))


def backwards(file: Path) -> None:
    rewrite(file, lambda name: name[::-1])


def swap(file: Path) -> None:
    """Two tensors of one size change places, and lie as torch lays them."""
    first, second = b"/data/9", b"/data/7"
    file.write_bytes(file.read_bytes().replace(first, b"/data/_").replace(second, first).replace(b"/data/_", second))


@pytest.mark.parametrize(
    ("change", "one_by_one"), [(as_older, True), (rewrite, False), (backwards, False), (swap, False)]
)
def test_pickle_is_read_where_its_tensors_lie(tmp_path: Path, change: Callable[[Path], None], one_by_one: bool) -> None:
    turned = {"bert.pooler.dense.weight": torch.randn(16, 16).T, "bert.pooler.dense.bias": torch.randn(3, 16)[1]}
    file = write(tmp_path, make_tensors() | turned, "pytorch_model.bin") / "pytorch_model.bin"
    change(file)
    opened, again = open_checkpoint(tmp_path), open_checkpoint(tmp_path)
    for name, tensor in torch.load(file, weights_only=True).items():
        assert torch.equal(opened.file.read(name), tensor), name
    os.truncate(file, 9000)
    if one_by_one:
        with pytest.raises(CheckpointError, match="changed while it was read"):
            again.file.read(WORDS)
    else:
        again.file.read(WORDS)  # all were read


@pytest.mark.parametrize("int8", [True, False])
def test_convert_writes_nothing_that_load_would_refuse(tmp_path: Path, int8: bool) -> None:
    tensors = {name: tensor.double() for name, tensor in make_tensors().items()}
    tensors["qa_outputs.bias"][0] = 1e300
    write(tmp_path / "m", tensors)
    with pytest.raises(CheckpointError, match=r"too large for the dtype in qa_outputs\.bias"):
        convert(tmp_path / "m", tmp_path / "c", int8=int8)
    assert not (tmp_path / "c").exists()


def test_name_that_would_steer_a_terminal_is_refused(tmp_path: Path) -> None:
    write(tmp_path, {**make_tensors(), "x\x1b[2J": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"name 'x\\x1b\[2J'"):
        load_model(tmp_path)


SMALL = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0, 4), "c": torch.ones((), dtype=torch.int64)}
WHOLE = save(SMALL, {"format": "pt"})


def agrees(file: Path) -> bool:
    """Whether the header is read, or refused, as safetensors does; the values then are those of a mapped file."""
    try:
        with safe_open(file, "pt") as opened:
            expected = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            shapes = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in expected.items()}
    except Exception:
        shapes = None
    try:
        found = {name: (entry.dtype, entry.shape) for name, entry in read_header(file).items()}
    except ValueError:
        found = None
    return found == shapes


@given(st.data())
def test_header_is_read_and_refused_as_safetensors_does(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    content = bytearray(WHOLE)
    places = st.integers(0, len(content) - 1)
    for place in data.draw(st.lists(places, max_size=3)):
        content[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.sampled_from([None, None, None, data.draw(places)]))
    file = tmp_path_factory.getbasetemp() / "header.safetensors"
    file.write_bytes(bytes(content[:cut]))
    assert agrees(file)


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4],"more":1}}',
        b'{"a":{"dtype":"F32","shape":[1.0],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[true],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[-1],"data_offsets":[4,0]}}',
        b'{"a":{"dtype":"F4","shape":[8],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[9223372036854775808,2],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[0,18446744073709551616],"data_offsets":[0,0]}}',
        b'{"__metadata__":{"a":1},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"__metadata__":null,"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b' {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}',
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}  ',
        b'{"a":{"dtype":"f32","shape":[1],"data_offsets":[0,4]}}',
    ],
)
def test_odd_header_is_read_and_refused_as_safetensors_does(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    assert agrees(tmp_path / "a")


def test_header_that_names_a_tensor_twice_is_refused(tmp_path: Path) -> None:
    entry = b'"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
    header = b"{" + entry + b"," + entry + b"}"
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    with pytest.raises(ValueError, match="names a field twice"):
        read_header(tmp_path / "a")
