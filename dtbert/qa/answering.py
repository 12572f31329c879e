"""From examples to answers: batches of windows through the model, and the best spans of what it says."""

from collections.abc import Callable, Sequence

import torch

from dtbert.model import BertForQuestionAnswering, LayerKept, Policy
from dtbert.qa.calls import Request
from dtbert.qa.spans import BestAnswers, WindowSpans
from dtbert.qa.windows import Example, Part, batches, pack, span_places

Watch = Callable[[Sequence[Part], Sequence[LayerKept]], None]


def best_answers(
    model: BertForQuestionAnswering,
    examples: Sequence[Example],
    request: Request,
    special: tuple[int, int],
    max_answer_tokens: int,
    batch_tokens: int,
    watch: Watch | None = None,
) -> list[BestAnswers]:
    """The best answers to each example.

    Args:
        model, examples, request: what is asked of whom.
        special: the ids of [CLS] and [SEP].
        max_answer_tokens: longest answer.
        batch_tokens: tokens that go through the model together.
        watch: called with the windows of each batch, end to end, and what every layer kept of them.
    """
    best = [BestAnswers(one, request.k, max_answer_tokens, request.overlap) for one in examples]
    for parts in batches(examples, batch_tokens):
        spans = spans_of(model, examples, parts, request.schedule, special, max_answer_tokens, watch)
        for window, part in enumerate(parts):
            best[part.row].add(spans, window, part)
    # A word may be longer than the longest answer, or than a window.
    wordless = [row for row, one in enumerate(best) if one.is_empty]
    if wordless:
        anywhere = [examples[row].at_any_token() for row in wordless]
        # Their windows have been watched already.
        again = best_answers(model, anywhere, request, special, max_answer_tokens, batch_tokens)
        for row, one in zip(wordless, again, strict=True):
            best[row] = one
    return best


def spans_of(
    model: BertForQuestionAnswering,
    examples: Sequence[Example],
    parts: Sequence[Part],
    schedule: Policy | None,
    special: tuple[int, int],
    max_answer_tokens: int,
    watch: Watch | None = None,
) -> WindowSpans:
    """The spans of some windows of the examples, which go through the model together; arguments as `best_answers`."""
    batch = pack(examples, parts, *special, model.device)
    places = span_places(examples, parts, model.device)
    with torch.inference_mode():
        if watch is None:
            start, end = model.forward_packed(batch, schedule)
        else:
            start, end, kept = model.forward_packed(batch, schedule, output_kept=True)
            watch(parts, kept)
        return WindowSpans(start, end, places, max_answer_tokens)
