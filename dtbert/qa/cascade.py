"""The cascade: a small budget answers, and the full model again where it is unsure; `cascade.json`."""

import json
import logging
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from dtbert.files import Json, naming, write_whole
from dtbert.model import Policy
from dtbert.qa.measured import Digest, head_of, parse, read_beside, text_of
from dtbert.qa.spans import Answer
from dtbert.qa.windows import PairError

CASCADE_FILE = "cascade.json"
DEFAULT_AGREEMENT = 0.98
# How sure it is that a promise holds for texts like those it was calibrated on.
CONFIDENCE = 0.95
_FORMAT = 1
_ANEW = "; make it anew with `dtbert evaluate --calibrate-cascade`"

logger = logging.getLogger(__name__)


class Cascade(NamedTuple):
    """How questions are answered: by a schedule, and again with nothing dropped where that is unsure.

    An answer's certainty is the probability of its span alone, these very words, among all spans and that there is no
    answer: for an agreement on the same words it sorts better than `dtbert.Answer.score`, which counts a span's other
    wordings with it, than the margin, and than the margin's distance to the second span's.

    Attributes:
        schedule: of the first answer; None where the full model gives every answer, and none again.
        unsure_to: the highest certainty of a first answer that is answered again.
        agreement: the part of the answers that are to be the full model's.
        work: of both passes, over the full model's MACs, in the mean over the questions of the calibration.
    """

    schedule: Policy | None
    unsure_to: float
    agreement: float
    work: float

    def is_unsure(self, certainty: float) -> bool:
        """Whether a first answer is to be given again."""
        return self.schedule is not None and certainty <= self.unsure_to


class Cascaded(NamedTuple):
    """Answers by a cascade.

    Attributes:
        answers: in the order of the questions, or their errors.
        certainties: of the first answers; NaN for an error.
        again: which of the questions were answered again, with nothing dropped.
    """

    answers: list[Answer | PairError]
    certainties: list[float]
    again: list[int]


def is_same(one: Answer | PairError, other: Answer | PairError) -> bool:
    """Whether two answers are the same span."""
    return isinstance(one, Answer) and isinstance(other, Answer) and (one.start, one.end) == (other.start, other.end)


@dataclass(frozen=True)
class CascadeStage:
    """What a schedule was sure of and nevertheless answered otherwise than the full model.

    Attributes:
        schedule: of the first answers.
        macs_fraction: its executed MACs over the full model's, in the mean over the questions.
        certainties: of its answers that are not the full model's, the highest first.
        again: for each of these the part of the full model's MACs that all questions take whose certainty is at most
            that.
    """

    schedule: Policy
    macs_fraction: float
    certainties: tuple[float, ...]
    again: tuple[float, ...]

    def __post_init__(self) -> None:
        if not 0 < self.macs_fraction <= 1:
            raise ValueError(f"macs_fraction must be above 0 and at most 1, not {self.macs_fraction}")
        if len(self.certainties) != len(self.again):
            raise ValueError(f"{len(self.certainties)} certainties, and {len(self.again)} in again: give one to each")
        for name in ("certainties", "again"):
            values = getattr(self, name)
            if not all(0 <= one <= 1 for one in values) or any(low > high for high, low in pairwise(values)):
                raise ValueError(f"{name} must be from 0 to 1, the highest first")

    def at(self, most_disagreeing: int, agreement: float) -> Cascade:
        """The cascade of the least work by which so many questions of the calibration get another answer, or fewer."""
        if most_disagreeing >= len(self.certainties):
            return Cascade(self.schedule, 0.0, agreement, self.macs_fraction)
        work = self.macs_fraction + self.again[most_disagreeing]
        return Cascade(self.schedule, self.certainties[most_disagreeing], agreement, work)


