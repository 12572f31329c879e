"""The header of a safetensors file: what the file holds and where, checked against its size before anything is read.

The file is read, not mapped: one that is cut off meanwhile then ends early, where a mapped one would end the process.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

# Bits of a value. F4 to F6 may fill a byte in part.
_BITS = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8}
_BITS |= {"I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32}
_BITS |= {"I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
# The format's own bound, in bytes.
_LONGEST = 100_000_000


class Entry(NamedTuple):
    """A tensor in the file: its dtype by the format's name, its shape, and where its bytes begin and end."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(path: Path) -> dict[str, Entry]:
    """The tensors of a safetensors file by name.

    Raises:
        OSError: the file cannot be read.
        ValueError: it is no whole safetensors file: every byte after the header belongs to one tensor.
    """
    with path.open("rb") as file:
        size = path.stat().st_size
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else _LONGEST
        if length > min(_LONGEST, size - 8):
            raise ValueError("it is shorter than it says of itself")
        text = file.read(length)
    try:
        fields = json.loads(text.decode("utf-8"), object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("its header is nested too deeply") from error
    if not isinstance(fields, dict):
        raise ValueError("its header is no object")
    _check_metadata(fields.pop("__metadata__", None))
    entries = {name: _entry(name, value) for name, value in fields.items()}
    place = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.begin != place:
            raise ValueError(f"the bytes of {name} begin at {entry.begin}, expected {place}")
        place = entry.end
    if 8 + length + place != size:
        raise ValueError(f"its tensors take {8 + length + place:,} bytes, it has {size:,}")
    return {
        name: entry._replace(begin=8 + length + entry.begin, end=8 + length + entry.end)
        for name, entry in entries.items()
    }


def _entry(name: str, value: Any) -> Entry:
    if not isinstance(value, dict) or not {"dtype", "shape", "data_offsets"} <= value.keys():
        raise ValueError(f"{name} has no dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ValueError(f"{name} has the unknown dtype {str(dtype)!r:.40}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{name} has a shape or data_offsets of other than whole numbers")
    bits = math.prod(shape) * _BITS[dtype]
    if bits % 8 or bits // 8 != offsets[1] - offsets[0]:
        raise ValueError(f"{name} has {bits // 8:,} bytes, and data_offsets of {offsets[1] - offsets[0]:,}")
    return Entry(dtype, tuple(shape), *offsets)


def _are_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(one) is int and 0 <= one < 2**63 for one in value) and len(value) < 100


def _check_metadata(value: Any) -> None:
    good = value is None or isinstance(value, dict)
    if not good or not all(isinstance(one, str) for one in (value or {}).values()):
        raise ValueError("its __metadata__ is no object of texts")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        raise ValueError("its header names a field twice")
    return fields
