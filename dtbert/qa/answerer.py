"""The answerer: questions and contexts in, answers out, one at a time or any number."""

import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, partial
from os import PathLike
from typing import Any, Literal, Unpack, overload

import torch
from tokenizers import Tokenizer

from dtbert.model import BertForQuestionAnswering, OwnScorer, Policy
from dtbert.qa.answering import Watch, best_answers
from dtbert.qa.budgets import MeasuredSchedule, ScheduleFront, own_scorer, schedules_of, within_budget
from dtbert.qa.calls import (
    Asking,
    Named,
    P,
    Question,
    Reading,
    Request,
    Texts,
    check_choice,
    check_count,
    check_names,
    pairs_of,
    request_of,
    resolved,
)
from dtbert.qa.cascade import DEFAULT_AGREEMENT, CalibratedCascade, Cascade, Cascaded, cascade_of, within_agreement
from dtbert.qa.documents import DocumentAnswer, Documents, best_of_documents
from dtbert.qa.reading import Pair, Reader, without_errors
from dtbert.qa.spans import Answer, BestAnswers
from dtbert.qa.thresholds import check_threshold, threshold_of
from dtbert.qa.tokenize import load_tokenizer
from dtbert.qa.trace import Trace, trace_example
from dtbert.qa.windows import Example, PairError, Prepared
from dtbert.weights import load_model, model_folder, resolve_source, weights_sha256


