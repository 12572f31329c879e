"""Label, score and count: what a model gets right on labelled texts with a schedule, and what that costs."""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dtbert.evaluation.label_metrics import Values, score
from dtbert.evaluation.task_reader import LabelledTexts
from dtbert.evaluation.work import executed_p95, sum_of
from dtbert.kernels import BackendName
from dtbert.model import AdaptivePolicy, LengthSchedule, Macs, Policy
from dtbert.qa.windows import PairError
from dtbert.text import SentenceEncoder, TextClassifier, TextTokens
from dtbert.text.running import rows_of
from dtbert.weights import places_of

# So many texts are labelled between two reports of progress.
_CHUNK = 1024


class TextCost(NamedTuple):
    """What a text costs, in the mean: MACs with the schedule, and where nothing is dropped; and its tokens.

    ``executed`` and ``published`` are of the schedule, as `dtbert.model.Macs`; ``own_length`` is what runs without one.
    ``executed_p95`` is what 95 of 100 texts do not exceed, where the text decides how many tokens stay; else None.
    """

    executed: float
    published: float
    own_length: float
    tokens: float
    executed_p95: float | None = None


class TextMeasurement(NamedTuple):
    """What a model did with labelled texts.

    Attributes:
        scores: the task's metrics, in percent.
        predictions: of each text, in order: the name of a label, or a number; None of one that cannot be read.
        cost: of the texts that can be read; None where there are none.
        texts_per_second: from tokens to labels.
    """

    scores: dict[str, float]
    predictions: list[str | float | None]
    cost: TextCost | None
    texts_per_second: float


class PreparedTexts:
    """Labelled texts that are tokenized once, to be labelled, scored and counted with any schedule.

    A text that the model cannot read counts as wrong, and costs nothing.

    Args:
        model: a classifier; or, of a task that gives pairs a number, a sentence encoder, by its embeddings' cosine.
        data: of `read_task`.

    Attributes:
        model, data: as given.
        gold: the number of each text's label, or its own number, ``[n]``.
        unreadable: what is wrong with each text that the model cannot read, by its line.

    Raises:
        ValueError: the model's labels are not the task's, or the task is of numbers and a text cannot be read.
    """

    def __init__(self, model: TextClassifier | SentenceEncoder, data: LabelledTexts) -> None:
        self.model, self.data = model, data
        self._places = _places(model, data)
        self.gold = np.array([example.label for example in data.examples])
        # A sentence encoder reads the texts of a pair one by one.
        alone = isinstance(model, SentenceEncoder)
        asked = [(one.text, one.pair or "") if alone else (one.texts,) for one in data.examples]
        read = iter([one for part in model.reader.read_many(chain.from_iterable(asked)) for one in part])
        self._read = [_all_or_error([next(read) for _ in texts]) for texts in asked]
        self.unreadable = {
            example.line: str(one)
            for example, one in zip(data.examples, self._read, strict=True)
            if not isinstance(one, list)
        }
        if data.task.is_regression:
            for line, reason in self.unreadable.items():
                raise ValueError(f"line {line}: {reason}; take it out of the file")
        self._lengths = _lengths(self._read)

    def __len__(self) -> int:
        return len(self._read)

    def predict(
        self,
        schedule: Policy | None = None,
        begin: int = 0,
        end: int | None = None,
        work: list[Macs] | None = None,
    ) -> Values:
        """The number of each text's label, or its number, ``[n]``; -1 of one that cannot be read.

        Errors of the schedule are the model's; of the texts number ``begin`` to ``end`` alone. To ``work`` is added
        what each took by the schedule, of those that can be read.
        """
        schedule = self.model.resolve(schedule)
        part = self._read[begin:end]
        predicted = np.full(len(part), -1.0)
        readable = [one for one in part if isinstance(one, list)]
        predicted[[isinstance(one, list) for one in part]] = self._numbers(readable, schedule, work).numpy()
        return predicted

    def scores(self, predicted: Values) -> dict[str, float]:
        """The task's metrics of predictions for all texts, in percent."""
        labels = len(self.data.labels)
        return {metric: score(metric, predicted, self.gold, labels) for metric in self.data.task.metrics}

    def cost(self, schedule: Policy | None = None, work: list[Macs] | None = None) -> TextCost | None:
        """Of the texts that can be read; None where there are none.

        Where the text decides how many tokens stay, ``work`` has what each took; without it they are labelled for it.
        """
        count = len(self) - len(self.unreadable)
        if not count:
            return None
        p95, macs = None, self._full
        if isinstance(schedule, AdaptivePolicy):
            if work is None:
                self.predict(schedule, work=(work := []))
            p95, macs = executed_p95(work), sum_of(work)
        elif schedule is not None:
            assert isinstance(schedule, LengthSchedule)
            macs = self._macs(schedule, self._lengths)
        tokens = sum(times * length for (length, _), times in self._lengths.items())
        means = macs.executed / count, macs.published / count, self._full.executed / count, tokens / count
        return TextCost(*means, p95)

    def full_work(self, begin: int = 0, end: int | None = None) -> int:
        """Executed MACs of the texts number ``begin`` to ``end`` that can be read, where nothing is dropped."""
        return self._macs(None, _lengths(self._read[begin:end])).executed

    @cached_property
    def _full(self) -> Macs:
        # A search counts many schedules against it.
        return self._macs(None, self._lengths)

    def _macs(self, schedule: LengthSchedule | None, lengths: Mapping[tuple[int, int], int]) -> Macs:
        model, schedule, backend = self.model.model, self.model.resolve(schedule), self._backend
        published = executed = 0
        for (length, first), times in lengths.items():
            macs = model.macs(schedule, length, question_length=first, backend=backend)
            published, executed = published + times * macs.published, executed + times * macs.executed
        return Macs(published, executed)

    @property
    def _backend(self) -> BackendName:
        with torch.inference_mode():  # as it labels
            return self.model.model.backend_name

    def _numbers(self, part: Sequence[list[TextTokens]], schedule: Policy | None, work: list[Macs] | None) -> Tensor:
        model, tokens = self.model.model, list(chain.from_iterable(part))
        kept: dict[int, tuple[int, ...]] = {}
        watch = None if work is None else lambda numbers, lengths: kept.update(zip(numbers, lengths, strict=True))
        rows = rows_of(model, tokens, schedule, self.model.batch_tokens, watch)
        if work is not None and schedule is not None:
            backend = self._backend
            took = iter(
                model.macs_of_kept(schedule, len(one.ids), kept[number], question_length=one.num_first, backend=backend)
                for number, one in enumerate(tokens)
            )
            work += [sum_of([next(took) for _ in texts]) for texts in part]
        if isinstance(self.model, SentenceEncoder):
            return torch.cosine_similarity(rows[::2], rows[1::2])
        return rows[:, self._places].argmax(1) if self._places else rows[:, 0]


