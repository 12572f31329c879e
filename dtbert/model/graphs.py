"""CUDA graphs: the launches of a forward, recorded once for a bucket of batches, and repeated as one.

A small batch takes a GPU less time than the host takes to launch its kernels. A graph is launched at once. It runs the
same kernels in the same memory, so each batch is padded to the sizes of its bucket and copied there. With graphs every
batch runs so padded, whether it is replayed or not: a model repeats itself bit for bit.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from threading import Lock
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from dtbert.files import first_line
from dtbert.kernels import Backend, Packing
from dtbert.kernels.parameters import Linear
from dtbert.model.batch import PackedBatch
from dtbert.model.encoder import Encoder
from dtbert.model.padding import Bucket, PaddedInputs, Plan
from dtbert.model.policy import Policy
from dtbert.model.schedule import LengthSchedule
from dtbert.model.scorers import BUILT_IN_SCORERS

# Tokens of a batch at most: where nobody asked for graphs, and where somebody did. On an H200, 6 x 768 in bfloat16,
# graphs take 0.15 of the time of launches at 1 x 128, 0.5 at 8 x 384, 0.98 at 32 x 384, and about all of it beyond.
SMALL, LARGE = 16384, 32768
# Graphs at most of one model, and buckets that it remembers to have met.
MOST_GRAPHS, _MOST_MET = 32, 1024

logger = logging.getLogger(__name__)

Forward = Callable[[PackedBatch, Policy | None, Backend, Sequence[Packing] | None], Tensor]


class Recording(NamedTuple):
    """``replay`` launches what was recorded, and leaves its result in ``output``."""

    replay: Callable[[], object]
    output: Tensor


class Recorder(Protocol):
    """What graphs need of a device."""

    def busy(self) -> bool:
        """Whether somebody else records what is launched now."""
        ...

    def aside(self) -> AbstractContextManager[object]:
        """Within it, work waits for what was launched before, and what is launched after it waits for that."""
        ...

    def record(self, forward: Callable[[], Tensor]) -> Recording:
        """Run a forward once, to compile and allocate what it needs, then record it; within `aside`."""
        ...

    def follow(self) -> None:
        """What is launched from here on waits for the last replay, on whatever stream that was."""
        ...


class Graphs:
    """The graphs of a model that is ready for inference; several threads may call it.

    A bucket's first batch runs as ever, the second is recorded; of more graphs than ``most`` the one that was not used
    for longest goes. They share one pool of memory, so one runs at a time. Weights may change where they lie, but not
    move: they are looked at after each replay. Modules must stay, and so must torch's settings of precision.

    Args:
        encoder, head: what a forward runs.
        tokens: of a batch at most; larger ones are not padded.
        recorder: of the device that these are on.
        most: graphs at a time.
    """

    def __init__(
        self,
        encoder: Encoder,
        head: Linear,
        tokens: int,
        recorder: Recorder,
        most: int = MOST_GRAPHS,
    ) -> None:
        self._tokens, self._recorder, self._most = tokens, recorder, most
        self._positions = len(encoder.embeddings.position)
        self._lock = Lock()
        self._graphs: OrderedDict[Bucket, tuple[PaddedInputs, Recording]] = OrderedDict()
        self._met: OrderedDict[Bucket, None] = OrderedDict()
        self._failed = False
        called = (encoder, *encoder.layers)
        self._hooks = [hooks for module in called for hooks in (module._forward_pre_hooks, module._forward_hooks)]
        modules = (*encoder.modules(), head)
        slots = [(module._parameters, name) for module in modules for name in module._parameters]
        self._slots = cast(list[tuple[dict[str, Tensor], str]], slots)
        self._device = encoder.embeddings.position.device
        self._held, self._places = self._hold()

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(
        self, forward: Forward, batch: PackedBatch, schedule: Policy | None, backend: Backend
    ) -> Tensor | None:
        """What ``forward`` makes of a batch, ``[T, ...]``; None where the batch is not one for graphs.

        Raises:
            ValueError: as ``forward``.
        """
        packing = batch.packing
        if (
            self._failed
            or not 0 < packing.num_tokens <= self._tokens
            or packing.max_seqlen > self._positions
            or batch.input_ids.device != self._device
            or self._watched()
        ):
            return None
        # Somebody's own scorer is checked on the host, which waits for the device; so does a policy by which the text
        # decides.
        if schedule is not None and not (isinstance(schedule, LengthSchedule) and set(schedule.scorers) <= _BUILT_IN):
            return None
        plan = Plan.of(packing, schedule, self._positions)
        with self._lock:
            graph = self._graphs.get(plan.bucket)
            if graph is None and plan.bucket in self._met:
                graph = self._record(forward, batch, plan, backend)
                if graph is None:
                    return None
            if graph is not None:
                self._graphs.move_to_end(plan.bucket)
                logits = self._replay(*graph, batch, plan)
                if self._moved():
                    self._forget()
                    return None
                return logits
            self._met[plan.bucket] = None
            if len(self._met) > _MOST_MET:
                self._met.popitem(last=False)
        inputs = PaddedInputs(plan.bucket, self._device)
        inputs.fill(batch, plan)
        return _run(forward, inputs, plan, backend)[: packing.num_tokens]

    def _replay(self, inputs: PaddedInputs, recording: Recording, batch: PackedBatch, plan: Plan) -> Tensor:
        self._recorder.follow()
        inputs.fill(batch, plan)
        recording.replay()
        # The next replay writes there.
        return recording.output[: batch.packing.num_tokens].clone()

    def _record(
        self, forward: Forward, batch: PackedBatch, plan: Plan, backend: Backend
    ) -> tuple[PaddedInputs, Recording] | None:
        """A graph of a batch's bucket; None, and none from here on, where it cannot be recorded."""
        try:
            # Inference mode would mark memory that replays outside of it must not write.
            with self._recorder.aside(), torch.inference_mode(False), torch.no_grad():
                inputs = PaddedInputs(plan.bucket, self._device)
                inputs.fill(batch, plan)
                recording = self._recorder.record(lambda: _run(forward, inputs, plan, backend))
        except Exception as error:  # whatever a compiler, an allocator or a driver raises
            logger.warning("no CUDA graph could be recorded, so this model goes without: %s", first_line(error))
            self._failed = True
            self._forget()
            return None
        self._graphs[plan.bucket] = inputs, recording
        # After the new one came: a pool of memory goes with its last graph.
        if len(self._graphs) > self._most:
            left, _ = self._graphs.popitem(last=False)
            self._met.pop(left, None)
        return self._graphs[plan.bucket]

    def _watched(self) -> bool:
        """Whether somebody looks at the steps of a forward, or changes them: a replay would pass them by."""
        return bool(
            any(self._hooks)
            or nn.modules.module._has_any_global_hook()
            or torch._C._len_torch_dispatch_stack()
            or torch.is_autocast_enabled(self._device.type)
            or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
            or self._recorder.busy()
        )

    def _weights(self) -> list[Tensor]:
        return [parameters[name] for parameters, name in self._slots]

    def _hold(self) -> tuple[list[Tensor], list[int]]:
        """The weights, so that what graphs read stays there, and where they lie."""
        held = [weight.detach() for weight in self._weights()]
        return held, [weight.data_ptr() for weight in held]

    def _moved(self) -> bool:
        return [weight.data_ptr() for weight in self._weights()] != self._places

    def _forget(self) -> None:
        self._graphs.clear()
        self._met.clear()
        self._held, self._places = self._hold()


class CudaRecorder:
    """Records on a stream of its own, into one pool of memory."""

    # torch records one graph at a time.
    _recording = Lock()

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._last: torch.cuda.Stream | None = None

    def busy(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    @contextmanager
    def aside(self) -> Iterator[None]:
        self.follow()
        with self._recording, torch.cuda.device(self._device):
            current = torch.cuda.current_stream()
            self._stream.wait_stream(current)
            try:
                # Also where recording fails, which leaves torch's own block in the middle.
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                current.wait_stream(self._stream)

    def record(self, forward: Callable[[], Tensor]) -> Recording:
        # On this stream, so that cuBLAS has its handle and its memory for it.
        forward()
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate meanwhile.
        with torch.cuda.graph(graph, self._pool, self._stream, capture_error_mode="thread_local"):
            output = forward()
        return Recording(graph.replay, output)

    def follow(self) -> None:
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream


_BUILT_IN = frozenset(BUILT_IN_SCORERS)


def _run(forward: Forward, inputs: PaddedInputs, plan: Plan, backend: Backend) -> Tensor:
    batch, targets = inputs.batch(plan)
    return forward(batch, plan.bucket.schedule, backend, targets or None)
