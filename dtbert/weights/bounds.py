"""What a pickle may hold, no more than its own bytes say, and where in it that lies."""

import math
import struct
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor


def unpacks(path: Path) -> bool:
    """Whether an archive holds more than its own size: torch packs nothing."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except Exception:  # torch says what is wrong with it
        return False
    packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
    return packed or sum(entry.file_size for entry in entries) > path.stat().st_size


def is_dense(value: Any) -> bool:
    """Whether this is a tensor on the CPU all of whose values lie in memory: of a view, one may stand for millions."""
    return isinstance(value, Tensor) and not value.is_meta and _has_values(value)


def _has_values(tensor: Tensor) -> bool:
    return (
        not (tensor.is_nested or tensor.is_quantized)
        and tensor.layout == torch.strided
        and tensor.nbytes <= tensor.untyped_storage().nbytes()
    )


class Place(NamedTuple):
    """Where the values of a tensor of an archive begin in the file, from the first to the last of them."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def find_places(path: Path) -> dict[str, Place] | None:
    """Where the tensors of an archive lie, by name, so that each is read alone; None where that is not certain.

    It is for archives as torch writes them, of dense tensors in this machine's byte order. No values are read.
    """
    try:
        sizes = _storages(path)
        # Without values: torch only notes where they would be read.
        content = torch.load(path, map_location="meta", weights_only=True)
        places = {name: _place(tensor, sizes) for name, tensor in content.items()}
    except Exception:  # a damaged pickle makes the unpickler raise nearly anything
        return None
    return places if all(isinstance(name, str) for name in places) else None


def _storages(path: Path) -> dict[int, int]:
    """Bytes of each storage of an archive by where it begins.

    Raises:
        ValueError: they are in another byte order, or where torch would not look for them.
    """
    with zipfile.ZipFile(path) as archive, path.open("rb") as file:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
        root = entries[0].filename.partition("/")[0]
        names = set(archive.namelist())
        byteorder = f"{root}/byteorder"
        if (archive.read(byteorder).decode() if byteorder in names else "little") != sys.byteorder:
            raise ValueError("another byte order")
        storages = [entry for entry in entries if entry.filename.startswith(f"{root}/data/")]
        # In such files torch does not look where storages begin: it counts, and they must come by number.
        if f"{root}/.format_version" in names:
            numbers = [int(entry.filename.rpartition("/")[2]) for entry in storages]
            if numbers != [*range(len(numbers))]:
                raise ValueError("another order")
        sizes = {}
        for entry in storages:
            file.seek(entry.header_offset + 26)
            sizes[entry.header_offset + 30 + sum(struct.unpack("<HH", file.read(4)))] = entry.file_size
    return sizes


def _place(tensor: Tensor, sizes: Mapping[int, int]) -> Place:
    """Raises ValueError where the tensor lies in no storage of these sizes."""
    storage, size = tensor.untyped_storage(), tensor.dtype.itemsize
    held, begin = storage.nbytes(), storage._checkpoint_offset
    last = sum((count - 1) * step for count, step in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset()) * size
    end = first + (last + 1) * size if tensor.numel() else first
    if begin is None or not _has_values(tensor) or (held and sizes.get(begin) != held) or not 0 <= first <= end <= held:
        raise ValueError("it lies elsewhere")
    return Place(tuple(tensor.shape), tensor.stride(), tensor.dtype, begin + first, begin + end)
