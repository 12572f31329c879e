"""Interleaved timing of short calls, by the processor time of their one thread.

It is the time on the clock where nobody else runs, and where others do it says what the call itself cost.
"""

import contextlib
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

from tqdm import tqdm

_WARM_UPS = 20
# A block of calls takes about this long.
_BLOCK_S = 0.05
_MOST_CALLS = 200


@dataclass(frozen=True)
class Contender:
    """A call to time, and what must be entered around each block of its calls."""

    name: str
    call: Callable[[], object]
    within: Callable[[], AbstractContextManager[object]] = contextlib.nullcontext


def measure(contenders: Sequence[Contender], rounds: int, title: str) -> dict[str, list[float]]:
    """Seconds a call of each contender, by name, one figure a round: the median of a block of calls."""
    counts = {contender.name: _calls(contender) for contender in contenders}
    seconds: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    gc.collect()
    gc.disable()
    try:
        for index in tqdm(range(rounds), desc=title, unit="round", leave=False):
            # Nobody always follows the same neighbour.
            first = index % len(contenders)
            for contender in (*contenders[first:], *contenders[:first]):
                seconds[contender.name].append(_block(contender, counts[contender.name]))
    finally:
        gc.enable()
    return seconds


def _calls(contender: Contender) -> int:
    _block(contender, _WARM_UPS)
    return max(1, min(_MOST_CALLS, int(_BLOCK_S / _block(contender, _WARM_UPS))))


def _block(contender: Contender, calls: int) -> float:
    seconds = []
    with contender.within():
        contender.call()
        for _ in range(calls):
            begin = time.thread_time()
            contender.call()
            seconds.append(time.thread_time() - begin)
    return statistics.median(seconds)
