"""Interleaved timing: every contender in turn, in blocks, round after round."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

# ONNX Runtime's threads spin for 55 ms after a call, torch's for 10 ms, OpenVINO's for 1 ms: without a pause they
# would take the cores from whoever is timed next.
PAUSE_S = 0.1
# A block of timed calls takes about this long, at most _MOST_CALLS.
_BLOCK_S = 0.3
_MOST_CALLS = 5
# Calls longer than this are woken up by a short one rather than by one of their own.
_LONG_S = 1.0
# Who takes this many times as long as the fastest is timed in a third of the rounds where rounds are long.
_SLOW = 1.5


@dataclass
class Contender:
    """Something to time: calls that do the whole work in one or more parts.

    Attributes:
        name: unique among the contenders.
        parts: one call each; round r times part r.
        shares: the share of the whole work in each part.
        wake: a short call that wakes up the contender's threads.
        estimate_s: seconds for the whole work.
    """

    name: str
    parts: Sequence[Callable[[], object]]
    shares: Sequence[float]
    wake: Callable[[], object]
    estimate_s: float

    @property
    def part_s(self) -> float:
        return self.estimate_s / len(self.parts)

    @property
    def calls(self) -> int:
        """Timed calls in a block."""
        return max(1, min(_MOST_CALLS, int(_BLOCK_S / self.part_s)))

    @property
    def long(self) -> bool:
        return self.part_s > _LONG_S

    @property
    def block_s(self) -> float:
        """Seconds for a block, with the call before it."""
        return (self.calls + (not self.long)) * self.part_s


def trial(call: Callable[[], object]) -> float:
    """Seconds of one call: the least of a block of calls, once the threads of others sleep."""
    time.sleep(PAUSE_S)
    least, begin = math.inf, time.perf_counter()
    for _ in range(_MOST_CALLS):
        start = time.perf_counter()
        call()
        end = time.perf_counter()
        least = min(least, end - start)
        if end - begin > _BLOCK_S:
            break
    return least


def rounds_within(contenders: Sequence[Contender], rounds: int, seconds: float) -> int:
    """How many rounds fit into the time: at most ``rounds``, and three where that allows."""
    cost = sum(PAUSE_S + c.block_s for c in contenders)
    return max(min(3, rounds), min(rounds, int(seconds / cost)))


def measure(
    contenders: Sequence[Contender], rounds: int, title: str, pause_s: float = PAUSE_S
) -> dict[str, dict[str, Any]]:
    """Time the contenders.

    Args:
        contenders: whatever they run on, they share this process.
        rounds: blocks of each contender.
        title: for the progress bar.
        pause_s: seconds before each block, in which the threads of the others go to sleep.

    Returns:
        By name: ``ms``, the median for the whole work over all timed calls; ``quartiles_ms``; ``samples``.
    """
    samples: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    rare = _timed_rarely(contenders)
    gc.collect()
    gc.disable()
    try:
        with tqdm(total=rounds * len(contenders), desc=title, unit="block", leave=False) as bar:
            for index in range(rounds):
                # Nobody always follows the same neighbour.
                first = index % len(contenders)
                for contender in (*contenders[first:], *contenders[:first]):
                    if index % 3 == 0 or contender.name not in rare:
                        time.sleep(pause_s)
                        samples[contender.name] += _block(contender, index)
                    bar.update()
    finally:
        gc.enable()
    return {name: _summary(seconds) for name, seconds in samples.items()}


def _timed_rarely(contenders: Sequence[Contender]) -> set[str]:
    limit = _SLOW * min(contender.estimate_s for contender in contenders)
    return {c.name for c in contenders if c.estimate_s > limit and c.long}


def _block(contender: Contender, index: int) -> list[float]:
    place = index % len(contender.parts)
    call, share, seconds = contender.parts[place], contender.shares[place], []
    (contender.wake if contender.long else call)()
    for _ in range(contender.calls):
        start = time.perf_counter()
        call()
        seconds.append((time.perf_counter() - start) / share)
    return seconds


def _summary(seconds: Sequence[float]) -> dict[str, Any]:
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 3
    low, median, high = (round(value * 1e3, 3) for value in quartiles)
    return {"ms": median, "quartiles_ms": [low, high], "samples": len(seconds)}
