"""Interleaved timing on a device: every contender in turn, in blocks, round after round."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from bench.checkpoints import reason
from torch import Tensor

from dtbert.profiling.watch import Clock

# How calls follow each other. ``replayed``: captured in a CUDA graph, so that no launch from Python lies between
# kernels; ``called``: one after another, as a program would; ``awaited``: each call waits for the device.
Launch = Literal["replayed", "called", "awaited"]

_WARM_UPS = 3
_MOST_CALLS = 500
# Even when the time is up.
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Contender:
    """Something to time.

    Attributes:
        name: unique in its row.
        run: does the work once on input set i; the sets together are larger than every cache.
        view: from what ``run`` returns to the tensor that must agree with ``expected``.
        expected: the right result for input set 0, or None where there is nothing to compare with.
        extra: fields for its result.
    """

    name: str
    run: Callable[[int], Any]
    view: Callable[[Any], Tensor] = lambda out: out
    expected: Tensor | None = None
    extra: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Effort:
    """Rounds of blocks, about ``block_s`` seconds each, and the moment (`time.monotonic`) by which all must end."""

    rounds: int
    block_s: float
    deadline: float

    @property
    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()


def compare(
    contenders: Sequence[Contender],
    device: torch.device,
    effort: Effort,
    *,
    sets: int = 1,
    launch: Launch = "called",
    tolerance: float = 2e-2,
) -> dict[str, Any]:
    """Check and time the contenders, interleaved.

    Args:
        sets: how many input sets they take.
        launch: how calls follow each other; on a CPU nothing can be replayed.
        tolerance: how far from what is expected a result may be, by the norm of the difference.

    Returns:
        ``results``, by contender: ``ms`` (median over the blocks), ``quartiles_ms``, ``blocks``, ``calls`` (in each),
        ``launch``, ``relative_error``; and ``not_timed``, those that fail or are wrong, with the reason.
    """
    results, not_timed, blocks = [], [], []
    for contender in contenders:
        try:
            error = _error(contender, tolerance)
            blocks.append(_Blocks(contender, device, effort, sets, launch))
        except Exception as failure:
            not_timed.append({"provider": contender.name, "reason": reason(failure)})
            if "CUDA error" in str(failure):
                raise
        else:
            results.append({"provider": contender.name, "relative_error": error, **dict(contender.extra)})
    _time(blocks, effort)
    for result, block in zip(results, blocks, strict=True):
        result |= block.summary()
    return {"results": results, "not_timed": not_timed}


def _time(blocks: Sequence["_Blocks"], effort: Effort) -> None:
    gc.collect()
    gc.disable()
    try:
        for index in range(effort.rounds):
            if index >= _FEWEST_ROUNDS and effort.seconds_left < 0:
                break
            # Nobody always follows the same neighbour.
            first = index % max(1, len(blocks))
            for block in (*blocks[first:], *blocks[:first]):
                block.time()
    finally:
        gc.enable()


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``, Euclidean norms in float64; NaN counts as infinitely wrong."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    return math.inf if math.isnan(error) else error


def _error(contender: Contender, tolerance: float) -> float | None:
    got = contender.view(contender.run(0))
    if contender.expected is None:
        return None
    error = relative_error(got, contender.expected)
    if not error <= tolerance:
        raise ValueError(f"wrong result, off by {error:.1e} of its norm")
    return float(f"{error:.2g}")


class _Blocks:
    """The blocks of one contender: warmed up, captured where wanted, and sized."""

    def __init__(self, contender: Contender, device: torch.device, effort: Effort, sets: int, launch: Launch) -> None:
        self._run, self._sets, self._clock = contender.run, sets, Clock(device)
        self._device, self._turn = device, 0
        self._seconds: list[float] = []
        self.launch: Launch = "called" if launch == "replayed" and device.type != "cuda" else launch
        for index in range(max(sets, _WARM_UPS)):
            self._run(index % sets)
        self._graph: torch.cuda.CUDAGraph | None = None
        if self.launch == "replayed":
            try:
                self._graph = self._capture()
            except RuntimeError:
                self.launch = "called"
        self._calls = 1
        # A replay is a run on each of the sets.
        seconds = self._once() * (1 if self._graph is None else sets)
        self._calls = max(1, min(_MOST_CALLS, int(effort.block_s / seconds)))

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        stream = torch.cuda.current_stream(self._device)
        try:
            with torch.cuda.graph(graph):
                for index in range(self._sets):
                    self._run(index)
        finally:
            # A capture that fails leaves its own stream as the current one.
            torch.cuda.set_stream(stream)
        graph.replay()
        return graph

    def time(self) -> None:
        self._seconds.append(self._once())

    def _once(self) -> float:
        """Seconds a call, over one block."""
        if self.launch == "awaited":
            return self._awaited()
        begin = self._clock.mark()
        for _ in range(self._calls):
            if self._graph is None:
                self._run(self._turn % self._sets)
                self._turn += 1
            else:
                self._graph.replay()
        seconds = self._clock.seconds(begin, self._clock.mark()) / self._calls
        return max(seconds / (1 if self._graph is None else self._sets), 1e-9)

    def _awaited(self) -> float:
        samples = []
        for index in range(self._calls):
            begin = time.perf_counter()
            self._run(index % self._sets)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            samples.append(time.perf_counter() - begin)
        return statistics.median(samples)

    def summary(self) -> dict[str, Any]:
        seconds = self._seconds
        quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else seconds * 3
        low, median, high = (float(f"{value * 1e3:.5g}") for value in quartiles)
        calls = self._calls * (1 if self._graph is None else self._sets)
        timed = {"ms": median, "quartiles_ms": [low, high], "blocks": len(seconds), "calls": calls}
        return {**timed, "launch": self.launch}


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Bytes allocated at the most during a call, beyond what was there before; None on a CPU, which does not tell."""
    if device.type != "cuda":
        return None
    call()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    kept = call()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before
