"""What was measured of a model's weights and lies beside them, as it is read when the model is loaded."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

from dtbert.weights import model_folder, weights_sha256

logger = logging.getLogger(__name__)

# The SHA-256 of a model's file of weights, when it is first asked for: to read all of them takes its time.
Digest = Callable[[], str]


class _OfWeights(Protocol):
    @property
    def model_sha256(self) -> str: ...


M = TypeVar("M", bound=_OfWeights)


def read_beside(
    path: Path, name: str, read: Callable[[Path], M], warning: str, digest: Digest | None = None
) -> M | None:
    """The content of a file beside a model's weights; None where there is none.

    Args:
        path: of the model.
        name: of the file.
        read: its content; what it raises is raised.
        warning: for the log, after the file's name, where it was made of other weights.
        digest: of the weights, where somebody else asks for it too.
    """
    file = model_folder(path) / name
    if not file.is_file():
        return None
    found = read(file)
    if found.model_sha256 != (weights_sha256(path) if digest is None else digest()):
        logger.warning("%s %s", file, warning)
    return found
