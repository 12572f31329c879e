"""The answerer: questions and contexts in, answers out, one at a time or any number."""

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Literal, TypedDict, Unpack, overload

import torch
from tokenizers import Tokenizer

from dtbert.model import BertForQuestionAnswering, LengthSchedule
from dtbert.qa.budgets import SCHEDULES_FILE, MeasuredSchedule, ScheduleFront, check_budget, schedules_of
from dtbert.qa.reading import Pair, read_examples, without_errors
from dtbert.qa.spans import Answer, BestAnswers, WindowSpans
from dtbert.qa.tokenize import check_pair, load_tokenizer, plain, special_ids, tokenize
from dtbert.qa.windows import Example, PairError, Prepared, Window, WindowSize, batches, pack, windows
from dtbert.weights import load_model, model_folder, resolve_source

# `answer_many` reads ahead until it has this many characters per token of a batch.
BUFFER_CHARACTERS_PER_TOKEN = 32


class Reading(TypedDict, total=False):
    """How an answerer reads: see `QuestionAnswerer`, which has the defaults."""

    window: int
    stride: int
    max_answer_tokens: int
    batch_tokens: int | None


class Dropping(TypedDict, total=False):
    """What a call may say of the tokens that are dropped: see `QuestionAnswerer.__call__`."""

    schedule: LengthSchedule | None
    budget: float | None