class QuestionAnswerer(Reader):
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
        threshold: margin below which the best span is no answer, for calls with ``no_answer``; 0 by default, at which
            that there is none is as likely as the best span.
        cascade: what was calibrated for this model, for calls with ``budget="auto"``.

    Attributes:
        model, tokenizer, window, stride, max_answer_tokens, batch_tokens, front, threshold, cascade: as given.
        config: the model's sizes.

    Raises:
        TypeError: not a model, a tokenizer or whole numbers.
        ValueError: the window exceeds the model's positions, leaves no room beside the stride or exceeds
            ``batch_tokens``, the tokenizer is not the model's, or a schedule of ``front`` or ``cascade`` does not fit.
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
        threshold: float | None = None,
        cascade: CalibratedCascade | None = None,
    ) -> None:
        if not isinstance(model, BertForQuestionAnswering):
            raise TypeError(f"the model must be a BertForQuestionAnswering, not {type(model).__name__}")
        if batch_tokens is None:
            batch_tokens = 2048 if model.device.type == "cpu" else 32768
        check_count("max_answer_tokens", max_answer_tokens, 1)
        super().__init__(tokenizer, model.config, window, stride, batch_tokens)
        self.model, self.max_answer_tokens = model, max_answer_tokens
        for one in (front, cascade):
            if one is not None:
                one.check_layers(model.config.num_hidden_layers)
        self.front, self.cascade = front, cascade
        self.threshold = 0.0 if threshold is None else threshold
        check_threshold(self.threshold)

    @property
    def schedules(self) -> tuple[MeasuredSchedule, ...]:
        """What a ``budget`` chooses from, the cheapest first: see `within_budget`; ``front`` has all there are."""
        return () if self.front is None else self.front.choices(self.model.device.type != "cpu")

    @property
    def own_scorer(self) -> OwnScorer:
        """What drops tokens where a schedule names no scorer; ``received`` where neither front nor config says."""
        return own_scorer(self.front, self.config)

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
        """Load a model, its tokenizer, and where there are such its `schedules.json`, `cascade.json`, `no_answer.json`.

        What was measured with other weights is loaded with a warning in the log.

        Args:
            source: a local folder, or a hub id; by default the model that ships with dtbert.
            revision: of the hub id.
            device, dtype, graphs: as `dtbert.load_model`.
            with_schedules: False leaves `schedules.json` and `cascade.json` unread, whatever they hold.
            reading: window, stride, max_answer_tokens, batch_tokens and threshold, as the class; a threshold that is
                given goes before the file's.

        Raises:
            OSError: a file is missing or cannot be read, or cannot be fetched.
            ValueError, TypeError: a file's content is wrong, or as the class.
        """
        check_names(reading, Reading.__annotations__)
        path = resolve_source(source, revision)
        model = load_model(path, device=device, dtype=dtype, graphs=graphs)
        tokenizer = load_tokenizer(model_folder(path))
        layers, digest = model.config.num_hidden_layers, cache(partial(weights_sha256, path))
        front = schedules_of(path, layers, digest) if with_schedules else None
        cascade = cascade_of(path, layers, digest) if with_schedules else None
        if reading.get("threshold") is None:
            reading["threshold"] = threshold_of(path, digest)
        return cls(model, tokenizer, front=front, cascade=cascade, **reading)

    @overload
    def __call__(
        self, question: str | Named, context: str | None = None, *, top_k: Literal[1] = 1, **asking: Unpack[Asking]
    ) -> Answer: ...

    @overload
    def __call__(
        self, question: Question, context: Texts = None, *, top_k: int = 1, **asking: Unpack[Asking]
    ) -> Answer | list[Answer] | list[list[Answer]]: ...

    def __call__(
        self, question: Question, context: Texts = None, *, top_k: int = 1, **asking: Unpack[Asking]
    ) -> Answer | list[Answer] | list[list[Answer]]:
        """The best answer to a question about a context; a list of them where the question is a list.

        Args:
            question: at most as long as a window leaves room for. Or a dictionary of ``question`` and ``context``, or a
                list of either.
            context: of any length; of a list of questions one for all, or a list of as many.
            top_k: answers to each question: where it is above 1, a list of them, as `top` gives.
            schedule: tokens that each layer keeps; all by default. One without a scorer takes the model's own: that of
                ``front`` where all its schedules have the same, else the config's, else ``received``.
            budget: instead of a schedule: the part of the full model's MACs that a schedule may cost in the mean over
                the questions it was searched on, above 0 and at most 1; the most accurate of `schedules` that fits is
                used, see `within_budget`. A short text may cost a few points more. ``"auto"`` answers at a small
                budget, and again in full where that is unsure: `within_agreement`; one answer, without ``no_answer``.
            agreement: for ``budget="auto"``: the part of the answers that are to be the full model's; 0.98 by default.
            overlap: whether one of several answers may share characters with a better one; False by default.
            no_answer: whether the answer may be that the context has none, which is ``""`` from 0 to 0; False by
                default. It comes before all answers whose margin is below the threshold.
            threshold: of the margin, for ``no_answer``; by default the attribute of this name.

        Raises:
            TypeError: not strings, not a `Policy`, a number that is none; or an option that there is not.
            ValueError: a text is empty, blank, without tokens or with lone surrogates; a question too long for the
                window; a schedule with another number of layers than the model; as `within_budget` and
                `within_agreement`.
        """
        check_count("top_k", top_k, 1)
        request = self._request(top_k, **asking)
        pairs, several = pairs_of(question, context)
        if several:
            return list(without_errors(self._answer_pairs(pairs, request)))
        (found,) = self._answer_pairs(pairs, request)
        if isinstance(found, PairError):
            raise found
        return found

    def top(self, question: str, context: str, k: int, **asking: Unpack[Asking]) -> list[Answer]:
        """The ``k`` best answers, best first by their margin; fewer where the context has no more.

        They are of distinct text: one that occurs several times counts once, at its best place. Unless ``overlap``
        says otherwise none overlaps a better one, nor the same words elsewhere. Otherwise as calling the answerer.
        """
        check_count("k", k, 1)
        request = self._request(k, **asking)
        (found,) = self._answer_readable(Prepared((self._example(question, context),)), request)
        return [found] if k == 1 else found

    @overload
    def answer_many(
        self,
        pairs: Iterable[Pair],
        *,
        top_k: Literal[1] = 1,
        errors: Literal["raise"] = "raise",
        **asking: Unpack[Asking],
    ) -> Iterator[Answer]: ...

    @overload
    def answer_many(
        self, pairs: Iterable[Pair], *, top_k: Literal[1] = 1, errors: Literal["yield"], **asking: Unpack[Asking]
    ) -> Iterator[Answer | PairError]: ...

    @overload
    def answer_many(
        self, pairs: Iterable[Pair], *, top_k: int, errors: Literal["raise"] = "raise", **asking: Unpack[Asking]
    ) -> Iterator[Answer] | Iterator[list[Answer]]: ...

    @overload
    def answer_many(
        self, pairs: Iterable[Pair], *, top_k: int, errors: Literal["raise", "yield"], **asking: Unpack[Asking]
    ) -> Iterator[Answer | PairError] | Iterator[list[Answer] | PairError]: ...

    def answer_many(
        self,
        pairs: Iterable[Pair],
        *,
        top_k: int = 1,
        errors: Literal["raise", "yield"] = "raise",
        **asking: Unpack[Asking],
    ) -> Iterator[Answer | PairError] | Iterator[list[Answer] | PairError]:
        """Answer any number of questions, in order, in bounded memory.

        The iterable is read as answers are taken, up to 4,096 pairs ahead, fewer once they hold 32 characters for
        each of ``batch_tokens``. Pairs read together are sorted by length for the model.

        Args:
            pairs: ``(question, context)``, or dictionaries of ``question`` and ``context``; may be endless.
            top_k: answers to each question.
            errors: ``"raise"``, or ``"yield"``, by which a pair that cannot be answered gives its `TypeError` or
                `ValueError`, as calling the answerer raises it, in place of its answer.
            asking: as calling the answerer.

        Returns:
            An iterator over an `Answer` per pair, or over a list of them, as `top` gives, where ``top_k`` is above 1.

        Raises:
            TypeError, ValueError: at once for all but the pairs; for a pair as calling the answerer, with its number,
                from 0, when all answers before it are out, as is what the iterable itself raises.
        """
        check_count("top_k", top_k, 1)
        check_choice("errors", errors, "raise", "yield")
        found = self._answer_pairs(pairs, self._request(top_k, **asking))
        return found if errors == "yield" else without_errors(found)

    def answer_documents(
        self,
        question: str,
        documents: Documents,
        k: int = 1,
        *,
        errors: Literal["raise", "skip"] = "raise",
        **asking: Unpack[Asking],
    ) -> list[DocumentAnswer]:
        """The ``k`` best answers to a question about many documents, best first, each with its document's name.

        Args:
            question: as calling the answerer.
            documents: a mapping of names to texts, or an iterable of ``(name, text)``, or of texts, whose names are
                their numbers from 0; read once, in bounded memory.
            k: answers of all documents together; fewer where they have no more.
            errors: ``"raise"``, or ``"skip"``, by which a document without words is left out.
            asking: as calling the answerer. With ``no_answer`` one answer may be that no document has any.

        Returns:
            Probabilities are among all spans of all documents and the answer that there is none.

        Raises:
            TypeError, ValueError: as calling the answerer; for a document with its name.
        """
        check_count("k", k, 1)
        check_choice("errors", errors, "raise", "skip")
        request = self._request(k, **asking)
        if request.cascade is not None:
            raise ValueError("budget='auto' promises the best span of one text, not of many: give a number instead")
        self._example(question, "?")  # what is wrong with the question is wrong with no document

        def answer(examples: Sequence[Example]) -> list[BestAnswers]:
            return self._answer(examples, request)

        return best_of_documents(question, documents, k, errors, self.prepare_many, answer).answers(request.threshold)

    def answer_prepared(
        self, prepared: Prepared, *, schedule: Policy | None = None, watch: Watch | None = None
    ) -> list[Answer | PairError]:
        """The best answer to each of the prepared questions, or its error; errors of the schedule are raised.

        ``watch`` is told what the layers keep, as `dtbert.qa.answering.best_answers` says; errors have no row there.
        """
        return self._answer_readable(prepared, Request(1, self.resolve(schedule)), watch)

    def answer_cascade(self, prepared: Prepared, cascade: Cascade, *, watch: Watch | None = None) -> Cascaded:
        """The best answer to each of the prepared questions, by a cascade; ``watch`` is told of the first pass.

        What is answered again goes through the model together, in batches as the first time.
        """
        readable = {row: one for row, one in enumerate(prepared.examples) if isinstance(one, Example)}
        first = self._answer(list(readable.values()), Request(1, self.resolve(cascade.schedule)), watch)
        best, certainties = dict(zip(readable, first, strict=True)), [math.nan] * len(prepared)
        for row, one in best.items():
            certainties[row] = one.certainty
        again = [row for row in readable if cascade.is_unsure(certainties[row])]
        best |= zip(again, self._answer([readable[row] for row in again], Request()), strict=True)
        examples = enumerate(prepared.examples)
        answers = [best[row].answers()[0] if isinstance(one, Example) else one for row, one in examples]
        return Cascaded(answers, certainties, again)

    def trace(
        self, question: str, context: str, *, schedule: Policy | None = None, budget: float | None = None
    ) -> Trace:
        """Which tokens each layer drops, and what becomes of the answer; else as calling the answerer."""
        request = self._request(1, schedule=schedule, budget=budget)
        if request.cascade is not None:
            raise ValueError("a trace is of one schedule, and budget='auto' may take two: give a number")
        example = self._example(question, context)
        return trace_example(self, example, (self._cls, self._sep), request.schedule, budget)

    def resolve(self, schedule: P | None) -> P | None:
        """The schedule as it is run: one without a scorer takes the model's own; None stays None.

        Raises:
            TypeError: not a `Policy`.
            ValueError: another number of layers than the model's, or the model's own scorer is unknown.
        """
        return resolved(schedule, self.config, self.own_scorer)

    def within_budget(self, budget: float, *, static: bool | None = None) -> MeasuredSchedule:
        """The most accurate measured schedule whose MACs are at most this part of the full model's, in the mean.

        The full model itself is the choice at a budget of 1; its ``schedule`` is None.

        Args:
            budget: above 0 and at most 1.
            static: choose among `LengthSchedule` alone, where there are such. By default on a GPU: any other waits for
                it in each layer that drops, and no CUDA graph holds it.

        Raises:
            TypeError: not a number.
            ValueError: out of range, below the cheapest schedule, or the model has no `schedules.json`.
        """
        by_device = self.model.device.type != "cpu"
        return within_budget(self.front, budget, by_device if static is None else static)

    def within_agreement(self, agreement: float | None = None) -> Cascade:
        """How ``budget="auto"`` answers: `dtbert.qa.CalibratedCascade.within`, for 0.98 by default.

        Where that is the full model alone, a warning in the log says so; ValueError also where there is no
        `cascade.json`.
        """
        return within_agreement(self.cascade, DEFAULT_AGREEMENT if agreement is None else agreement)

    def _request(self, k: int, **asking: Unpack[Asking]) -> Request:
        schedule, agreement, cascade = asking.get("schedule"), asking.get("agreement"), None
        budget: Any = asking.get("budget")
        if budget == "auto":
            cascade = self.within_agreement(agreement)
        elif agreement is not None:
            raise ValueError("agreement is what budget='auto' promises: give it with that")
        elif budget is not None and schedule is None:
            schedule = self.within_budget(budget).schedule
        return request_of(k, self.resolve(schedule), asking, self.threshold, cascade)

    def _answer_pairs(self, pairs: Iterable[Pair], request: Request) -> Iterator[Any]:
        return (one for part in self.prepare_many(pairs) for one in self._answer_readable(part, request))

    def _answer_readable(self, prepared: Prepared, request: Request, watch: Watch | None = None) -> list[Any]:
        """An answer to each question, or a list of them where the request is for several, or its error."""
        if request.cascade is not None:
            return self.answer_cascade(prepared, request.cascade, watch=watch).answers
        examples = prepared.examples
        answers = iter(self._answer([one for one in examples if isinstance(one, Example)], request, watch))
        found = [next(answers).answers(request.threshold) if isinstance(one, Example) else one for one in examples]
        return [one[0] if isinstance(one, list) and request.k == 1 else one for one in found]

    def _answer(self, examples: Sequence[Example], request: Request, watch: Watch | None = None) -> list[BestAnswers]:
        special = self._cls, self._sep
        return best_answers(self.model, examples, request, special, self.max_answer_tokens, self.batch_tokens, watch)