def measure_texts(
    texts: PreparedTexts, schedule: Policy | None = None, on_texts: Callable[[int], object] = lambda _: None
) -> TextMeasurement:
    """Label all texts once, score the labels and count the work.

    Args:
        texts: with their model.
        schedule: tokens that each layer keeps; all by default.
        on_texts: called with the number of texts that are done since the last call.

    Raises:
        TypeError, ValueError: for the schedule, as calling the model.
    """
    work: list[Macs] | None = [] if isinstance(schedule, AdaptivePolicy) else None
    start, found = time.perf_counter(), list[Values]()
    for begin in range(0, len(texts), _CHUNK):
        found.append(texts.predict(schedule, begin, begin + _CHUNK, work))
        on_texts(len(found[-1]))
    seconds = time.perf_counter() - start
    predicted = np.concatenate(found)
    count = len(texts) - len(texts.unreadable)
    cost = texts.cost(schedule, work)
    return TextMeasurement(texts.scores(predicted), _named(texts, predicted), cost, count / seconds)


def _lengths(read: Sequence[list[TextTokens] | PairError]) -> Counter[tuple[int, int]]:
    """How many texts there are of so many tokens, and so many of them of segment 0."""
    tokens = chain.from_iterable(one for one in read if isinstance(one, list))
    return Counter((len(one.ids), one.num_first) for one in tokens)


def _named(texts: PreparedTexts, predicted: Values) -> list[str | float | None]:
    labels = texts.data.labels
    if not labels:
        return [*predicted.tolist()]
    return [labels[number] if number >= 0 else None for number in predicted.astype(np.int64).tolist()]


def _all_or_error(read: list[TextTokens | PairError]) -> list[TextTokens] | PairError:
    tokens = [one for one in read if isinstance(one, TextTokens)]
    return tokens if len(tokens) == len(read) else next(one for one in read if not isinstance(one, TextTokens))


def _places(model: TextClassifier | SentenceEncoder, data: LabelledTexts) -> list[int]:
    """Where the model has each of the task's labels; nothing where each text has a number."""
    if isinstance(model, SentenceEncoder):
        if data.labels or any(one.pair is None for one in data.examples):
            raise ValueError(
                f"the model has no classifier, and embeddings alone say nothing of {data.task.name}: they are measured "
                "on numbers for pairs of texts, such as stsb; `dtbert train --task` trains a classifier"
            )
        return []
    if bool(data.labels) == model.model.is_regression:
        gives, asked = ("a number", "labels") if data.labels else ("labels", "numbers")
        raise ValueError(
            f"the model gives texts {gives}, {data.task.name} has {asked}: it was trained for another task"
        )
    return places_of(data.labels, model.labels) if data.labels else []
