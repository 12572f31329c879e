"""Reading a checkpoint: its config, its tensors one by one, and whether the two fit."""

import errno
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from mmap import mmap
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dtbert.files import Json, file_sha256, text_sha256
from dtbert.model import BertConfig
from dtbert.weights.bounds import Place, find_places, is_dense, unpacks
from dtbert.weights.header import read_header
from dtbert.weights.kinds import unpickler_says, what_else
from dtbert.weights.names import (
    CLASSIFIER,
    POOLER,
    SPAN_HEAD,
    canonical_name,
    common_prefix,
    encoder_prefix,
    is_known_extra,
)

# In the order of preference.
WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "model.int8.safetensors",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)

# What may lie beside the weights of a model that reads text.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
    "added_tokens.json",
    "special_tokens_map.json",
)

_INDEX = ".index.json"

_FLOATS = ("float32", "float16", "bfloat16", "float64")
_SAFETENSORS_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAFETENSORS_DTYPES |= {"I8": "int8", "U8": "uint8"}

_LAYER = re.compile(r"bert\.encoder\.layer\.(\d+)\.")
# So many layers may be missing, or twice those that are there, and each of their tensors is listed.
_MORE_LAYERS = 100

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A file of weights is damaged, refused, or does not fit its config."""


class StoredTensor(NamedTuple):
    """What a file says of a tensor: its name there, its shape, and its dtype by torch's name where torch has one."""

    name: str
    shape: tuple[int, ...]
    dtype: str


class Source(NamedTuple):
    """Where a tensor comes from: its name in the file, and that of its scale if it is int8."""

    name: str
    scale: str | None


class TensorFile(ABC):
    """Named tensors in a file, of which one is in memory at a time.

    The file is read, not mapped: one that is cut off meanwhile then ends early, where a mapped one would end the
    process.

    Raises:
        OSError: the file cannot be read.
        CheckpointError: it is not what it claims to be, or it changed while it was read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._state = self._stat()
        self._open()

    @abstractmethod
    def describe(self) -> list[StoredTensor]:
        """What the file holds; no values are read."""

    @abstractmethod
    def _open(self) -> None: ...

    @abstractmethod
    def read(self, name: str) -> Tensor:
        """A tensor on the CPU as stored, once."""

    def _values(self, begin: int, end: int, dtype: torch.dtype) -> Tensor:
        """The values ``[n]`` between two bytes of the file."""
        # Memory of its own, which goes back to the machine at once, where malloc would keep it.
        values = mmap(-1, max(end - begin, 1))
        with self.path.open("rb") as file:
            file.seek(begin)
            received = file.readinto(values)
        if received < end - begin or self._stat() != self._state:
            raise CheckpointError(f"{self.path} changed while it was read: load it again")
        return torch.frombuffer(values, dtype=torch.uint8)[: end - begin].view(dtype)

    def _stat(self) -> tuple[int, int, int]:
        stat = self.path.stat()
        return stat.st_ino, stat.st_size, stat.st_mtime_ns


class SafetensorsFile(TensorFile):
    def _open(self) -> None:
        try:
            self._entries = read_header(self.path)
        except ValueError as error:
            reason = what_else(self.path) or str(error)
            raise CheckpointError(f"{self.path} is not a whole safetensors file: {reason}") from error

    def describe(self) -> list[StoredTensor]:
        return [
            StoredTensor(name, entry.shape, _SAFETENSORS_DTYPES.get(entry.dtype, entry.dtype))
            for name, entry in self._entries.items()
        ]

    def read(self, name: str) -> Tensor:
        entry = self._entries[name]
        return self._values(entry.begin, entry.end, getattr(torch, _SAFETENSORS_DTYPES[entry.dtype])).view(entry.shape)


class PickleFile(TensorFile):
    """A ``pytorch_model.bin``, read by torch's unpickler that runs no code."""

    def _open(self) -> None:
        with self.path.open("rb") as file:
            archive = file.read(2) == b"PK"
        if archive and unpacks(self.path):
            raise CheckpointError(f"{self.path} is compressed, as torch writes no file: unpack it, and save it anew")
        # What is not laid out as torch does, files from before torch 1.6 too, is read whole and let go by tensor.
        places = find_places(self.path) if archive else None
        self._held: dict[str, Tensor] | dict[str, Place] = self._read_whole() if places is None else places
        # Tensors may share their values, as the words and the head of pretraining do, but not all of them.
        taken, size = sum(one.nbytes for one in self._held.values()), self.path.stat().st_size
        if taken > 4 * size:
            raise CheckpointError(f"{self.path} holds {size:,} bytes, its tensors would take {taken:,}")

    def _read_whole(self) -> dict[str, Tensor]:
        try:
            content: Any = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged pickle makes the unpickler raise nearly anything
            if isinstance(error, OSError) and error.errno != errno.EINVAL:  # what a seek to before the start gives
                raise
            reason = what_else(self.path) or unpickler_says(error)
            raise CheckpointError(
                f"{self.path} is not a whole pickle of tensors, and nothing else is read: {reason}"
            ) from error
        if not isinstance(content, dict) or not all(
            isinstance(name, str) and is_dense(tensor) for name, tensor in content.items()
        ):
            raise CheckpointError(f"{self.path} must hold a dictionary of names and dense tensors, and does not")
        return content

    def describe(self) -> list[StoredTensor]:
        return [
            StoredTensor(name, tuple(one.shape), str(one.dtype).removeprefix("torch."))
            for name, one in self._held.items()
        ]

    def read(self, name: str) -> Tensor:
        held = self._held[name]
        if isinstance(held, Place):
            return self._values(held.begin, held.end, held.dtype).as_strided(held.shape, held.stride)
        del self._held[name]
        return held.detach()


