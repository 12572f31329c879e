"""Where the tokens of a question and its context went: which layer dropped each, and what became of the answer."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from dtbert.model import LayerKept, LengthSchedule, Policy
from dtbert.qa.spans import Answer
from dtbert.qa.tokenize import BEGINS, Tokens
from dtbert.qa.windows import Example, Part, Prepared, parts_of

if TYPE_CHECKING:
    from dtbert.qa.answerer import QuestionAnswerer


class TracedToken(NamedTuple):
    """A token of a window; layers count from 0.

    Attributes:
        text: as the vocabulary writes it, such as ``##ing``.
        part: ``"question"``, ``"context"``, or ``"special"``: [CLS] and [SEP].
        start, end: its characters of the question or of the context; None where it is special.
        word: the number of its word in the question or in the context; None where it is special.
        left: the layer that dropped it; None where it stayed to the end.
        scores: by layer; None where the layer drops nothing or did not get it, or it stays whatever its score.
        ranks: by layer, 1 for what the layer would drop last; None where it drops nothing or did not get it.
    """

    text: str
    part: Literal["question", "context", "special"]
    start: int | None
    end: int | None
    word: int | None
    left: int | None
    scores: tuple[float | None, ...]
    ranks: tuple[int | None, ...]


class TracedLayer(NamedTuple):
    """How many tokens a layer of a window got, and the positions of those that it kept, ascending."""

    entered: int
    kept: tuple[int, ...]


class TracedWindow(NamedTuple):
    """One window: ``[CLS] question [SEP] part of the context [SEP]``.

    Attributes:
        start, end: the characters of the context that it reads.
        tokens: in order; a token's position is its index.
        layers: in order.
        answer: positions of the tokens of the full model's answer; empty where they are not all in this window.
    """

    start: int
    end: int
    tokens: tuple[TracedToken, ...]
    layers: tuple[TracedLayer, ...]
    answer: tuple[int, ...]

    @property
    def answer_left(self) -> int | None:
        """The layer that dropped the first of the answer's tokens; None where they all stayed, or are elsewhere."""
        return min((left for left in (self.tokens[at].left for at in self.answer) if left is not None), default=None)


@dataclass(frozen=True)
class Trace:
    """What a schedule did with a question and its context.

    Attributes:
        question, context: as given.
        schedule: that was traced; None drops nothing.
        budget: that chose it; None where none was given.
        work: executed multiply-accumulates of this text, as a part of the full model's.
        answer: with the schedule.
        full_answer: of the full model.
        windows: in order of the text.
    """

    question: str
    context: str
    schedule: Policy | None
    budget: float | None
    work: float
    answer: Answer
    full_answer: Answer
    windows: tuple[TracedWindow, ...]

    @property
    def survived(self) -> bool:
        """Whether the answer is the full model's, character by character."""
        return same_place(self.answer, self.full_answer)

    @property
    def answer_window(self) -> int:
        """The number, from 0, of the window in which the full model's answer stayed longest; of equals the first."""
        num_layers = len(self.windows[0].layers)

        def stayed(number: int) -> int:
            window = self.windows[number]
            return -1 if not window.answer else num_layers if window.answer_left is None else window.answer_left

        return max(range(len(self.windows)), key=stayed)

    @property
    def answer_left(self) -> int | None:
        """The layer, from 0, that dropped the first token of the full model's answer in `answer_window`; None: none."""
        return self.windows[self.answer_window].answer_left

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; scores as short as they can be without being other float32."""
        return {
            "question": self.question,
            "context": self.context,
            "budget": self.budget,
            "schedule": None if self.schedule is None else self.schedule.to_dict(),
            "work": self.work,
            "answer": asdict(self.answer),
            "full_answer": asdict(self.full_answer),
            "survived": self.survived,
            "answer_window": self.answer_window,
            "answer_left": self.answer_left,
            "windows": [
                {
                    "start": window.start,
                    "end": window.end,
                    "tokens": [
                        {**token._asdict(), "scores": [_short(score) for score in token.scores]}
                        for token in window.tokens
                    ],
                    "layers": [layer._asdict() for layer in window.layers],
                    "answer": list(window.answer),
                }
                for window in self.windows
            ],
        }


def same_place(one: Answer, other: Answer) -> bool:
    """Whether two answers are the same characters of a context."""
    return (one.start, one.end) == (other.start, other.end)


class FollowedWindow(NamedTuple):
    """A window of n tokens, as the layers left it.

    Attributes:
        part: which window.
        left: int64 ``[n]``, the layer that dropped each token; the number of layers where it stayed.
        significance: float32 ``[layers, n]``, as `LayerKept`; NaN in layers that drop nothing.
    """

    part: Part
    left: NDArray[np.int64]
    significance: NDArray[np.float32]


class Follower:
    """What a model's layers kept of the windows of some examples, to be given to `answer_prepared` as ``watch``."""

    def __init__(self) -> None:
        self._windows: dict[tuple[int, int], FollowedWindow] = {}

    def __call__(self, parts: Sequence[Part], kept: Sequence[LayerKept]) -> None:
        masks = torch.stack([layer.mask for layer in kept])
        unscored = torch.full(masks.shape[1:], torch.nan, device=masks.device)
        scores = torch.stack([unscored if one.significance is None else one.significance for one in kept]).cpu().numpy()
        # A dropped token does not come back, so what it passed tells where it left.
        left = masks.sum(0).cpu().numpy()
        first = 0
        for part in parts:
            rows = slice(first, first := first + part.num_tokens)
            self._windows[part.row, part.begin] = FollowedWindow(part, left[rows], scores[:, rows])

    def windows(self, row: int, example: Example) -> list[FollowedWindow]:
        """Of the example number ``row``, in order of the text."""
        return [self._windows[row, begin] for begin, _ in example.parts]


