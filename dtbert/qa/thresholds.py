"""When the best span is no answer: a threshold of its margin, chosen on questions that were held out."""

import json
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from dtbert.files import Json, naming, write_whole
from dtbert.qa.measured import Digest, parse, read_beside

THRESHOLD_FILE = "no_answer.json"
_FORMAT = 1
_ANEW = "; make it anew with `dtbert evaluate --choose-threshold`"


class ChosenThreshold(NamedTuple):
    """A threshold below which a span's margin means that there is no answer, and where it comes from.

    Attributes:
        threshold: of `dtbert.Answer.margin`.
        f1: in percent, on the questions that it was chosen on, for which it is the best.
        questions_file, num_questions: these questions.
        model_sha256: of the file of weights.
    """

    threshold: float
    f1: float
    questions_file: str
    num_questions: int
    model_sha256: str


def read_threshold(path: str | PathLike[str]) -> ChosenThreshold:
    """The threshold in a `no_answer.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: not JSON, of another format, or a field is missing, unknown or wrong; the message names the file.
    """
    with naming(path, _ANEW):
        document = parse(Path(path).read_bytes(), _FORMAT)
        fields = {name: value for name, value in document.value.items() if name != "format"}
        return Json(fields).record(ChosenThreshold)


def write_threshold(path: str | PathLike[str], chosen: ChosenThreshold) -> None:
    """Write a threshold; the file is never seen in part, and stays as it was where writing fails."""
    write_whole(path, json.dumps({"format": _FORMAT, **chosen._asdict()}, indent=1) + "\n")


def threshold_of(path: Path, digest: Digest | None = None) -> float | None:
    """The threshold beside a model's weights, None where there is none; a warning where it is of other weights.

    Raises:
        OSError, ValueError: as `read_threshold`.
    """
    other = f"was chosen with other weights than these: it may not hold here{_ANEW}"
    chosen = read_beside(path, THRESHOLD_FILE, read_threshold, other, digest)
    return None if chosen is None else chosen.threshold


def check_threshold(value: float) -> None:
    """Raise TypeError if it is not a number, ValueError if it is NaN."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"threshold must be a number, not {value!r}")
    if value != value:
        raise ValueError("threshold must be a number, not NaN")