class ShardedFile(TensorFile):
    """Several files of weights, found by the index that lists them."""

    def _open(self) -> None:
        self._shards: dict[str, TensorFile] = {}
        self._described: list[StoredTensor] = []
        listed = shard_names(self.path)
        for shard in sorted(set(listed.values())):
            file = self.path.with_name(shard)
            if not file.is_file():
                raise FileNotFoundError(f"{self.path} lists {shard}, which is not beside it: fetch all its files")
            opened = _tensor_file(file)
            described = opened.describe()
            self._shards |= {tensor.name: opened for tensor in described}
            self._described += described
        held = {name: opened.path.name for name, opened in self._shards.items()}
        lacking = sorted(name for name, shard in listed.items() if held.get(name) != shard)
        if lacking:
            lines = "".join(f"\n  {name}: {listed[name]}" for name in lacking)
            raise CheckpointError(f"{self.path} lists tensors that are not in the files it names:{lines}")

    def describe(self) -> list[StoredTensor]:
        return self._described

    def read(self, name: str) -> Tensor:
        return self._shards[name].read(name)


def shard_names(index: Path) -> dict[str, str]:
    """The file of each tensor, by the name of the tensor, from the index of a sharded checkpoint.

    Raises:
        CheckpointError: it is no index, or names what is no file of weights of its own kind beside it.
    """
    ending = Path(index.name.removesuffix(_INDEX)).suffix
    try:
        files = Json.parse(index.read_bytes()).field("weight_map")
        names = {name: files.field(name).of(str) for name in files.of(dict)}
    except ValueError as error:
        raise CheckpointError(f"{index} is no index of weights: {what_else(index) or error}") from error
    for name in names.values():
        # Nothing but a name: a path would lead elsewhere.
        if re.fullmatch(r"[\w-][\w.-]*", name) is None or Path(name).suffix != ending:
            raise CheckpointError(f"{index} names {name!r}: expected names of {ending} files beside it")
    if not names:
        raise CheckpointError(f"{index} is no index of weights: its weight_map is empty")
    return names


def _tensor_file(file: Path) -> TensorFile:
    if file.name.endswith(_INDEX):
        return ShardedFile(file)
    return SafetensorsFile(file) if file.suffix == ".safetensors" else PickleFile(file)


