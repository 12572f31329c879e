"""What is recorded of a forward on a GPU: nothing comes from the host, nothing waits for the device; no GPU is needed.

Tensors are on ``meta``, which is neither the host nor a device that computes, and no kernel runs.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dtbert.kernels import Packing, backend
from dtbert.kernels.triton import INTERPRETED, Triton, launch
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.model.graphs import Graphs
from dtbert.model.padding import PaddedInputs, Plan
from dtbert.model.scorers import BUILT_IN_SCORERS
from tests.graphs import StandIn

CONFIG = BertConfig(hidden_size=64, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128, vocab_size=50)
LENGTHS = [40, 7, 70]
META = torch.device("meta")
# Their result is on the host, or as long as the values on the device say.
WAITING = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_numpy",
    "equal",
    "masked_select",
    "_unique2",
    "is_nonzero",
    "unique_dim",
}


class Recorded(TorchDispatchMode):
    """Fails where an operation takes or makes a tensor on the host, or waits for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, f"{func} waits for the device"
        if name == "index":
            assert all(index is None or index.dtype != torch.bool for index in args[1]), f"{func} waits for the device"
        if name == "repeat_interleave":
            assert (kwargs or {}).get("output_size") is not None, f"{func} waits for the device"
        kwargs = kwargs or {}
        assert kwargs.get("device", META) == META, f"{func} has a tensor on the host"
        result = func(*args, **kwargs)
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, Tensor):
                assert value.device.type == "meta", f"{func} has a tensor on the host"
        return result


@contextmanager
def recorded() -> Iterator[None]:
    # No mode sees how torch makes a tensor of Python's numbers.
    with mock.patch.object(torch, "tensor", side_effect=AssertionError("numbers are on the host")), Recorded():
        yield


@pytest.fixture(autouse=True)
def _some_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    assert not INTERPRETED
    monkeypatch.setattr(triton.JITFunction, "run", lambda *args, **options: None)
    monkeypatch.setattr(launch, "_one_gpu", lambda: True)
    monkeypatch.setattr(backend, "_why_not_triton", lambda device, sizes: None)
    with launch.pretending("sm_90"):
        yield


def make_model() -> BertForQuestionAnswering:
    with torch.device("meta"):
        model = BertForQuestionAnswering(CONFIG, backend="triton").requires_grad_(False)
    assert type(model.backend) is Triton
    return model


def make_batch(lengths: list[int]) -> PackedBatch:
    rows = [torch.zeros(sum(lengths), dtype=torch.int64, device="meta") for _ in range(3)]
    offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32, device="meta")
    return PackedBatch(*rows, Packing(lengths, offsets), id_ranges=([0] * 3, [0] * 3))


def schedules() -> list[LengthSchedule | None]:
    found: list[LengthSchedule | None] = [None, LengthSchedule.absolute([50, 20, 3], keep_cls=True, keep_question=True)]
    return found + [LengthSchedule.ratios([1, 0.5, 0.1], scorer=scorer) for scorer in BUILT_IN_SCORERS]


@pytest.mark.parametrize(
    "schedule", schedules(), ids=lambda one: one.scorer if one and one.kind == "ratios" else str(one and one.kind)
)
def test_recorded_forward_stays_on_the_device(schedule: LengthSchedule | None) -> None:
    model, batch = make_model(), make_batch(LENGTHS)
    plan = Plan.of(batch.packing, schedule, 512)
    inputs = PaddedInputs(plan.bucket, torch.device("meta"))
    inputs.fill(batch, plan)
    with recorded():
        padded, targets = inputs.batch(plan)
        logits = model._forward(padded, plan.bucket.schedule, model.backend, targets or None)
    assert logits.shape == (plan.bucket.tokens, 2)
    assert logits.device.type == "meta"


class Transfers(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        devices = {x.device.type for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)}
        self.count += len(devices) > 1
        return result


@pytest.mark.parametrize("schedule", [None, LengthSchedule.ratios([0.9, 0.5, 0.1])], ids=["all", "dropping"])
def test_a_batch_is_put_in_with_one_transfer(schedule: LengthSchedule | None) -> None:
    batch = make_batch(LENGTHS)
    plan = Plan.of(batch.packing, schedule, 512)
    inputs = PaddedInputs(plan.bucket, torch.device("meta"))
    with Transfers() as transfers:
        inputs.fill(batch, plan)
    assert transfers.count == 1


def test_graphs_walk_the_whole_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: False)
    model, recorder = make_model(), StandIn()
    model._graphs = Graphs(model.encoder, model.span, 2048, recorder)
    for lengths in (LENGTHS, [60, 1, 60], [50, 12, 50, 2]):
        batch = make_batch(lengths)
        for schedule in (None, LengthSchedule.ratios([0.9, 0.5, 0.1], scorer="answer_overlap", keep_cls=True)):
            start, end = model.forward_packed(batch, schedule)
            assert start.shape == end.shape == (sum(lengths),)
            assert start.device.type == "meta"
    assert (recorder.recorded, recorder.replayed) == (2, 4)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.sum().item(),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.ones(3),
        lambda x: torch.tensor([1, 2, 3], device="meta") + x,
        lambda x: x.repeat_interleave(x),
        lambda x: bool((x > 0).any()),
    ],
)
def test_what_must_not_be_recorded_is_noticed(operation: Callable[[Tensor], object]) -> None:
    x = torch.ones(3, dtype=torch.int64, device="meta")
    with recorded(), pytest.raises(AssertionError, match=r"on the host|waits for the device"):
        operation(x)
