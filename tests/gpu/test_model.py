"""The whole model on the kernels: against transformers, with and without dropping, compiled and exported."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from dtbert.model import BertForQuestionAnswering, LengthSchedule, PackedBatch, Packing
from dtbert.weights import convert, load_model
from tests.gpu.cases import relative_error
from tests.peer import make_config, make_dtbert, make_peer
from tests.tolerances import assert_as_right_as_peer

pytestmark = pytest.mark.gpu

HALF = [pytest.param(torch.bfloat16, id="bf16"), pytest.param(torch.float16, id="fp16")]
# Half precision is held to a multiple of the error that the peer itself makes in it.
MULTIPLE = 2.0
FLOAT32_BOUND = 2e-5
LENGTHS = [384, 128, 1, 200, 57]
RATIOS = (0.9, 0.8, 0.7, 0.5, 0.3, 0.1)


@pytest.fixture(scope="module")
def peer() -> transformers.BertForQuestionAnswering:
    """6 layers of 768, random weights, attention far from uniform."""
    config = make_config(layers=6, heads=12, head_size=64, feed_forward=3072, vocab_size=2000)
    return make_peer(config)


def own(peer: transformers.BertForQuestionAnswering, dtype: torch.dtype, backend: Any = None) -> Any:
    return make_dtbert(peer, backend=backend, blocked=False).to("cuda", dtype)


def on_gpu(peer: transformers.BertForQuestionAnswering, dtype: torch.dtype) -> Any:
    return copy.deepcopy(peer).to("cuda", dtype)


def random_batch(lengths: list[int], vocab_size: int = 2000) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(100, vocab_size, (length,), generator=generator).tolist() for length in lengths]
    segments = [[int(3 * i >= length) for i in range(length)] for length in lengths]
    return PackedBatch.from_lists(ids, segments, "cuda")


def logits(model: BertForQuestionAnswering, batch: PackedBatch, schedule: LengthSchedule | None = None) -> Tensor:
    return torch.stack(model.forward_packed(batch, schedule), -1)


def transformers_logits(model: transformers.BertForQuestionAnswering, batch: PackedBatch) -> Tensor:
    """Sequence by sequence, so that nothing is padded."""
    found = []
    ids_and_segments = (ids.split(batch.packing.seqlens) for ids in (batch.input_ids, batch.token_type_ids))
    for ids, segments in zip(*ids_and_segments, strict=True):
        out = model(input_ids=ids[None], token_type_ids=segments[None])
        found.append(torch.stack([out.start_logits[0], out.end_logits[0]], -1))
    return torch.cat(found)


def assert_no_worse_than_peer(got: Tensor, peers: Tensor, exact: Tensor) -> None:
    assert relative_error(got, exact) <= MULTIPLE * relative_error(peers, exact)


def test_model_on_a_gpu_uses_the_kernels() -> None:
    assert load_model(device="cuda", dtype=torch.bfloat16).backend_name == "triton"


@pytest.mark.parametrize("lengths", [[128], [384], [384] * 8, LENGTHS], ids=["1x128", "1x384", "8x384", "mixed"])
@pytest.mark.parametrize("dtype", HALF)
@torch.inference_mode()
def test_half_precision_error_is_at_most_twice_that_of_transformers(
    peer: transformers.BertForQuestionAnswering, lengths: list[int], dtype: torch.dtype
) -> None:
    batch = random_batch(lengths)
    got = logits(own(peer, dtype), batch)
    exact = transformers_logits(on_gpu(peer, torch.float32), batch)
    peers = transformers_logits(on_gpu(peer, dtype), batch)
    assert_no_worse_than_peer(got, peers, exact)


@pytest.mark.parametrize("dtype", HALF)
@torch.inference_mode()
def test_shipped_model_in_half_precision_is_at_most_twice_as_wrong_as_transformers(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = convert(None, tmp_path / "shipped")
    load = transformers.BertForQuestionAnswering.from_pretrained
    batch = random_batch(LENGTHS, 30000)
    exact = transformers_logits(load(folder, dtype=torch.float32).cuda(), batch)
    peers = transformers_logits(load(folder, dtype=dtype).cuda(), batch)
    assert_no_worse_than_peer(logits(load_model(device="cuda", dtype=dtype), batch), peers, exact)


@torch.inference_mode()
def test_float32_agrees_with_transformers(peer: transformers.BertForQuestionAnswering) -> None:
    batch = random_batch(LENGTHS)
    theirs, exact = (transformers_logits(on_gpu(peer, dtype), batch) for dtype in (torch.float32, torch.float64))
    assert_as_right_as_peer([logits(own(peer, torch.float32), batch)], [theirs], [exact])


@pytest.mark.parametrize(
    "scorer",
    [
        "received",
        "cls",
        "from_question",
        "value_norm",
        "received_max",
        "answer",
        "overlap",
        "answer_overlap",
        "answer_overlap_4",
        "random",
    ],
)
@torch.inference_mode()
def test_float32_with_dropping_agrees_with_the_reference(
    peer: transformers.BertForQuestionAnswering, scorer: str
) -> None:
    batch, schedule = random_batch(LENGTHS), LengthSchedule.ratios(RATIOS, scorer=scorer, keep_cls=True)
    got = logits(own(peer, torch.float32), batch, schedule)
    want = logits(own(peer, torch.float32, "reference"), batch, schedule)
    assert relative_error(got, want) <= FLOAT32_BOUND


@pytest.mark.parametrize("dtype", HALF)
@torch.inference_mode()
def test_half_precision_with_dropping_is_at_most_twice_as_wrong_as_the_reference(
    peer: transformers.BertForQuestionAnswering, dtype: torch.dtype
) -> None:
    # The scorer "random" drops the same tokens whatever the dtype, so that rounding alone differs.
    batch, schedule = random_batch(LENGTHS), LengthSchedule.ratios(RATIOS, scorer="random")
    exact = logits(own(peer, torch.float32, "reference"), batch, schedule)
    peers = logits(own(peer, dtype, "reference"), batch, schedule)
    assert_no_worse_than_peer(logits(own(peer, dtype), batch, schedule), peers, exact)


@torch.inference_mode()
def test_model_repeats_bit_for_bit(peer: transformers.BertForQuestionAnswering) -> None:
    model, batch, schedule = own(peer, torch.bfloat16), random_batch(LENGTHS), LengthSchedule.ratios(RATIOS)
    first = logits(model, batch, schedule)
    assert all(torch.equal(logits(model, batch, schedule), first) for _ in range(5))


@pytest.mark.parametrize("schedule", [None, LengthSchedule.ratios(RATIOS, scorer="cls")], ids=["all", "dropping"])
@torch.inference_mode()
def test_compiled_model_agrees_with_itself(
    peer: transformers.BertForQuestionAnswering, schedule: LengthSchedule | None
) -> None:
    model, batch = own(peer, torch.float32), random_batch([120, 64])
    torch.compiler.reset()
    compiled = torch.compile(model.forward_packed)
    for _ in range(2):
        got = torch.stack(compiled(batch, schedule), -1)
        assert relative_error(got, logits(model, batch, schedule)) <= FLOAT32_BOUND


class Packed(nn.Module):
    """`forward_packed` from tensors alone, as an exporter wants it; the lengths are part of the program."""

    def __init__(self, model: BertForQuestionAnswering, seqlens: tuple[int, ...]) -> None:
        super().__init__()
        self.model, self.seqlens = model, seqlens

    def forward(
        self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor, cu_seqlens: Tensor
    ) -> tuple[Tensor, Tensor]:
        batch = PackedBatch(input_ids, token_type_ids, position_ids, Packing(self.seqlens, cu_seqlens))
        start, end = self.model.forward_packed(batch)
        return start, end


@torch.no_grad()
def test_exported_model_agrees_with_itself(peer: transformers.BertForQuestionAnswering) -> None:
    model, batch = own(peer, torch.float32), random_batch([120, 64])
    arguments = (batch.input_ids, batch.token_type_ids, batch.position_ids, batch.packing.cu_seqlens)
    program = torch.export.export(Packed(model, batch.packing.seqlens).eval(), arguments)
    assert any("dtbert.attention" in str(node.target) for node in program.graph.nodes)
    assert relative_error(torch.stack(program.module()(*arguments), -1), logits(model, batch)) <= FLOAT32_BOUND