class QuestionAnswerer:
    """Answers questions about texts with a model and its tokenizer.

    A context of any length is read in windows; an answer is a span of one of them. Calls share no state that
    changes, so several threads may use one answerer.

    Args:
        model: `dtbert.load_model` gives one.
        tokenizer: the model's own; its truncation and padding are left out.
        window: tokens the model reads at a time: question, part of the context and three special tokens.
        stride: tokens of context that consecutive windows share.
        max_answer_tokens: longest answer, in tokens.
        batch_tokens: tokens, padding counted, that go through the model together; by default 2,048 on a CPU
            and 32,768 elsewhere.
        front: schedules that were measured for this model, for calls with a ``budget``.

    Attributes:
        model, tokenizer, window, stride, max_answer_tokens, batch_tokens, front: as given.
        config: the model's sizes.

    Raises:
        TypeError: not a model, a tokenizer or whole numbers.
        ValueError: the window exceeds the model's positions, leaves no room beside the stride or exceeds
            ``batch_tokens``, the tokenizer is not the model's, or a schedule of ``front`` does not fit the model.
    """

    def __init__(
        self,
        model: BertForQuestionAnswering,
        tokenizer: Tokenizer,
        *,
        window: int = 384,
        stride: int = 128,
        max_answer_tokens: int = 30,
        batch_tokens: int | None = None,
        front: ScheduleFront | None = None,
    ) -> None:
        if not isinstance(model, BertForQuestionAnswering):
            raise TypeError(f"the model must be a BertForQuestionAnswering, not {type(model).__name__}")
        if batch_tokens is None:
            batch_tokens = 2048 if model.device.type == "cpu" else 32768
        self.window, self.stride = window, stride
        self._size = WindowSize(window, stride, model.config)
        _check_count("max_answer_tokens", max_answer_tokens, 1)
        _check_count("batch_tokens", batch_tokens, window)
        self.model, self.tokenizer, self.config = model, plain(tokenizer), model.config
        self._cls, self._sep = special_ids(self.tokenizer, model.config.vocab_size)
        self.max_answer_tokens, self.batch_tokens = max_answer_tokens, batch_tokens
        if front is not None:
            front.check_layers(model.config.num_hidden_layers)
        self.front = front

    @property
    def schedules(self) -> tuple[MeasuredSchedule, ...]:
        """The measured schedules that a ``budget`` chooses from, the cheapest first; empty where there are none."""
        return () if self.front is None else self.front.schedules

    @classmethod
    def load(
        cls,
        source: str | PathLike[str] | None = None,
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        graphs: bool | None = None,
        with_schedules: bool = True,
        **reading: Unpack[Reading],
    ) -> "QuestionAnswerer":
        """Load a model, its tokenizer, and its `schedules.json` where there is one.

        Schedules that were measured with other weights are loaded with a warning in the log.

        Args:
            source: a local folder, or a hub id; by default the model that ships with dtbert.
            revision: of the hub id.
            device, dtype, graphs: as `dtbert.load_model`.
            with_schedules: False leaves `schedules.json` unread, whatever it holds.
            reading: window, stride, max_answer_tokens and batch_tokens, as the class.

        Raises:
            OSError: a file is missing or cannot be read, or cannot be fetched.
            ValueError, TypeError: a file's content is wrong, or as the class.
        """
        path = resolve_source(source, revision)
        model = load_model(path, device=device, dtype=dtype, graphs=graphs)
        tokenizer = load_tokenizer(model_folder(path))
        front = schedules_of(path, model.config.num_hidden_layers) if with_schedules else None
        return cls(model, tokenizer, front=front, **reading)

    def __call__(
        self, question: str, context: str, *, schedule: LengthSchedule | None = None, budget: float | None = None
    ) -> Answer:
        """The best answer to a question about a context.

        Args:
            question: at most as long as a window leaves room for.
            context: of any length.
            schedule: tokens that each layer keeps; all by default.
            budget: instead of a schedule: the part of the full model's MACs that a schedule may cost in the mean over
                the questions it was searched on, above 0 and at most 1; the most accurate of `schedules` that fits is
                used, see `within_budget`. A short text may cost a few points more.

        Raises:
            TypeError: not strings, not a `LengthSchedule`, or a budget that is not a number.
            ValueError: a text is empty, blank, without tokens or with lone surrogates; a question too long for the
                window; a schedule with another number of layers than the model; as `within_budget`.
        """
        return self.top(question, context, 1, schedule=schedule, budget=budget)[0]

    def top(
        self,
        question: str,
        context: str,
        k: int,
        *,
        schedule: LengthSchedule | None = None,
        budget: float | None = None,
    ) -> list[Answer]:
        """The ``k`` best answers of distinct text, best first; fewer where the context has no more.

        A text that occurs several times counts once, at its best place. Otherwise as calling the answerer.
        """
        _check_count("k", k, 1)
        schedule = self._choose(schedule, budget)
        return self._answer([self._example(question, context)], schedule, k)[0]

    @overload
    def answer_many(
        self,
        pairs: Iterable[Pair],
        *,
        top_k: Literal[1] = 1,
        errors: Literal["raise"] = "raise",
        **dropping: Unpack[Dropping],
    ) -> Iterator[Answer]: ...

    @overload
    def answer_many(
        self, pairs: Iterable[Pair], *, top_k: Literal[1] = 1, errors: Literal["yield"], **dropping: Unpack[Dropping]
    ) -> Iterator[Answer | PairError]: ...

    @overload
    def answer_many(
        self, pairs: Iterable[Pair], *, top_k: int, errors: Literal["raise"] = "raise", **dropping: Unpack[Dropping]
    ) -> Iterator[Answer] | Iterator[list[Answer]]: ...

    @overload
    def answer_many(
        self, pairs: Iterable[Pair], *, top_k: int, errors: Literal["raise", "yield"], **dropping: Unpack[Dropping]
    ) -> Iterator[Answer | PairError] | Iterator[list[Answer] | PairError]: ...

    def answer_many(
        self,
        pairs: Iterable[Pair],
        *,
        schedule: LengthSchedule | None = None,
        top_k: int = 1,
        budget: float | None = None,
        errors: Literal["raise", "yield"] = "raise",
    ) -> Iterator[Answer | PairError] | Iterator[list[Answer] | PairError]:
        """Answer any number of questions, in order, in bounded memory.

        The iterable is read as answers are taken, up to 4,096 pairs ahead, fewer once they hold 32 characters for
        each of ``batch_tokens``. Pairs read together are sorted by length for the model.

        Args:
            pairs: ``(question, context)``; may be endless.
            schedule, budget: as calling the answerer.
            top_k: answers to each question.
            errors: ``"raise"``, or ``"yield"``, by which a pair that cannot be answered gives its `TypeError` or
                `ValueError`, as calling the answerer raises it, in place of its answer.

        Returns:
            An iterator over an `Answer` per pair, or over a list of them, as `top` gives, where ``top_k`` is above 1.

        Raises:
            TypeError, ValueError: at once for all but the pairs; for a pair as calling the answerer, with its number,
                from 0, when all answers before it are out, as is what the iterable itself raises.
        """
        _check_count("top_k", top_k, 1)
        if errors not in ("raise", "yield"):
            raise ValueError(f"errors must be 'raise' or 'yield', not {errors!r}")
        schedule = self._choose(schedule, budget)
        parts = self.prepare_many(pairs)
        found = (one for part in parts for one in self._answer_readable(part, schedule, top_k))
        answers = found if errors == "yield" else without_errors(found)
        return (one if isinstance(one, PairError) else one[0] for one in answers) if top_k == 1 else answers

    def prepare(self, pairs: Iterable[Pair]) -> Prepared:
        """Tokenize questions once, to answer them with many schedules by `answer_prepared`; all are held in memory.

        Raises:
            TypeError, ValueError: as `answer_many`, at once.
        """
        return Prepared(tuple(without_errors(one for part in self.prepare_many(pairs) for one in part.examples)))

    def prepare_many(self, pairs: Iterable[Pair]) -> Iterator[Prepared]:
        """Tokenize any number of questions, a part at a time in bounded memory; wrong pairs leave their errors."""
        characters = BUFFER_CHARACTERS_PER_TOKEN * self.batch_tokens
        buffers = read_examples(iter(pairs), self.tokenizer, self._size, characters)
        return (Prepared(tuple(examples)) for examples in buffers)

    def answer_prepared(
        self, prepared: Prepared, *, schedule: LengthSchedule | None = None
    ) -> list[Answer | PairError]:
        """The best answer to each of the prepared questions, or its error; errors of the schedule are raised."""
        self._check_schedule(schedule)
        answers = self._answer_readable(prepared, schedule, 1)
        return [one if isinstance(one, PairError) else one[0] for one in answers]

    def within_budget(self, budget: float) -> MeasuredSchedule:
        """The most accurate of `schedules` whose MACs are at most this part of the full model's.

        The full model itself is the choice where nothing cheaper is as accurate; its ``schedule`` is None.

        Args:
            budget: above 0 and at most 1.

        Raises:
            TypeError: not a number.
            ValueError: out of range, below the cheapest schedule, or the model has no `schedules.json`.
        """
        check_budget(budget)
        if self.front is None:
            raise ValueError(
                f"budget {budget}: this model has no {SCHEDULES_FILE} to choose a schedule from; make one in its "
                "folder with `dtbert search`, or pass schedule= (`--schedule`) instead"
            )
        return self.front.within(budget)

    def windows(self, question: str, context: str) -> list[Window]:
        """What the model reads to answer: at least one window, in order of the text.

        Raises:
            TypeError, ValueError: as calling the answerer.
        """
        return windows(self._example(question, context), self._cls, self._sep)

    def _choose(self, schedule: LengthSchedule | None, budget: float | None) -> LengthSchedule | None:
        if budget is None:
            self._check_schedule(schedule)
            return schedule
        if schedule is not None:
            raise ValueError("schedule and budget exclude each other: a budget chooses a schedule; give one of them")
        return self.within_budget(budget).schedule

    def _check_schedule(self, schedule: LengthSchedule | None) -> None:
        if schedule is None:
            return
        if not isinstance(schedule, LengthSchedule):
            raise TypeError(
                f"schedule must be a LengthSchedule, not {type(schedule).__name__}: make one with "
                "LengthSchedule.absolute or LengthSchedule.ratios"
            )
        schedule.check_layers(self.config.num_hidden_layers)

    def _example(self, question: str, context: str) -> Example:
        check_pair(question, context)
        return self._size.example(*tokenize(self.tokenizer, [question, context]))

    def _answer_readable(
        self, prepared: Prepared, schedule: LengthSchedule | None, k: int
    ) -> list[list[Answer] | PairError]:
        examples = prepared.examples
        answers = iter(self._answer([one for one in examples if isinstance(one, Example)], schedule, k))
        return [next(answers) if isinstance(one, Example) else one for one in examples]

    def _answer(self, examples: Sequence[Example], schedule: LengthSchedule | None, k: int) -> list[list[Answer]]:
        best = [BestAnswers(example.context, k) for example in examples]
        for parts in batches(examples, self.batch_tokens):
            batch, firsts, counts = pack(examples, parts, self._cls, self._sep, self.model.device)
            with torch.inference_mode():
                start, end = self.model.forward_packed(batch, schedule)
                # Several spans may have one text, so more than k are at hand.
                depth = 1 if k == 1 else 4 * k
                spans = WindowSpans(start, end, firsts, counts, self.max_answer_tokens, depth)
            for window, part in enumerate(parts):
                best[part.row].add(spans.of(window), part.begin, spans.log_totals[window])
        return [answers.answers() for answers in best]


def _check_count(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
