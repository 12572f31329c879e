"""The classifier: a text or a pair in, its label out."""

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Any, Literal, NamedTuple, overload

import torch
from tokenizers import Tokenizer
from torch import Tensor

from dtbert.model import BertForSequenceClassification, OwnScorer, Policy
from dtbert.qa.budgets import SCHEDULES_FILE, MeasuredSchedule, ScheduleFront, own_scorer, schedules_of
from dtbert.qa.calls import check_choice
from dtbert.qa.reading import without_errors
from dtbert.qa.tokenize import load_tokenizer
from dtbert.qa.windows import PairError
from dtbert.text.reading import TextOrPair, TextTokens
from dtbert.text.running import TextModel, rows_of
from dtbert.weights import load_classifier, model_folder, resolve_source


class Label(NamedTuple):
    """The label of a text.

    Attributes:
        label: its name.
        score: its probability; of a model of one label, which gives a number, that number.
        scores: those of all labels, by name.
    """

    label: str
    score: float
    scores: dict[str, float]


class TextClassifier(TextModel):
    """Labels texts, or pairs of them, with a model and its tokenizer.

    Calls share no state that changes, so several threads may use one classifier.

    Args:
        model: `dtbert.load_classifier` gives one.
        tokenizer: the model's own; its truncation and padding are left out.
        batch_tokens: tokens that go through the model together; by default 2,048 on a CPU and 32,768 elsewhere.
        front: schedules that were measured for this model, for calls with a ``budget``.

    Attributes:
        model, tokenizer, batch_tokens, front: as given.
        config: the model's sizes.
        labels: their names, in the order of the logits.

    Raises:
        TypeError, ValueError: not such a model, not its tokenizer, a number of tokens below the model's positions, or a
            schedule of ``front`` that does not fit the model.
    """

    def __init__(
        self,
        model: BertForSequenceClassification,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int | None = None,
        front: ScheduleFront | None = None,
    ) -> None:
        if not isinstance(model, BertForSequenceClassification):
            raise TypeError(f"the model must be a BertForSequenceClassification, not {type(model).__name__}")
        super().__init__(model, tokenizer, batch_tokens)
        if front is not None:
            front.check_layers(model.config.num_hidden_layers)
        self.model, self.labels, self.front = model, model.labels, front

    @classmethod
    def load(
        cls,
        source: str | PathLike[str],
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_tokens: int | None = None,
        with_schedules: bool = True,
    ) -> "TextClassifier":
        """Load a model, its tokenizer, and its `schedules.json` where there is one.

        Args:
            source: a local folder, or a hub id.
            revision: of the hub id.
            device, dtype: as `dtbert.load_classifier`.
            batch_tokens: as the class.
            with_schedules: False leaves `schedules.json` unread, whatever it holds.

        Raises:
            OSError: a file is missing or cannot be read, or cannot be fetched.
            ValueError, TypeError: a file's content is wrong, or as the class.
        """
        path = resolve_source(source, revision)
        model = load_classifier(path, device=device, dtype=dtype)
        front = schedules_of(path, model.config.num_hidden_layers) if with_schedules else None
        return cls(model, load_tokenizer(model_folder(path)), batch_tokens=batch_tokens, front=front)

    @property
    def own_scorer(self) -> OwnScorer:
        """What drops tokens where a schedule names no scorer; ``received`` where neither front nor config says."""
        return own_scorer(self.front, self.config)

    @overload
    def __call__(
        self,
        text: str,
        pair: str | None = None,
        *,
        schedule: Policy | None = None,
        budget: float | None = None,
    ) -> Label: ...

    @overload
    def __call__(
        self,
        text: list[str] | tuple[str, ...],
        pair: Sequence[str] | None = None,
        *,
        schedule: Policy | None = None,
        budget: float | None = None,
    ) -> list[Label]: ...

    def __call__(
        self,
        text: str | list[str] | tuple[str, ...],
        pair: str | Sequence[str] | None = None,
        *,
        schedule: Policy | None = None,
        budget: float | None = None,
    ) -> Label | list[Label]:
        """The label of a text, or of a text and its pair; a list of them where the text is a list.

        Args:
            text, pair: two texts, or two lists of as many; read whole, for nothing is cut off in silence.
            schedule: tokens that each layer keeps; all by default. [CLS] always stays. One without a scorer takes the
                model's own, as `dtbert.QuestionAnswerer` has it.
            budget: instead of a schedule: the part of the full model's MACs that a schedule may cost, as
                `dtbert.QuestionAnswerer` takes it.

        Raises:
            TypeError: not strings, or not a `Policy`.
            ValueError: a text is empty, blank, without tokens, with lone surrogates, or longer than the model's
                positions; lists of different lengths; a schedule with another number of layers than the model; as
                `within_budget`.
        """
        texts: Sequence[TextOrPair]
        if isinstance(text, str):
            if isinstance(pair, list | tuple):
                raise TypeError("one text and a list of pairs: give a list of texts, too")
            one: Any = text if pair is None else (text, pair)
            (found,) = self._labels(self.reader.read([one]), self._chosen(schedule, budget))
            if isinstance(found, Label):
                return found
            raise found
        texts = list(text)
        if pair is not None:
            if isinstance(pair, str) or len(pair) != len(texts):
                number = "one" if isinstance(pair, str) else len(pair)
                raise ValueError(f"{len(texts)} texts and {number} to pair with them: give as many")
            texts = list(zip(text, pair, strict=True))
        return list(self.classify_many(texts, schedule=schedule, budget=budget))

    @overload
    def classify_many(
        self,
        texts: Iterable[TextOrPair],
        *,
        errors: Literal["raise"] = "raise",
        schedule: Policy | None = None,
        budget: float | None = None,
    ) -> Iterator[Label]: ...

    @overload
    def classify_many(
        self,
        texts: Iterable[TextOrPair],
        *,
        errors: Literal["yield"],
        schedule: Policy | None = None,
        budget: float | None = None,
    ) -> Iterator[Label | PairError]: ...

    def classify_many(
        self,
        texts: Iterable[TextOrPair],
        *,
        errors: Literal["raise", "yield"] = "raise",
        schedule: Policy | None = None,
        budget: float | None = None,
    ) -> Iterator[Label | PairError]:
        """The labels of any number of texts, in order, in bounded memory.

        Args:
            texts: strings, or pairs of them; may be endless. Up to 4,096 are read together.
            errors: ``"raise"``, or ``"yield"``, by which a text that cannot be read gives its `TypeError` or
                `ValueError` in place of its label.
            schedule, budget: as calling the classifier.

        Raises:
            TypeError, ValueError: at once for all but the texts; for a text with its number, from 0.
        """
        check_choice("errors", errors, "raise", "yield")
        chosen = self._chosen(schedule, budget)
        found = (one for part in self.reader.read_many(texts) for one in self._labels(part, chosen))
        return found if errors == "yield" else without_errors(found, "text")

    def logits(self, texts: Sequence[TextTokens], schedule: Policy | None = None) -> Tensor:
        """Logits of texts that `reader` has read: float32 ``[n, num_labels]`` on the CPU."""
        return rows_of(self.model, texts, self.resolve(schedule), self.batch_tokens)

    def within_budget(self, budget: float) -> MeasuredSchedule:
        """The most accurate measured schedule within a budget, as `dtbert.QuestionAnswerer.within_budget`."""
        if self.front is None:
            raise ValueError(
                f"budget {budget}: this model has no {SCHEDULES_FILE} to choose a schedule from; make one in its "
                "folder with `dtbert search --task`, or pass schedule= (`--schedule`) instead"
            )
        # As an answerer: what the text decides a GPU is waited for in each layer that drops.
        return self.front.within(budget, static=self.model.device.type != "cpu")

    def _chosen(self, schedule: Policy | None, budget: float | None) -> Policy | None:
        if schedule is not None and budget is not None:
            raise ValueError("schedule and budget exclude each other: a budget chooses a schedule; give one of them")
        return self.resolve(schedule if budget is None else self.within_budget(budget).schedule)

    def _labels(self, read: Sequence[TextTokens | PairError], schedule: Policy | None) -> list[Label | PairError]:
        logits = self.logits([one for one in read if isinstance(one, TextTokens)], schedule)
        scores = iter((logits if self.model.is_regression else logits.softmax(1)).tolist())
        return [self._label(next(scores)) if isinstance(one, TextTokens) else one for one in read]

    def _label(self, scores: list[float]) -> Label:
        best = max(range(len(scores)), key=scores.__getitem__)
        return Label(self.labels[best], scores[best], dict(zip(self.labels, scores, strict=True)))