@dataclass(frozen=True)
class CalibratedCascade:
    """What a `cascade.json` holds: first answers beside the full model's, on questions that were held out.

    Attributes:
        stages: a first schedule each.
        questions_file, num_questions, question_ids_sha256: what they were measured on; the hash is of the sorted
            ids, one a line.
        dtype: number format of the computation.
        model_sha256: of the file of weights.
        dtbert_version: that measured them.
    """

    stages: tuple[CascadeStage, ...]
    questions_file: str
    num_questions: int
    question_ids_sha256: str
    dtype: str
    model_sha256: str
    dtbert_version: str

    def __post_init__(self) -> None:
        if self.num_questions < 1:
            raise ValueError(f"the count of questions must be at least 1, not {self.num_questions}")
        most = max((len(stage.certainties) for stage in self.stages), default=0)
        if most > self.num_questions:
            raise ValueError(f"{most} certainties of {self.num_questions} questions: there cannot be more")

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError unless each schedule has one entry per layer of the model."""
        for stage in self.stages:
            stage.schedule.check_layers(num_layers)

    def within(self, agreement: float) -> Cascade:
        """The cascade of the least mean work of whose answers at least this part are the full model's.

        It holds with a confidence of 95% for questions like those of the calibration, which are taken as independent:
        the more of a stage's answers are given again, the fewer differ, so that a threshold may go down as long as
        Clopper and Pearson's exact bound of the part that differs (Biometrika 26, 1934) allows: the upper confidence
        bound of risk-controlling prediction sets, arXiv 2101.02703. As the best of several stages is taken, each has
        its share of the 5% (Bonferroni), as in Learn then Test, arXiv 2110.01052.

        Args:
            agreement: above 0, at most 1, which the full model alone has.

        Returns:
            Where no stage keeps the promise for less work than the full model, that alone.

        Raises:
            TypeError: not a number.
            ValueError: out of range.
        """
        check_agreement(agreement)
        full = Cascade(None, 0.0, agreement, 1.0)
        if not self.stages:
            return full
        most = most_disagreeing(self.num_questions, agreement, (1 - CONFIDENCE) / len(self.stages))
        if most < 0:
            return full
        return min([full, *(stage.at(most, agreement) for stage in self.stages)], key=lambda one: one.work)

    def to_json(self) -> str:
        """The text of a `cascade.json`, one stage a line; equal ones give equal texts."""
        entries = [
            json.dumps({**vars(stage), "schedule": stage.schedule.to_dict()}, separators=(",", ":"))
            for stage in self.stages
        ]
        return text_of(self, _FORMAT, {"dtype": self.dtype}, "stages", entries)

    @classmethod
    def from_json(cls, text: str | bytes) -> "CalibratedCascade":
        """The cascade of `to_json`.

        Raises:
            ValueError: not JSON, of another format, or a field is missing, unknown or wrong; the message names it.
        """
        document = parse(text, _FORMAT)
        head = head_of(document, ("dtype", "stages"))
        stages = tuple(_stage(one) for one in document.field("stages").items())
        return cls(stages, dtype=document.field("dtype").of(str), **head)


def _stage(entry: Json) -> CascadeStage:
    schedule = entry.exactly(CascadeStage.__dataclass_fields__).field("schedule")
    certainties, again = (
        tuple(one.of(float) for one in entry.field(name).items()) for name in ("certainties", "again")
    )
    made = schedule.made(Policy.from_dict, schedule.value)
    return entry.made(CascadeStage, made, entry.field("macs_fraction").of(float), certainties, again)


@lru_cache(maxsize=256)
def most_disagreeing(count: int, agreement: float, alpha: float) -> int:
    """How many of some questions may differ, so that Clopper and Pearson's upper bound is at most 1 - agreement.

    That is the greatest k for which a binomial variable of ``count`` and 1 - agreement is at most k with a probability
    of at most ``alpha``; -1 where there is none.
    """
    if agreement == 1:
        return -1
    log_differs, log_agrees = math.log1p(-agreement), math.log(agreement)
    below = 0.0
    for k in range(count + 1):
        log_ways = math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)
        below += math.exp(log_ways + k * log_differs + (count - k) * log_agrees)
        if below > alpha:
            return k - 1
    return count


def read_cascade(path: str | PathLike[str]) -> CalibratedCascade:
    """The content of a `cascade.json`.

    Raises:
        OSError: the file cannot be read.
        ValueError: as `CalibratedCascade.from_json`; the message names the file.
    """
    with naming(path, _ANEW):
        return CalibratedCascade.from_json(Path(path).read_bytes())


def write_cascade(path: str | PathLike[str], cascade: CalibratedCascade) -> None:
    """Write a `cascade.json`; the file is never seen in part, and stays as it was where writing fails."""
    write_whole(path, cascade.to_json())


def cascade_of(path: Path, num_layers: int, digest: Digest | None = None) -> CalibratedCascade | None:
    """The cascade beside a model's weights, None where there is none; a warning where it is of other weights.

    Raises:
        OSError, ValueError: as `read_cascade`, or its schedules are for another number of layers.
    """

    def read(file: Path) -> CalibratedCascade:
        cascade = read_cascade(file)
        with naming(file, _ANEW):
            cascade.check_layers(num_layers)
        return cascade

    other = f"was calibrated with other weights than these: what it promises may not hold here{_ANEW}"
    return read_beside(path, CASCADE_FILE, read, other, digest)


def within_agreement(cascade: CalibratedCascade | None, agreement: float) -> Cascade:
    """As `CalibratedCascade.within`, with a word in the log where it is the full model alone.

    Raises:
        TypeError, ValueError: as that; or the model has no `cascade.json`.
    """
    check_agreement(agreement)
    if cascade is None:
        raise ValueError(
            f"budget 'auto': this model has no {CASCADE_FILE} to choose by; make one in its folder with "
            "`dtbert evaluate --calibrate-cascade`, or give a number instead"
        )
    found = cascade.within(agreement)
    if found.schedule is None:
        _say_full(agreement, cascade.num_questions)
    return found


@cache
def _say_full(agreement: float, num_questions: int) -> None:
    # Once: there may be a call for each question.
    logger.warning(
        "no cascade promises an agreement of %s for less work than the full model, by %s questions: that answers alone",
        agreement,
        f"{num_questions:,}",
    )


def check_agreement(agreement: float) -> None:
    """Raise TypeError or ValueError unless it is a number above 0 and at most 1."""
    if not isinstance(agreement, int | float) or isinstance(agreement, bool):
        raise TypeError(f"agreement must be a number, the part of the full model's answers, not {agreement!r}")
    if not 0 < agreement <= 1:
        raise ValueError(f"agreement must be above 0 and at most 1, not {agreement}")
