"""A backend that tells a watch of each step: which it is, in which layer, and how much work it is.

It stands in for the model's own backend, which it calls, so the encoder is profiled as it is.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args

import torch

from dtbert.kernels import SCORE_COSTS, Backend
from dtbert.model import BertForQuestionAnswering, PackedBatch, Policy, SpanLogits
from dtbert.model.work import StepWork, Work

# In the order in which a forward runs them; "other" is the time between steps: index lists, gathers.
StepName = Literal[
    "embeddings",
    "qkv",
    "attention",
    "significance",
    "selection",
    "attention_output",
    "intermediate",
    "output",
    "restore",
    "span_head",
    "other",
]
STEP_NAMES: tuple[StepName, ...] = get_args(StepName)

# What the steps are called here; a product has the name of its parameters.
_STEPS: dict[str, StepName | None] = {
    "embed": "embeddings",
    "linear": None,
    "keys_and_values": None,
    "queries": None,
    "attention": "attention",
    "scored_attention": "attention",
    "partial_attention": "attention",
    "significance": "significance",
    "select": "selection",
    "drop": "selection",
    "add_norm": None,
    "scatter": "restore",
}


class Watch(Protocol):
    """Is told when a layer and a step begin and end. ``work`` may wait for the device: call it after the forward."""

    def layer(self, index: int) -> AbstractContextManager[object]: ...

    def step(self, layer: int | None, name: StepName, work: Callable[[], Work]) -> AbstractContextManager[object]: ...


class _Watched:
    """A `Backend` with a watch around each step of another one.

    A layer begins with its first product and ends with its last; what runs between them is in it.
    """

    def __init__(self, backend: Backend, watch: Watch) -> None:
        self._backend, self._watch = backend, watch
        self._work = StepWork(SCORE_COSTS[backend.name])
        self._layer: int | None = None
        self._within = ExitStack()

    def __getattr__(self, step: str) -> Any:
        return partial(self._run, step) if step in _STEPS else getattr(self._backend, step)

    def _run(self, step: str, *args: Any) -> Any:
        name: StepName = _STEPS[step] or args[1].name
        if step == "queries" and not self._work.leaves_queries_out(args[0]):
            return getattr(self._backend, step)(*args)
        if name == "qkv" and step != "queries":
            self._layer = args[1].layer
            self._within.enter_context(self._watch.layer(args[1].layer))
        count = getattr(self._work, step)
        # A score may read segments, which waits for the device; the others must not hold on to tensors.
        work = partial(count, *args) if step == "significance" else partial(_known, count(*args))
        with self._watch.step(self._layer, name, work):
            result = getattr(self._backend, step)(*args)
        if name == "output":
            self._within.close()
            self._layer = None
        return result


def _known(work: Work) -> Work:
    return work


def watched_forward(
    model: BertForQuestionAnswering, batch: PackedBatch, schedule: Policy | None, watch: Watch
) -> SpanLogits:
    """`BertForQuestionAnswering.forward_packed` under a watch; call it in inference mode."""
    return model.forward_packed(batch, schedule, backend=cast(Backend, _Watched(model.backend, watch)))


class Clock:
    """Marks moments: CUDA events on the current stream of a GPU, else the host's own clock.

    Between two events lies also the time in which the GPU waits for the host to launch the next kernel.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to another, in seconds; waits until the device has passed the later one."""
        if self._device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    def time(self, call: Callable[[], object]) -> float:
        """The seconds that a call takes."""
        begin = self.mark()
        call()
        return self.seconds(begin, self.mark())


class Timed(NamedTuple):
    """A step between two marks; ``name`` is None for a whole layer."""

    layer: int | None
    name: StepName | None
    work: Callable[[], Work]
    begin: Any
    end: Any


class Stopwatch:
    """A `Watch` that marks the begin and the end of each layer and step of one forward."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.timed: list[Timed] = []

    def layer(self, index: int) -> AbstractContextManager[object]:
        return self.step(index, None, lambda: Work(0, 0))

    @contextmanager
    def step(self, layer: int | None, name: StepName | None, work: Callable[[], Work]) -> Iterator[None]:
        begin = self._clock.mark()
        yield
        self.timed.append(Timed(layer, name, work, begin, self._clock.mark()))

    def seconds(self, timed: Timed) -> float:
        return self._clock.seconds(timed.begin, timed.end)
