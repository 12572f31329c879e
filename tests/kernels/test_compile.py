"""The attention step in a graph of torch.compile, and without a look at what tensors on a device hold."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dtbert.kernels import ATTENTION_SCORES, Backend, Kept, Packing, attention, attention_significance
from dtbert.kernels.rectangle import packed_attention
from dtbert.kernels.triton.launch import pretending
from tests.kernels.packings import packing

N, H = 3, 24
LENGTHS = [[5, 0, 4], [16, 1, 3, 11], [0, 3], [7]]


def qkv_of(tokens: int) -> Tensor:
    return torch.randn(tokens, 3 * H)


@pytest.mark.parametrize("score", ATTENTION_SCORES)
@pytest.mark.parametrize("lengths", [*LENGTHS, [], [0]], ids=str)
@pytest.mark.parametrize("bound", [16, 23])
def test_lengths_that_stay_on_the_device_give_the_same_numbers(lengths: list[int], score: str, bound: int) -> None:
    known = packing(lengths)
    qkv, segments = qkv_of(known.num_tokens), torch.arange(known.num_tokens) % 3 // 2
    unknown = Packing.on_device(known.cu_seqlens, known.num_tokens, bound)
    context, significance = packed_attention(qkv, unknown, N, score, segments)
    torch.testing.assert_close(context, Backend().attention(qkv, known, N), atol=1e-5, rtol=1e-5)
    want = Backend().significance(qkv, known, N, score, segments)
    torch.testing.assert_close(significance, want, atol=1e-5, rtol=1e-5)


def test_chosen_queries_have_the_context_that_they_have_among_all() -> None:
    known, qkv, rows = packing([5, 0, 4]), qkv_of(9), torch.tensor([1, 4, 5])
    unknown = Packing.on_device(known.cu_seqlens, 9, 8)
    context, _ = packed_attention(qkv, unknown, N, queries=rows)
    want = Backend().attention(qkv, known, N, Kept(rows, packing([2, 0, 1])))
    torch.testing.assert_close(context, want, atol=1e-5, rtol=1e-5)


def test_wrong_lengths_touch_nothing_outside_the_tensors() -> None:
    for offsets in ([0, 3, 7], [0, 90, 5], [4, 2, 9], [0, 9, 30]):
        unknown = Packing.on_device(torch.tensor(offsets, dtype=torch.int32), 9, 4)
        context, significance = packed_attention(qkv_of(9), unknown, N, "received")
        assert (context.shape, significance.shape) == ((9, H), (9,))


def test_step_is_one_graph_for_all_lengths_within_the_bound() -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    step = torch.compile(
        lambda qkv, offsets: attention(qkv, offsets, 16, N, significance="received"),
        fullgraph=True,
        dynamic=True,
        backend=count,
    )
    for lengths in ([7, 0, 4], [16, 1, 3, 11]):
        known = packing(lengths)
        qkv = qkv_of(known.num_tokens)
        want = Backend().scored_attention(qkv, known, N, "received")
        torch.testing.assert_close(step(qkv, known.cu_seqlens), want, atol=1e-5, rtol=1e-5)
    assert len(graphs) == 1


def test_step_in_a_graph_is_differentiable() -> None:
    known, qkv = packing([5, 0, 4]), qkv_of(9).requires_grad_()
    compiled = torch.compile(lambda qkv, offsets: attention(qkv, offsets, 8, N)[0], fullgraph=True, backend="eager")
    gradients = [
        torch.autograd.grad(context.square().sum(), qkv)[0]
        for context in (compiled(qkv, known.cu_seqlens), Backend().attention(qkv, known, N))
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


class OnGpu(torch.nn.Module):
    def forward(self, qkv: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attention(qkv, cu_seqlens, 16, N, significance="received")[0]


def test_graph_for_a_gpu_has_the_kernel() -> None:
    with pretending("sm_90"), FakeTensorMode(), torch.no_grad():
        qkv, offsets = torch.zeros(9, 3 * H, device="cuda"), torch.zeros(3, dtype=torch.int32, device="cuda")
        exported = torch.export.export(OnGpu(), (qkv, offsets), strict=True)  # by torch.compile's tracer
    assert "dtbert.attention.default" in [str(node.target) for node in exported.graph.nodes]


def test_unchecked_step_reads_nothing_from_the_device() -> None:
    # A device that holds nothing.
    qkv, offsets = torch.zeros(9, 3 * H, device="meta"), torch.zeros(3, dtype=torch.int32, device="meta")
    with pytest.raises(NotImplementedError, match="meta"):
        attention(qkv, offsets, 16, N)
    context, scores = attention(qkv, offsets, 16, N, significance="received", check=False)
    assert scores is not None
    assert (context.shape, scores.shape) == ((9, H), (9,))
    assert attention_significance(qkv, offsets, 16, N, "cls", check=False).shape == (9,)
    with pytest.raises(ValueError, match="num_heads = 15"):
        attention(qkv, offsets, 16, 5, check=False)


def test_what_is_wrong_on_a_cpu_is_refused_unchecked_too() -> None:
    with pytest.raises(ValueError, match="cu_seqlens ends at 8"):
        attention(qkv_of(9), packing([5, 3]).cu_seqlens, 16, N, check=False)
