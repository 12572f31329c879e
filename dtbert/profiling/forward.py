"""Measure a forward step by step: how long each takes, over several repeats, and what work that was."""

import json
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from dtbert.model import BertForQuestionAnswering, PackedBatch, Policy
from dtbert.model.work import Work
from dtbert.profiling.ceilings import Bound, Ceilings
from dtbert.profiling.watch import STEP_NAMES, Clock, StepName, Stopwatch, watched_forward

_WARM_UP = 2
_TRACED = 3


class Spread(NamedTuple):
    """Seconds: the median of the repeats, and the 10th and the 90th percentile."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: tuple[float, ...]) -> "Spread":
        if len(seconds) == 1:
            return cls(*seconds * 3)
        tenths = quantiles(seconds, n=10, method="inclusive")
        return cls(median(seconds), tenths[0], tenths[-1])


@dataclass(frozen=True)
class Calls:
    """Some calls within a forward: the work of each, and the seconds of all together, one entry per repeat."""

    works: tuple[Work, ...]
    seconds: tuple[float, ...]

    @property
    def calls(self) -> int:
        return len(self.works)

    @property
    def work(self) -> Work:
        return Work(sum(work.flops for work in self.works), sum(work.bytes for work in self.works))

    @property
    def spread(self) -> Spread:
        return Spread.of(self.seconds)

    def limit(self, ceilings: Ceilings) -> float:
        """The least seconds that the calls take, one after another."""
        return sum(ceilings.seconds(work) for work in self.works)

    def reached(self, ceilings: Ceilings) -> float | None:
        """The limit's seconds as a part of the median; None for time that is no step's.

        Above 1 where the data stays in a cache that the large copy outgrows.
        """
        return self.limit(ceilings) / self.spread.median if self.works and self.spread.median else None

    def bound(self, ceilings: Ceilings) -> Bound | None:
        """What limits the calls together; None for time that is no step's."""
        return ceilings.bound(self.work) if self.works else None

    @classmethod
    def total(cls, parts: Iterable["Calls"]) -> "Calls":
        parts = list(parts)
        works = tuple(work for part in parts for work in part.works)
        return cls(works, tuple(map(sum, zip(*(part.seconds for part in parts), strict=True))))


StepKey = tuple[int | None, StepName]


@dataclass(frozen=True)
class ForwardProfile:
    """One forward, taken apart.

    Attributes:
        schedule: the tokens that each layer kept; None for all.
        tokens: tokens of the whole batch that entered the first layer, then those that left each layer.
        steps: by layer (None: outside of the layers) and step, in the order in which they run.
        seconds: the whole forward, left alone, one entry per repeat.
        watched_seconds: the whole forward while its steps were timed; the difference is what timing costs.
        peak_bytes: memory of tensors that the forward allocated, at its peak; weights not included.
    """

    schedule: Policy | None
    tokens: tuple[int, ...]
    steps: dict[StepKey, Calls]
    seconds: tuple[float, ...]
    watched_seconds: tuple[float, ...]
    peak_bytes: int

    def by_step(self) -> dict[StepName, Calls]:
        """Each step in all layers together."""
        names = [name for name in STEP_NAMES if any(step == name for _, step in self.steps)]
        return {name: Calls.total(self.steps[key] for key in self.steps if key[1] == name) for name in names}

    def by_layer(self) -> dict[int | None, Calls]:
        """All steps of each layer together, last, under None, what lies outside of them."""
        layers = [*range(len(self.tokens) - 1), None]
        return {layer: Calls.total(self.steps[key] for key in self.steps if key[0] == layer) for layer in layers}

    def total(self) -> Calls:
        return Calls.total(self.steps.values())


def profile_forwards(
    model: BertForQuestionAnswering,
    batch: PackedBatch,
    schedules: Sequence[Policy | None],
    repeats: int,
    progress: Callable[[], object] = lambda: None,
) -> list[ForwardProfile]:
    """Profile a packed batch at each of the schedules, their repeats taken in turn.

    Args:
        model: ready for inference.
        batch: on the model's device.
        schedules: None stands for a forward that drops nothing.
        repeats: how often each forward runs untimed, and as often step by step, after a warm-up of 2.
        progress: called after each repeat.

    Raises:
        ValueError: as the model's own call; or no repeats.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    schedules = [None if one is None else one.resolve(model.config.own_scorer) for one in schedules]
    clock = Clock(model.device)
    runs: list[list[tuple[float, float, Stopwatch]]] = [[] for _ in schedules]
    with torch.inference_mode():
        peaks = [peak_memory(model, batch, schedule) for schedule in schedules]
        tokens = [_tokens(model, batch, schedule) for schedule in schedules]
        for schedule in [*schedules] * _WARM_UP:
            _run_twice(model, batch, schedule, clock)
        for _ in range(repeats):
            for found, schedule in zip(runs, schedules, strict=True):
                found.append(_run_twice(model, batch, schedule, clock))
            progress()
    profiles = []
    for schedule, left, found, peak in zip(schedules, tokens, runs, peaks, strict=True):
        whole, watched, watches = zip(*found, strict=True)
        steps = _steps(watches, watched)
        profiles.append(ForwardProfile(schedule, left, steps, whole, watched, peak))
    return profiles


def _run_twice(
    model: BertForQuestionAnswering, batch: PackedBatch, schedule: Policy | None, clock: Clock
) -> tuple[float, float, Stopwatch]:
    """Seconds of a forward that is left alone, and of one that is watched; and that one's watch."""
    watch = Stopwatch(clock)
    whole = clock.time(lambda: model.forward_packed(batch, schedule))
    return whole, clock.time(lambda: watched_forward(model, batch, schedule, watch)), watch


