"""A stand-in for a device that records: what it replays is run anew, with what Python knew when it was recorded."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from threading import Barrier, BrokenBarrierError, Lock

import torch
from torch import Tensor

from dtbert.model.graphs import Recording


class StandIn:
    """Counts what is recorded and replayed; two replays at a time are an error."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0
        self.occupied = False
        self._one = Lock()

    def busy(self) -> bool:
        return self.occupied

    def aside(self) -> AbstractContextManager[object]:
        return nullcontext()

    def record(self, forward: Callable[[], Tensor]) -> Recording:
        self.recorded += 1
        output = torch.full_like(forward(), float("nan"))

        def replay() -> None:
            assert self._one.acquire(blocking=False), "two replays share their memory"
            self.replayed += 1
            output.copy_(forward())
            self._one.release()

        return Recording(replay, output)

    def follow(self) -> None:
        pass


def meet(barrier: Barrier) -> bool:
    """Whether others came to the barrier in time."""
    try:
        barrier.wait(0.05)
    except BrokenBarrierError:
        return False
    return True
