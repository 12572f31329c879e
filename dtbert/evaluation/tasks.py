"""Tasks of whole texts: GLUE's by name (Wang et al. 2018), and two for files of one's own.

Columns are those of GLUE's official files, and those of the exports as JSON lines. Labels are named and numbered as the
data set `glue` on the hub has them.
"""

import math
from dataclasses import dataclass

from dtbert.evaluation.label_metrics import Metric

_ENTAILS = ("entailment", "not_entailment")
_FIRST, _SECOND = ("sentence1", "premise", "text1"), ("sentence2", "hypothesis", "text2")


@dataclass(frozen=True)
class Task:
    """What a file of a task holds, and how it is measured.

    Attributes:
        name: what the command line calls it.
        texts: for each of its texts, one or two, the names that its column may have.
        labels: by number; None: whatever the file has; empty: each text has a number.
        metrics: that are reported; their mean is the task's score, as in GLUE.
        label: the names that the label's column may have.
        headless: the columns of its tables that have no line of names.
        numbers: the lowest and the highest that a text may have.
        optional_pair: whether a file may do without the second text.
    """

    name: str
    texts: tuple[tuple[str, ...], ...]
    labels: tuple[str, ...] | None
    metrics: tuple[Metric, ...]
    label: tuple[str, ...] = ("label",)
    headless: tuple[str, ...] = ()
    numbers: tuple[float, float] = (-math.inf, math.inf)
    optional_pair: bool = False

    @property
    def is_regression(self) -> bool:
        return self.labels == ()


_OWN = (("text", "sentence", *_FIRST), ("pair", "text_pair", *_SECOND))
_ALL = (
    Task("cola", (("sentence",),), ("unacceptable", "acceptable"), ("matthews",),
         headless=("source", "label", "mark", "sentence")),
    Task("sst2", (("sentence",),), ("negative", "positive"), ("accuracy",)),
    Task("mrpc", (("sentence1", "#1 String"), ("sentence2", "#2 String")), ("not_equivalent", "equivalent"),
         ("accuracy", "f1"), label=("label", "Quality")),
    Task("stsb", (("sentence1",), ("sentence2",)), (), ("pearson", "spearman"), label=("label", "score"),
         numbers=(0.0, 5.0)),
    Task("qqp", (("question1",), ("question2",)), ("not_duplicate", "duplicate"), ("accuracy", "f1"),
         label=("label", "is_duplicate")),
    Task("mnli", (_FIRST, _SECOND), ("entailment", "neutral", "contradiction"), ("accuracy",),
         label=("label", "gold_label")),
    Task("mnli-mm", (_FIRST, _SECOND), ("entailment", "neutral", "contradiction"), ("accuracy",),
         label=("label", "gold_label")),
    Task("qnli", (("question",), ("sentence",)), _ENTAILS, ("accuracy",)),
    Task("rte", (_FIRST, _SECOND), _ENTAILS, ("accuracy",)),
    Task("wnli", (_FIRST, _SECOND), _ENTAILS[::-1], ("accuracy",)),
    Task("classification", _OWN, None, ("accuracy", "f1"), optional_pair=True),
    Task("regression", _OWN, (), ("pearson", "spearman"), label=("label", "score"), optional_pair=True),
)  # fmt: skip
TASKS: dict[str, Task] = {task.name: task for task in _ALL}


def task_named(name: str) -> Task:
    """The task of a name; ValueError where there is none."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: choose one of {', '.join(TASKS)}")
    return TASKS[name]
