"""Time saved by dropping tokens, against the executed MACs that it saves."""

import functools
from collections.abc import Sequence

from bench.windows import Batch, Logits, random_windows, squad_lengths, token_batches
from torch import Tensor

from dtbert.model import BertForQuestionAnswering, LengthSchedule
from dtbert.qa.budgets import SCHEDULES_FILE, read_schedules
from dtbert.weights import resolve_source
from gpu_bench.attention import DROPPED_BY
from gpu_bench.models import Models, packed
from gpu_bench.setting import Rows
from gpu_bench.timing import Contender, compare

ALL_TOKENS = "all tokens"
_HALF = 0.5
_BATCH_TOKENS = 16384


def schedules(lengths: Sequence[int]) -> dict[str, LengthSchedule]:
    """The published lengths by two scorers, and the shipped schedule for half the work."""
    published = {f"published, {scorer}": LengthSchedule.absolute(lengths, scorer=scorer) for scorer in DROPPED_BY}
    half = read_schedules(resolve_source(None) / SCHEDULES_FILE).within(_HALF, static=True).schedule
    assert isinstance(half, LengthSchedule)
    return {**published, f"half, {half.scorer}": half}


def dropping(models: Models) -> Rows:
    setting = models.setting
    sequences, tokens = setting.sizes.equal
    windows = sorted(squad_lengths(setting.sizes.windows))
    works = {f"{sequences}x{tokens}": [tokens] * sequences, f"{len(windows)} SQuAD windows": windows}
    for work, lengths in works.items():
        batches = token_batches(_BATCH_TOKENS, random_windows(lengths), setting.device)
        everything = sum(map(models.executed, lengths))
        run = functools.partial(_scheduled, models.fastest, batches, None)
        contenders = [Contender(ALL_TOKENS, run, _last)]
        for name, schedule in schedules(setting.sizes.lengths).items():
            saved = 1 - sum(models.executed(length, schedule) for length in lengths) / everything
            run = functools.partial(_scheduled, models.fastest, batches, schedule)
            contenders.append(Contender(name, run, _last, extra=(("macs_saved", round(saved, 4)),)))
        row = compare(contenders, setting.device, setting.effort, launch="called")
        yield {"section": "schedule", "work": work, **row}


def _scheduled(
    model: BertForQuestionAnswering, batches: Sequence[Batch], schedule: LengthSchedule | None, _: int
) -> list[Logits]:
    return [model.forward_packed(batch.packed, schedule) for batch in batches]


def _last(out: list[Logits]) -> Tensor:
    return packed(out[-1])