def peak_memory(model: BertForQuestionAnswering, batch: PackedBatch, schedule: Policy | None) -> int:
    """Bytes of tensors that one forward allocates at its peak.

    On a GPU the caching allocator's own count. On a CPU the count of torch's allocator; what oneDNN and BLAS take for
    themselves is not in it.
    """
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
        torch.cuda.reset_peak_memory_stats(model.device)
        before = torch.cuda.memory_allocated(model.device)
        model.forward_packed(batch, schedule)
        return torch.cuda.max_memory_allocated(model.device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        model.forward_packed(batch, schedule)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "memory.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text("utf-8"))["traceEvents"]
    memory = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    peak = allocated = 0
    for _, size in memory:
        allocated += size
        peak = max(peak, allocated)
    return peak


def write_trace(
    model: BertForQuestionAnswering, batch: PackedBatch, schedules: Sequence[Policy | None], path: Path
) -> None:
    """Write a Chrome trace of 3 forwards at each schedule, with a named range for each forward, layer and step.

    Perfetto (ui.perfetto.dev) and chrome://tracing open it.
    """
    activities = [ProfilerActivity.CPU]
    if model.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with torch.inference_mode():
        for schedule in schedules:
            watched_forward(model, batch, schedule, _Ranges())
        with profile(activities=activities, record_shapes=True) as profiler:
            for schedule in [*schedules] * _TRACED:
                with record_function("forward, nothing dropped" if schedule is None else "forward, tokens dropped"):
                    watched_forward(model, batch, schedule, _Ranges())
                    if model.device.type == "cuda":
                        torch.cuda.synchronize(model.device)
    profiler.export_chrome_trace(str(path))


class _Ranges:
    """A `Watch` that makes each layer and step a named range of the profiler's."""

    def layer(self, index: int) -> AbstractContextManager[object]:
        return record_function(f"layer {index}")

    def step(self, layer: int | None, name: StepName, work: Callable[[], Work]) -> AbstractContextManager[object]:
        return record_function(name if layer is None else f"layer {layer}: {name}")


def _tokens(model: BertForQuestionAnswering, batch: PackedBatch, schedule: Policy | None) -> tuple[int, ...]:
    kept = model.forward_packed(batch, schedule, output_kept=True).kept
    return (batch.packing.num_tokens, *(sum(layer.lengths) for layer in kept))


def _steps(watches: Sequence[Stopwatch], watched: Sequence[float]) -> dict[StepKey, Calls]:
    seconds = [_step_seconds(watch, whole) for watch, whole in zip(watches, watched, strict=True)]
    works: dict[StepKey, list[Work]] = {key: [] for key in seconds[0]}
    for timed in watches[0].timed:
        if timed.name is not None:
            works[timed.layer, timed.name].append(timed.work())
    return {key: Calls(tuple(works[key]), tuple(one[key] for one in seconds)) for key in seconds[0]}


def _step_seconds(watch: Stopwatch, whole: float) -> dict[StepKey, float]:
    """Seconds of each step of one forward; "other" is what is left of each layer, and of the whole forward."""
    seconds: dict[StepKey, float] = {}
    left: dict[int | None, float] = {None: whole}
    for timed in watch.timed:
        passed = watch.seconds(timed)
        if timed.name is None:
            left[timed.layer] = left.get(timed.layer, 0.0) + passed
            left[None] -= passed
        else:
            key = timed.layer, timed.name
            seconds[key] = seconds.get(key, 0.0) + passed
            left[timed.layer] = left.get(timed.layer, 0.0) - passed
    ordered = sorted(left, key=lambda layer: (layer is None, layer or 0))
    # Two clock readings apart, so a remainder may come out a little below nothing.
    return seconds | {(layer, "other"): max(0.0, left[layer]) for layer in ordered}
