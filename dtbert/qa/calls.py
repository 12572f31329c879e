"""How an answerer may be called: what a call asks for, and what transformers' pipeline took."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypedDict, TypeVar

from dtbert.model import BertConfig, OwnScorer, Policy
from dtbert.qa.cascade import Cascade
from dtbert.qa.thresholds import check_threshold

P = TypeVar("P", bound=Policy)

Texts = str | Sequence[str] | None
Named = Mapping[str, str]
Question = Texts | Named | Sequence[Named]

# What transformers' question-answering pipeline calls otherwise, and what to write.
_ELSEWHERE = {
    "handle_impossible_answer": "write no_answer=True",
    "topk": "write top_k",
    "max_answer_len": "give max_answer_tokens to QuestionAnswerer or its load",
    "max_seq_len": "give window to QuestionAnswerer or its load",
    "doc_stride": "give stride to QuestionAnswerer or its load",
    "batch_size": "give batch_tokens, which counts tokens, to QuestionAnswerer or its load",
    "max_question_len": "leave it out: a question is never cut, one that does not fit beside the context is an error",
    "align_to_words": "leave it out: an answer begins and ends at the edges of words",
    "padding": "leave it out: nothing is padded",
    "num_workers": "leave it out: texts are tokenized in parallel",
    "model": "give it to QuestionAnswerer.load, as its first argument",
    "tokenizer": "it is loaded with the model: QuestionAnswerer.load",
}


class Reading(TypedDict, total=False):
    """How an answerer reads: see `QuestionAnswerer`, which has the defaults."""

    window: int
    stride: int
    max_answer_tokens: int
    batch_tokens: int | None
    threshold: float | None


class Asking(TypedDict, total=False):
    """What a call may say beside its texts: see `QuestionAnswerer.__call__`."""

    schedule: Policy | None
    budget: float | Literal["auto"] | None
    agreement: float | None
    overlap: bool
    no_answer: bool
    threshold: float | None


@dataclass(frozen=True)
class Request:
    """What a call asks for, checked: ``threshold`` is None where there is always an answer.

    Where there is a ``cascade``, it says how questions are answered, and all else is as by default.
    """

    k: int = 1
    schedule: Policy | None = None
    overlap: bool = False
    threshold: float | None = None
    cascade: Cascade | None = None


def check_names(given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for an option that there is not, with what to write instead where its meaning is known."""
    for name in given:
        if name not in known:
            advice = _ELSEWHERE.get(name, f"there are {', '.join(sorted(known))}")
            raise TypeError(f"there is no option {name!r}: {advice}")


def check_choice(name: str, value: str, *choices: str) -> None:
    """Raise ValueError if it is none of the choices."""
    if value not in choices:
        raise ValueError(f"{name} must be {' or '.join(map(repr, choices))}, not {value!r}")


def check_count(name: str, value: int, least: int) -> None:
    """Raise TypeError if it is not a whole number, ValueError if it is too small."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be a whole number, not {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")


def resolved(schedule: P | None, config: BertConfig, own: OwnScorer) -> P | None:
    """The schedule as a model runs it: one without a scorer takes the model's own; None stays None.

    Raises:
        TypeError: not a `Policy`.
        ValueError: another number of layers than the model's, or the model's own scorer is unknown.
    """
    if schedule is None:
        return None
    if not isinstance(schedule, Policy):
        raise TypeError(
            f"schedule must be a LengthSchedule, not {type(schedule).__name__}: make one with LengthSchedule.absolute "
            "or LengthSchedule.ratios, or let the text decide by Threshold or TopP"
        )
    schedule.check_layers(config.num_hidden_layers)
    return schedule.resolve(own)


def request_of(
    k: int, schedule: Policy | None, asking: Asking, threshold: float, cascade: Cascade | None = None
) -> Request:
    """What a call asks for, with what it chose, a schedule or a cascade, and the threshold where it gives none.

    Raises:
        TypeError, ValueError: an option that there is not, or a value that it cannot have.
    """
    check_names(asking, Asking.__annotations__)
    if asking.get("budget") is not None and asking.get("schedule") is not None:
        raise ValueError("schedule and budget exclude each other: a budget chooses a schedule; give one of them")
    no_answer, overlap, given = asking.get("no_answer", False), asking.get("overlap", False), asking.get("threshold")
    for name, value in (("no_answer", no_answer), ("overlap", overlap)):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, not {value!r}")
    if given is not None:
        check_threshold(given)
        if not no_answer:
            raise ValueError("threshold says when there is no answer: give no_answer=True with it")
        threshold = given
    if cascade is not None:
        if k > 1 or overlap or no_answer:
            raise ValueError(
                "budget='auto' promises the best span of one text: give it without top_k, overlap and no_answer, or "
                "give a number instead"
            )
        return Request(cascade=cascade)
    return Request(k, schedule, overlap, threshold if no_answer else None)


def pairs_of(question: Question, context: Texts) -> tuple[list[Any], bool]:
    """The pairs that a call means, and whether it means several: texts, lists of them, a dictionary or a list of them.

    Raises:
        TypeError, ValueError: question and context do not belong together.
    """
    if context is None:
        if isinstance(question, Mapping):
            return [question], False
        if not isinstance(question, str) and isinstance(question, Sequence):
            return list(question), True
        raise TypeError(
            "the context is missing: give question and context, or a dictionary of both, or a list of these"
        )
    if isinstance(question, Mapping):
        raise TypeError("the question is a dictionary, which has a context already: give no other")
    if not isinstance(question, list | tuple):
        if isinstance(context, list | tuple):
            raise TypeError("one question and a list of contexts: answer_documents finds the best answer of them all")
        return [(question, context)], False
    contexts = context if isinstance(context, list | tuple) else [context] * len(question)
    if len(contexts) != len(question):
        raise ValueError(
            f"{len(question)} questions and {len(contexts)} contexts: give a context to each, or one to all"
        )
    return list(zip(question, contexts, strict=True)), True
