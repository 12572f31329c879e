"""Context of the fused attention against the reference in float64, and exact answers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.kernels import ATTENTION_SCORES, Kept
from dtbert.kernels.triton.attention import attention
from dtbert.kernels.triton.configs import candidates, forcing
from tests.kernels.packings import packing as packing_of
from tests.kernels.triton.cases import DTYPES, ORACLE, TOKENS, TRITON, assert_close, far_apart
from tests.kernels.triton.packing import Packed, among_others, keep, looking_at, pack


def check(packed: Packed, queries: Kept | None = None) -> None:
    want = ORACLE.attention(*packed.doubled(), queries)
    assert_close(TRITON.attention(*packed, queries), want, packed.qkv.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
def test_attention_agrees_with_reference(tokens: int, dtype: torch.dtype) -> None:
    check(pack([tokens], 1, 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "head_size"), [(12, 32), (12, 26), (1, 64), (3, 128), (2, 80), (5, 1), (2, 16)])
def test_attention_takes_heads_of_any_size(heads: int, head_size: int, dtype: torch.dtype) -> None:
    check(pack([3, 17], heads, head_size, dtype))


def test_attention_takes_mixed_lengths_and_empty_sequences() -> None:
    check(pack([0, 200, 1, 0, 63, 128, 0], 2, 32))


@pytest.mark.parametrize("lengths", [[], [0], [0, 0]])
def test_attention_of_no_tokens_is_empty(lengths: list[int]) -> None:
    packed = pack(lengths, 2, 32)
    context, significance = TRITON.scored_attention(*packed, "received")
    assert context.shape == (0, 64)
    assert significance.shape == (0,)
    check(packed)
    check(packed, keep(packed.packing, [[]] * len(lengths)))


def test_attention_of_no_kept_queries_is_empty() -> None:
    packed = pack([5, 3], 2, 32)
    check(packed, keep(packed.packing, [[], []]))


@settings(max_examples=8)
@given(data=st.data(), heads=st.integers(1, 2), head_size=st.sampled_from([7, 32]), seed=st.integers(0, 2**16))
def test_attention_of_any_packing_and_kept_set(data: st.DataObject, heads: int, head_size: int, seed: int) -> None:
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    kept = [sorted(data.draw(st.sets(st.integers(0, length - 1)))) if length else [] for length in lengths]
    packed = pack(lengths, heads, head_size, seed=seed)
    check(packed)
    check(packed, keep(packed.packing, kept))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_kept_queries_is_that_of_all_queries(dtype: torch.dtype) -> None:
    packed = pack([150, 0, 70], 2, 32, dtype)
    check(packed, keep(packed.packing, [range(0, 150, 3), [], range(0, 70, 3)]))
    every = Kept(torch.arange(220), packed.packing)
    assert torch.equal(TRITON.attention(*packed, every), TRITON.attention(*packed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 64, 256])
def test_uniform_attention_over_integers_is_exact(tokens: int, dtype: torch.dtype) -> None:
    qkv = torch.randint(-3, 4, (tokens, 3 * 64)).to(dtype)
    qkv[:, :64] = 0
    context, significance = TRITON.scored_attention(qkv, packing_of([tokens]), 1, "received")
    # The mean of 2^k small integers is exact in float32, and rounded once to the dtype.
    assert torch.equal(context, qkv[:, 128:].float().mean(0).to(dtype).expand(tokens, -1))
    assert torch.equal(significance, torch.ones(tokens))


@pytest.mark.parametrize("dtype", DTYPES[::2])
def test_every_candidate_is_exact_on_integers(dtype: torch.dtype) -> None:
    tokens = 128
    qkv = torch.randint(-3, 4, (tokens + 64, 3 * 64)).to(dtype)
    qkv[:, :64] = 0
    mean = qkv[:tokens, 128:].float().mean(0).to(dtype)
    for config in candidates("attention", dtype, 64, "received"):
        with forcing("attention", config):
            context, significance = TRITON.scored_attention(qkv, packing_of([tokens, 64]), 1, "received")
        assert torch.equal(context[:tokens], mean.expand(tokens, -1)), config
        assert torch.equal(significance, torch.ones(tokens + 64)), config


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [63, 200])
def test_attention_to_one_token_is_exact(tokens: int, dtype: torch.dtype) -> None:
    chosen = torch.randint(0, tokens, (tokens,))
    packed = looking_at(chosen, dtype)
    assert torch.equal(TRITON.attention(*packed), packed.qkv[chosen, 128:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_gives_a_sequence_the_same_bits_in_any_batch_and_run(dtype: torch.dtype) -> None:
    alone = pack([100], 2, 32, dtype)
    together, rows = among_others(alone)
    first = TRITON.attention(*together)
    assert torch.equal(first[rows], TRITON.attention(*alone))
    assert torch.equal(first, TRITON.attention(*together))


def test_large_scores_do_not_overflow() -> None:
    packed = pack([70], 1, 32)
    packed.qkv[:, :64] *= 300
    context = TRITON.attention(*packed)
    # A difference of scores near 1e6 carries their rounding: only who wins is certain.
    assert context.isfinite().all()
    assert (context - ORACLE.attention(*packed.doubled())).abs().median() < 1e-5


def test_attention_reads_rows_of_a_wider_tensor() -> None:
    wide = torch.randn(70, 120)
    check(Packed(wide[:, 5:101], packing_of([70]), 1))
    check(Packed(wide[::2, 5:101], packing_of([30, 5]), 1))


def test_attention_addresses_rows_beyond_32_bit() -> None:
    qkv = far_apart(5, 48, torch.float16)
    qkv[:] = torch.randn(5, 48)
    packed = Packed(qkv, packing_of([1] * 5), 1)
    assert torch.equal(TRITON.attention(*packed), qkv[:, 32:])
    context, significance = TRITON.scored_attention(*packed, "received")
    assert torch.equal(context, qkv[:, 32:])
    assert torch.equal(significance, torch.ones(5))
    assert torch.equal(TRITON.significance(*packed, "cls"), torch.ones(5))


@pytest.mark.parametrize("score", ["", *ATTENTION_SCORES])
def test_an_understated_longest_sequence_touches_nothing_outside(score: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fences: list[torch.Tensor] = []

    def fenced(*shape: int | tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        sizes = shape[0] if isinstance(shape[0], tuple) else shape
        storage = torch.full((math.prod(sizes) + 8192,), torch.nan, dtype=dtype, device=device)
        fences.extend((storage[:4096], storage[-4096:]))
        return storage[4096:-4096].view(sizes)

    lengths, longest, heads = [150, 0, 200], 128, 2
    qkv, packing, _ = pack(lengths, heads, 16)
    seen = torch.cat([torch.arange(length) < longest for length in lengths])
    segments = torch.zeros(350, dtype=torch.int64)
    with_context = score not in ("cls", "from_question")
    monkeypatch.setattr(torch, "empty", fenced)
    monkeypatch.setattr(torch, "zeros", lambda *shape, **options: fenced(*shape, **options).zero_())
    rest = with_context, score, segments if score == "from_question" else None, None, None
    context, significance = attention(qkv, packing.cu_seqlens, longest, heads, *rest)
    monkeypatch.undo()
    assert all(fence.isnan().all() for fence in fences)
    if with_context:
        want = ORACLE.attention(qkv.double(), packing, heads)
        assert_close(context[seen], want[seen], torch.float32)
    if score in ("received", "from_question"):
        # The queries of the blocks that there are.
        parts = [rows for rows in packing.slices if rows.stop > rows.start]
        queries, keys = (qkv[:, i * 32 : (i + 1) * 32].double().unflatten(1, (heads, 16)) for i in range(2))
        for rows in parts:
            logits = torch.einsum("qhd,khd->hqk", queries[rows][:longest], keys[rows]) / 4
            want = logits.softmax(-1).sum((0, 1))
            assert_close(significance[rows][:longest], want[:longest], torch.float32)
    elif score:
        assert significance[seen].isfinite().all()


def test_attention_reads_no_row_beyond_its_tensor() -> None:
    storage = torch.full((40, 96), torch.nan)
    storage[:20] = torch.randn(20, 96)
    # The last sequence claims 30 tokens where 10 are left; so do the queries, which also point beyond the tensor.
    wrong, right = (Packed(storage[:20], packing_of(lengths), 1) for lengths in ([10, 30], [10, 10]))
    segments = torch.zeros(20, dtype=torch.int64)
    for score in ("received", "received_off_diagonal", "received_max", "value_norm"):
        for got, want in zip(*(TRITON.scored_attention(*packed, score) for packed in (wrong, right)), strict=True):
            assert torch.equal(got, want)
    for score in ("received", "cls", "from_question"):
        got, want = (TRITON.significance(*packed, score, segments) for packed in (wrong, right))
        assert torch.equal(got, want)
    context = TRITON.attention(*right)
    assert torch.equal(TRITON.attention(*wrong), context)
    beyond = TRITON.attention(*right, Kept(torch.tensor([3, 25, -7]), packing_of([3, 30])))
    assert beyond.isfinite().all()
    assert torch.equal(beyond[0], context[3])