class Checkpoint(NamedTuple):
    """An open checkpoint: the folder it lies in, its config, its file of weights, and what that holds by hub name."""

    folder: Path
    config: BertConfig
    file: TensorFile
    stored: dict[str, StoredTensor]

    def has(self, names: tuple[str, ...]) -> bool:
        """Whether any of these tensors is there."""
        return any(name in self.stored for name in names)

    def check_finite(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise CheckpointError if a tensor made from this checkpoint, given by hub name, holds NaN or infinity."""
        broken = [name for name, tensor in tensors.items() if not _extremes(tensor).isfinite().all()]
        if broken:
            names = ", ".join(sorted(broken))
            raise CheckpointError(f"{self.file.path} holds NaN, infinity, or values too large for the dtype in {names}")

    def match(self, expected: Mapping[str, tuple[int, ...]], *, encoder_alone: bool = False) -> dict[str, Source]:
        """Where each expected tensor is found.

        Args:
            expected: shape of each tensor by its hub name.
            encoder_alone: leave out heads, of whatever kind, and name them in the log.

        Raises:
            CheckpointError: tensors are missing, unexpected, or of the wrong shape or dtype; all are listed, sorted.
        """
        rest, sources, problems = dict(self.stored), {}, {}
        for name, shape in expected.items():
            tensor = rest.pop(name, None)
            if tensor is None:
                problems[name] = f"missing, expected {list(shape)}"
                continue
            scale = rest.pop(f"{name}.scale", None) if tensor.dtype == "int8" else None
            sources[name] = Source(tensor.name, scale.name if scale else None)
            if tensor.shape != shape:
                problems[name] = f"{list(tensor.shape)}, expected {list(shape)}"
            elif scale and (len(shape) != 2 or scale.shape != shape[:1] or scale.dtype not in _FLOATS):
                problems[name] = f"{list(shape)} with a scale of {scale.dtype} {list(scale.shape)}: one float per row"
            elif not scale and tensor.dtype not in _FLOATS:
                lacking = f" or a {name}.scale" if tensor.dtype == "int8" else ""
                problems[name] = f"{list(shape)} of {tensor.dtype}, expected floats{lacking}"
        heads = {name for name in rest if encoder_alone and not name.startswith("bert.") and not is_known_extra(name)}
        if heads:
            logger.warning("%s: the encoder alone is read, without %s", self.file.path, ", ".join(sorted(heads)))
        for name, tensor in rest.items():
            if name not in heads and not is_known_extra(name.removesuffix(".scale")):
                problems[tensor.name] = f"unexpected, {list(tensor.shape)}"
        if problems:
            advice = ""
            if problems.keys() == set(SPAN_HEAD) and not self.has(SPAN_HEAD):
                advice = "\nThe rest is there, the span head is missing: load_encoder loads the encoder alone."
            if set(CLASSIFIER) <= problems.keys() <= {*CLASSIFIER, *POOLER} and not self.has(CLASSIFIER):
                advice = "\nThe rest is there, the classifier is missing: `dtbert train --task` trains one."
            listed = "".join(f"\n  {name}: {problems[name]}" for name in sorted(problems))
            raise CheckpointError(f"{self.file.path} does not fit its config.json:{listed}{advice}")
        return sources


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, or in a single file with its config.json beside it.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: the config is not a BERT encoder's.
        CheckpointError: the file of weights is damaged, or refused.
    """
    file = weights_file(path)
    folder = file.parent
    if not file.name.endswith((".safetensors", ".bin", f".safetensors{_INDEX}", f".bin{_INDEX}")):
        raise CheckpointError(f"{file}: weights come in a .safetensors or a .bin file, or in a folder with one")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json, which says how large the model is: put it beside {file}")
    config = _config(folder / "config.json")
    tensors = _tensor_file(file)
    if file.name.removesuffix(_INDEX).endswith(".bin"):
        logger.warning(
            "%s: read from a pickle, of tensors alone; `dtbert convert` makes a model.safetensors of it", file
        )
    stored: dict[str, StoredTensor] = {}
    described = tensors.describe()
    if prefix := common_prefix([tensor.name for tensor in described]):
        logger.warning("%s: every name begins with the prefix %r, which is taken off", file, prefix)
    if encoder := encoder_prefix([tensor.name.removeprefix(prefix) for tensor in described]):
        logger.warning("%s: the encoder's names begin with the prefix %r, which is read as 'bert.'", file, encoder)
    for tensor in described:
        if not tensor.name.isprintable():
            raise CheckpointError(
                f"{file} holds a tensor of the name {tensor.name!r:.80}, which would steer a terminal"
            )
        name = tensor.name.removeprefix(prefix)
        if encoder and name.startswith(encoder):
            name = f"bert.{name.removeprefix(encoder)}"
        twin = stored.setdefault(canonical_name(name), tensor)
        if twin is not tensor:
            raise CheckpointError(f"{file} holds one tensor under two names: {twin.name} and {tensor.name}")
    _check_layers(config, file, stored)
    return Checkpoint(folder, config, tensors, stored)


def _check_layers(config: BertConfig, file: Path, stored: Mapping[str, StoredTensor]) -> None:
    """Raise CheckpointError where the config has far more layers than the file: to make them all would take for ever.

    What else does not fit is listed by `Checkpoint.match`.
    """
    layers = len({found[1] for name in stored if (found := _LAYER.match(name))})
    if config.num_hidden_layers > 2 * layers + _MORE_LAYERS:
        raise CheckpointError(
            f"{file} does not fit its config.json: that has {config.num_hidden_layers:,} layers, the file {layers}"
        )


def _config(file: Path) -> BertConfig:
    try:
        return BertConfig.from_file(file)
    except ValueError as error:
        raise ValueError(f"{file}: {what_else(file)}" if what_else(file) else str(error)) from error


def weights_file(path: Path) -> Path:
    """The file of weights in a folder, or the path itself where it is a file; FileNotFoundError where there is none."""
    if path.is_file():
        return path
    for name in WEIGHT_FILES:
        if (path / name).is_file():
            return path / name
    held = ", ".join(sorted(entry.name for entry in path.iterdir())) or "nothing"
    raise FileNotFoundError(f"{path} has no weights: looked for {', '.join(WEIGHT_FILES)}, found {held}")


def has_classifier(path: Path) -> bool:
    """Whether a checkpoint has a classifier of whole texts or of words; errors as `open_checkpoint`."""
    return open_checkpoint(path).has(CLASSIFIER)


def model_folder(path: Path) -> Path:
    """The folder with what goes along with the weights, tokenizer and schedules: the path, or its folder if a file."""
    return path if path.is_dir() else path.parent


def weights_sha256(path: Path) -> str:
    """The SHA-256 of the file of weights in a model's folder, or of the file itself, in hexadecimal.

    Of several files it is that of their own, one after the other in the order of their names.
    """
    file = weights_file(path)
    if not file.name.endswith(_INDEX):
        return file_sha256(file)
    return text_sha256("".join(file_sha256(file.with_name(name)) for name in sorted(set(shard_names(file).values()))))


def _extremes(tensor: Tensor) -> Tensor:
    # As float32 has them: in that, or in less, they are computed with.
    return torch.stack(torch.aminmax(tensor)).float()