def trace_example(
    answerer: "QuestionAnswerer",
    example: Example,
    special: tuple[int, int],
    schedule: Policy | None,
    budget: float | None,
) -> Trace:
    """What `QuestionAnswerer.trace` gives; ``special`` are the ids of [CLS] and [SEP]."""
    prepared, follower = Prepared((example,)), Follower()
    (answer,) = answerer.answer_prepared(prepared, schedule=schedule, watch=follower)
    (full,) = (answer,) if schedule is None else answerer.answer_prepared(prepared)
    assert isinstance(answer, Answer)
    assert isinstance(full, Answer)
    places = example.context.within(full.start, full.end)
    cls, sep = (_special(str(answerer.tokenizer.id_to_token(index))) for index in special)
    parts = {
        "question": _places(answerer, "question", example.question),
        "context": _places(answerer, "context", example.context),
    }
    windows = []
    for followed in follower.windows(0, example):
        begin, end = followed.part.begin, followed.part.end
        tokens = [cls, *parts["question"], sep, *parts["context"][begin:end], sep]
        first = len(example.question.ids) + 2 - begin
        inside = begin <= places[0] and places[-1] < end
        answer_tokens = tuple((first + places).tolist()) if inside else ()
        windows.append(_window(followed, tokens, example.context, answer_tokens))
    work = _work(answerer, schedule, example, windows)
    return Trace(example.question.text, example.context.text, schedule, budget, work, answer, full, tuple(windows))


def _window(
    followed: FollowedWindow, tokens: Sequence[TracedToken], context: Tokens, answer: tuple[int, ...]
) -> TracedWindow:
    left, num_layers = followed.left, len(followed.significance)
    scores = np.full(followed.significance.shape, np.nan)
    ranks = np.zeros(scores.shape, np.int64)
    layers = []
    for layer, significance in enumerate(followed.significance):
        (entered,) = np.nonzero(left >= layer)
        (kept,) = np.nonzero(left > layer)
        layers.append(TracedLayer(len(entered), tuple(kept.tolist())))
        # Where this window loses nothing, it was scored only if another one of its batch lost something.
        if len(kept) < len(entered):
            # Of equals the first comes first.
            ranks[layer, entered[np.argsort(-significance[entered], kind="stable")]] = np.arange(1, len(entered) + 1)
            scores[layer] = np.where(np.isfinite(significance), significance, np.nan)
    traced = tuple(
        token._replace(
            left=None if gone == num_layers else int(gone),
            scores=tuple(None if np.isnan(score) else float(score) for score in of_token),
            ranks=tuple(int(rank) or None for rank in places),
        )
        for token, gone, of_token, places in zip(tokens, left, scores.T, ranks.T, strict=True)
    )
    begin, end = followed.part.begin, followed.part.end
    start, stop = context.characters(begin, end - 1)
    return TracedWindow(start, stop, traced, tuple(layers), answer)


def _special(text: str) -> TracedToken:
    return TracedToken(text, "special", None, None, None, None, (), ())


def _places(answerer: "QuestionAnswerer", part: Literal["question", "context"], tokens: Tokens) -> list[TracedToken]:
    """The tokens of a text, before any layer."""
    words = (np.cumsum(tokens.edges & BEGINS != 0) - 1).tolist()
    texts = (str(answerer.tokenizer.id_to_token(index)) for index in tokens.ids.tolist())
    return [
        TracedToken(text, part, start, end, word, None, (), ())
        for text, (start, end), word in zip(texts, tokens.offsets.tolist(), words, strict=True)
    ]


def _work(
    answerer: "QuestionAnswerer", schedule: Policy | None, example: Example, windows: Sequence[TracedWindow]
) -> float:
    """Executed MACs over the full model's, of the tokens that the layers did keep."""
    if schedule is None:
        return 1.0
    with torch.inference_mode():  # as it answers
        backend = answerer.model.backend_name
    executed = full = 0
    for part, window in zip(parts_of(0, example), windows, strict=True):
        question, kept = len(example.question.ids) + 2, [len(layer.kept) for layer in window.layers]
        ran = schedule.macs_of_kept(answerer.config, part.num_tokens, kept, question_length=question, backend=backend)
        plain = LengthSchedule.ratios([1] * len(kept)).macs(answerer.config, part.num_tokens, backend=backend)
        executed, full = executed + ran.executed, full + plain.executed
    return executed / full


def _short(score: float | None) -> float | None:
    return None if score is None else float(str(np.float32(score)))
