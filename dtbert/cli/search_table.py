"""What `dtbert search` prints: its trials, and the front as a table."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from dtbert.cli.options import describe_schedule

if TYPE_CHECKING:
    from dtbert.qa import MeasuredSchedule, ScheduleFront
    from dtbert.search import Search

# What stands above the front, by what it is of; a label is right or wrong, without a second column.
_HEADS = {
    "F1": "    MACs    time     F1   95% interval     EM   kept after each layer, scorer",
    "accuracy": "    MACs    time   acc.   95% interval   kept after each layer, scorer",
}


def table(search: "Search", front: "ScheduleFront") -> str:
    """What a budget chooses from, the cheapest first; below it what is kept for whoever needs lengths."""
    counts, savings, measure = search.counts(), search.savings(), search.evaluator.measure
    saved = 1 - savings.answered / savings.without_rungs
    choices = front.choices()
    lines = [
        f"trials      {counts.finished:,}: {counts.all_questions} answered all questions, "
        f"{counts.ended_early} ended early, {counts.failed} failed",
        f"{search.evaluator.unit:<11} {savings.answered:,} answered instead of {savings.without_rungs:,}: "
        f"{saved:.0%} saved",
        "",
        _HEADS[measure],
        *_rows((*choices, front.full_model), measure),
    ]
    if beaten := [entry for entry in front.schedules if entry not in choices]:
        lines += ["", "  and, where the text cannot decide, as on a GPU and in an ONNX file:", *_rows(beaten, measure)]
    return "\n".join(lines)


def _rows(entries: "Iterable[MeasuredSchedule]", measure: str) -> "Iterable[str]":
    for entry in entries:
        low, high = entry.f1_interval
        # Time is, as MACs are, a part of the full model's.
        latency = entry.latency
        time = 1 if latency is None else latency.seconds / latency.full_model_seconds
        scores = f"{entry.f1:5.2f}  {low:5.1f} to {high:5.1f}"
        if measure == "F1":
            scores += f"  {entry.exact_match:5.2f}"
        # Rounded up, so that what is read here is a budget that suffices.
        yield f"  {entry.least_budget:6.4f}{time:8.3f}  {scores}   {describe_schedule(entry.schedule)}"
