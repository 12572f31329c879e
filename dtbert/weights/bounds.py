"""What a pickle may hold: no more than its own bytes say."""

import zipfile
from pathlib import Path
from typing import Any

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
    return (
        isinstance(value, Tensor)
        and not (value.is_nested or value.is_meta or value.is_quantized)
        and value.layout == torch.strided
        and value.nbytes <= value.untyped_storage().nbytes()
    )
