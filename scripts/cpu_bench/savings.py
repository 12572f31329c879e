"""dtbert against itself: what dropping saves, and what scoring costs."""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from bench.checkpoints import Checkpoint
from bench.windows import EQUAL_LENGTHS, Batch, random_windows

from cpu_bench.comparison import DTYPES, Effort
from cpu_bench.timing import Contender, measure, rounds_within, trial
from dtbert.model import BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.model.layer import TokensLeft
from dtbert.weights import load_model

# The published schedule, for 384 tokens.
_LENGTHS = (269, 253, 252, 202, 104, 34)
_LENGTH = 384
_SCORERS = ("received", "cls")

Timed = dict[str, Any]


class _Case(NamedTuple):
    row: dict[str, Any]
    scorer: str
    model: BertForQuestionAnswering
    batch: PackedBatch


def dropping(checkpoint: Checkpoint, dtype: str, effort: Effort, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    """Time saved against executed MACs saved, for the published schedule at 384 tokens."""
    rows = []
    nothing = LengthSchedule.absolute([_LENGTH] * len(_LENGTHS))
    for row, scorer, model, batch in _cases("dropping", checkpoint, dtype, wanted):
        schedule = LengthSchedule.absolute(_LENGTHS, scorer=scorer)
        without, with_drops = _pair(
            functools.partial(model.forward_packed, batch),
            functools.partial(model.forward_packed, batch, schedule),
            " ".join(("dropping", *row.values())),
            effort,
        )
        executed, all_executed = (chosen.macs(model.config, _LENGTH).executed for chosen in (schedule, nothing))
        time_saved, macs_saved = 1 - with_drops["ms"] / without["ms"], 1 - executed / all_executed
        saved = {"ratio": time_saved / macs_saved, "time_saved": time_saved, "macs_saved": macs_saved}
        rows.append(row | _rounded(saved) | with_drops | {"ms_without": without["ms"]})
    return rows


def scoring(checkpoint: Checkpoint, dtype: str, effort: Effort, wanted: Callable[[str], bool]) -> list[dict[str, Any]]:
    """One layer that scores its 384 tokens and keeps all but one, against the same layer keeping all."""
    rows = []
    for row, scorer, model, batch in _cases("scoring", checkpoint, dtype, wanted):
        schedule = LengthSchedule.absolute([_LENGTH - 1] * model.config.num_hidden_layers, scorer=scorer)
        without, with_scores = _pair(
            _first_layer(model, batch, None),
            _first_layer(model, batch, schedule),
            " ".join(("scoring", *row.values())),
            effort,
        )
        ratio = {"ratio": with_scores["ms"] / without["ms"]}
        rows.append(row | _rounded(ratio) | with_scores | {"ms_without": without["ms"]})
    return rows


def _first_layer(
    model: BertForQuestionAnswering, batch: PackedBatch, schedule: LengthSchedule | None
) -> Callable[[], object]:
    backend, layers = model.backend, model.encoder.layers
    states = backend.embed(batch.ids, model.encoder.embeddings)
    return lambda: layers[0](states, TokensLeft(batch, schedule, len(layers), backend), backend)


def _cases(section: str, checkpoint: Checkpoint, dtype: str, wanted: Callable[[str], bool]) -> Iterator[_Case]:
    for workload, (size, length) in EQUAL_LENGTHS.items():
        for scorer in _SCORERS:
            row = {"model": checkpoint.name, "dtype": dtype, "workload": workload, "scorer": scorer}
            if length == _LENGTH and wanted(" ".join((section, *row.values()))):
                model = load_model(checkpoint.folder, dtype=DTYPES[dtype])
                yield _Case(row, scorer, model, Batch.of(random_windows([length] * size)).packed)


def _pair(without: Callable[[], object], changed: Callable[[], object], title: str, effort: Effort) -> list[Timed]:
    calls = {"without": without, "changed": changed}
    contenders = [Contender(name, [call], [1.0], _nothing, trial(call)) for name, call in calls.items()]
    # Two contenders where others have six, and no pauses, since no other engine's threads are awake.
    rounds = rounds_within(contenders, 4 * effort.rounds, effort.seconds / 2)
    return list(measure(contenders, rounds, title, pause_s=0).values())


def _nothing() -> None:
    """The threads are awake: the other contender's are the same."""


def _rounded(values: dict[str, float]) -> dict[str, float]:
    return {name: round(value, 4) for name, value in values.items()}
