"""dtbert and its peers on one model, dtype and workload."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from bench.checkpoints import Checkpoint, reason
from bench.windows import SQUAD, Batch, Window, sized_batches, token_batches
from torch import Tensor
from tqdm import tqdm

from cpu_bench.peers import BASE, Engine, NotTimed
from cpu_bench.timing import Contender, measure, rounds_within, trial

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
# How far from transformers in float32 the logits may be, as a part of the largest of them.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2, "int8": 0.25}
_PEER_BATCH_SIZES = (1, 8)
# Windows of true lengths that settings are checked and tried on.
_TRIED = 8
# Who emulates a dtype, and takes this many times as long as the fastest, is not timed on more work.
_HOPELESS = 4

Batching = Callable[[Sequence[Window]], list[Batch]]


class Effort(NamedTuple):
    """How long to measure: rounds at most, seconds for one workload; and the budgets of tokens that dtbert tries."""

    rounds: int
    seconds: float
    batch_tokens: tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """An engine with a way to batch windows, and the error of its logits."""

    engine: Engine
    batching: str
    batches: Batching
    largest_error: float

    @property
    def name(self) -> str:
        return ", ".join(filter(None, (self.engine.setting, self.batching))) or "default"

    def runs(self, batches: Sequence[Batch]) -> Callable[[], None]:
        def run() -> None:
            for batch in batches:
                self.engine.run(batch)

        return run


class Comparison:
    """One model, dtype and workload: all engines checked and tried, then each provider's best one timed."""

    def __init__(self, checkpoint: Checkpoint, dtype: str, workload: str, work: Sequence[Window]) -> None:
        self.checkpoint, self.dtype, self.workload = checkpoint, dtype, workload
        self.work = sorted(work, key=len)
        self.name = f"{checkpoint.name} {dtype} {workload}"
        self.tokens = sum(map(len, work))
        # Neighbours in length, around the middle.
        middle = len(work) // 2
        self.sample = self.work[middle - _TRIED // 2 :][:_TRIED] if len(work) > _TRIED else self.work

    def run(self, available: Sequence[Engine | NotTimed], effort: Effort) -> dict[str, Any]:
        """The row of the results; engines that are wrong or fail are in its list ``not_timed``."""
        candidates, left_out = self._candidates([e for e in available if isinstance(e, Engine)], effort.batch_tokens)
        tried: dict[str, list[tuple[float, Candidate]]] = {}
        for candidate in tqdm(candidates, f"{self.name}, trying settings", leave=False):
            seconds = trial(candidate.runs(candidate.batches(self.sample)))
            seconds *= self.tokens / sum(map(len, self.sample))
            tried.setdefault(candidate.engine.provider, []).append((seconds, candidate))
        timed = self._time({name: min(trials, key=lambda entry: entry[0]) for name, trials in tried.items()}, effort)
        base = timed[BASE]["ms"] if BASE in timed else None
        left_out += [entry for entry in available if isinstance(entry, NotTimed)]
        return {
            "model": self.checkpoint.name,
            "dtype": self.dtype,
            "workload": self.workload,
            "windows": len(self.work),
            "tokens": self.tokens,
            "results": [_result(trials, timed[name], base) for name, trials in tried.items()],
            "not_timed": [entry._asdict() for entry in left_out],
        }

    def _candidates(
        self, engines: Sequence[Engine], batch_tokens: tuple[int, ...]
    ) -> tuple[list[Candidate], list[NotTimed]]:
        """Each engine with each way to batch, and those whose logits are wrong or do not come."""
        alone = [Batch.of([window]) for window in self.sample]
        expected = [batch.windows_of(self.checkpoint.reference(batch))[0] for batch in alone]
        right, left_out = list[Candidate](), list[NotTimed]()
        for engine in tqdm(engines, f"{self.name}, checking logits", leave=False):
            for name, batches in self._batchings(engine, batch_tokens).items():
                try:
                    error = _largest_error(engine, batches(self.sample), expected)
                    if not error <= TOLERANCES[self.dtype]:
                        raise ValueError(f"wrong logits, off by {error:.1e} of the largest")
                except Exception as failure:
                    left_out.append(NotTimed(engine.provider, engine.setting, reason(failure)))
                else:
                    right.append(Candidate(engine, name, batches, error))
        return right, left_out

    def _batchings(self, engine: Engine, batch_tokens: tuple[int, ...]) -> dict[str, Batching]:
        if self.workload != SQUAD:
            return {"": lambda work: [Batch.of(work)]}
        if engine.provider == "dtbert":
            return {f"{tokens} tokens": functools.partial(token_batches, tokens) for tokens in batch_tokens}
        return {f"batch {size}": functools.partial(sized_batches, size) for size in _PEER_BATCH_SIZES}

    def _time(self, best: dict[str, tuple[float, Candidate]], effort: Effort) -> dict[str, dict[str, Any]]:
        contenders, rounds = [], effort.rounds
        for provider, (seconds, candidate) in best.items():
            batches = candidate.batches(self.work)
            # Every batch is timed, dealt out to the rounds so that each gets all lengths.
            dealt = [batches[first::rounds] for first in range(min(rounds, len(batches)))]
            shares = [sum(batch.tokens for batch in part) / self.tokens for part in dealt]
            wake = functools.partial(candidate.engine.run, Batch.of([self.work[0][:64]]))
            contenders.append(Contender(provider, [candidate.runs(part) for part in dealt], shares, wake, seconds))
        if not contenders:
            return {}
        if self.workload != SQUAD:
            rounds = rounds_within(contenders, rounds, effort.seconds)
        return measure(contenders, rounds, self.name)


def laggards(row: dict[str, Any]) -> dict[str, NotTimed]:
    """The providers that are too slow to be timed on more work than this row's."""
    fastest = min((result["ms"] for result in row["results"]), default=0.0)
    found = {}
    for result in row["results"]:
        if result["ms"] > _HOPELESS * fastest:
            why = f"took {result['ms'] / fastest:.1f} times as long as the fastest at {row['workload']}, in emulation"
            found[result["provider"]] = NotTimed(result["provider"], "", why)
    return found


def _largest_error(engine: Engine, batches: Sequence[Batch], expected: Sequence[Tensor]) -> float:
    """The largest error of the engine's logits, as a part of the largest logit."""
    found = [window for batch in batches for window in batch.windows_of(engine.run(batch))]
    scale = max(float(window.abs().max()) for window in expected)
    return max(float((got - want).abs().max()) for got, want in zip(found, expected, strict=True)) / scale


def _result(trials: Sequence[tuple[float, Candidate]], timed: dict[str, Any], base_ms: float | None) -> dict[str, Any]:
    chosen = min(trials, key=lambda entry: entry[0])[1]
    return {
        "provider": chosen.engine.provider,
        "setting": chosen.engine.setting,
        "batching": chosen.batching,
        "computes_in": chosen.engine.computes_in,
        "relative": None if base_ms is None else round(base_ms / timed["ms"], 3),
        **timed,
        "largest_error": float(f"{chosen.largest_error:.2g}"),
        "tried_ms": {candidate.name: round(seconds * 1e3, 3) for seconds, candidate in trials},
    }
