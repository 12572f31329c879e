"""Context of the fused attention against the reference in float64, exact answers, and what it refuses."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.kernels import reference
from dtbert.kernels.triton import MAX_HEAD_SIZE, attention, attention_significance
from dtbert.kernels.triton.attention import block_of, compile_cases, config_for
from dtbert.kernels.triton.launch import ARCHITECTURES, FLOAT_DTYPES
from tests.kernels.triton.cases import DTYPES, TOKENS, assert_close, far_apart
from tests.kernels.triton.packing import Packed, looking_at, offsets, pack


def check(packed: Packed, query_indices: torch.Tensor | None = None, cu_seqlens_q: torch.Tensor | None = None) -> None:
    kept = {"query_indices": query_indices, "cu_seqlens_q": cu_seqlens_q}
    context, significance = attention(*packed, **kept)
    want, _ = reference.attention(*packed.doubled(), **kept)
    assert significance is None
    assert_close(context, want, packed.qkv.dtype)


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
    context, significance = attention(*packed, significance="received")
    assert context.shape == (0, 64)
    assert significance.shape == (0,)
    assert attention(*packed, query_indices=offsets([])[:0].long(), cu_seqlens_q=packed.cu_seqlens)[0].shape == (0, 64)


@settings(max_examples=8)
@given(data=st.data(), heads=st.integers(1, 2), head_size=st.sampled_from([7, 32]), seed=st.integers(0, 2**16))
def test_attention_of_any_packing_and_kept_set(data: st.DataObject, heads: int, head_size: int, seed: int) -> None:
    lengths = data.draw(st.lists(st.integers(0, 70), min_size=1, max_size=3))
    kept = [sorted(data.draw(st.sets(st.integers(0, length - 1)))) if length else [] for length in lengths]
    packed = pack(lengths, heads, head_size, seed=seed)
    begins = packed.cu_seqlens.tolist()
    keep = torch.tensor([begin + i for begin, rows in zip(begins, kept, strict=False) for i in rows], dtype=torch.int64)
    check(packed)
    check(packed, keep, offsets([len(rows) for rows in kept]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_of_kept_queries_is_that_of_all_queries(dtype: torch.dtype) -> None:
    packed = pack([150, 0, 70], 2, 32, dtype)
    keep = torch.arange(0, 220, 3)
    cu_seqlens_q = torch.tensor([0, 50, 50, len(keep)], dtype=torch.int32)
    check(packed, keep, cu_seqlens_q)
    every = torch.arange(220)
    same, _ = attention(*packed, query_indices=every, cu_seqlens_q=packed.cu_seqlens)
    assert torch.equal(same, attention(*packed)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 64, 256])
def test_uniform_attention_over_integers_is_exact(tokens: int, dtype: torch.dtype) -> None:
    qkv = torch.randint(-3, 4, (tokens, 3 * 64)).to(dtype)
    qkv[:, :64] = 0
    context, significance = attention(qkv, offsets([tokens]), tokens, 1, significance="received")
    # The mean of 2^k small integers is exact in float32, and rounded once to the dtype.
    assert torch.equal(context, qkv[:, 128:].float().mean(0).to(dtype).expand(tokens, -1))
    assert torch.equal(significance, torch.ones(tokens))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [63, 200])
def test_attention_to_one_token_is_exact(tokens: int, dtype: torch.dtype) -> None:
    chosen = torch.randint(0, tokens, (tokens,))
    packed = looking_at(chosen, dtype)
    assert torch.equal(attention(*packed)[0], packed.qkv[chosen, 128:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_gives_a_sequence_the_same_bits_in_any_batch_and_run(dtype: torch.dtype) -> None:
    alone = pack([100], 2, 32, dtype)
    context, _ = attention(*alone)
    others = pack([130, 7], 2, 32, dtype, seed=1).qkv
    together = Packed(torch.cat([others, alone.qkv, others[:3]]), offsets([130, 7, 100, 3]), 130, 2)
    first, _ = attention(*together)
    assert torch.equal(first[137:237], context)
    assert torch.equal(first, attention(*together)[0])


def test_large_scores_do_not_overflow() -> None:
    packed = pack([70], 1, 32)
    packed.qkv[:, :64] *= 300
    context, _ = attention(*packed)
    want, _ = reference.attention(*packed.doubled())
    # A difference of scores near 1e6 carries their rounding: only who wins is certain.
    assert context.isfinite().all()
    assert (context - want).abs().median() < 1e-5


def test_attention_reads_rows_of_a_wider_tensor() -> None:
    wide = torch.randn(70, 120)
    packed = Packed(wide[:, 5:101], offsets([70]), 70, 1)
    check(packed)
    check(packed._replace(qkv=wide[::2, 5:101], cu_seqlens=offsets([30, 5]), max_seqlen=30))


def test_attention_addresses_rows_beyond_32_bit() -> None:
    qkv = far_apart(5, 48, torch.float16)
    qkv[:] = torch.randn(5, 48)
    context, significance = attention(qkv, offsets([1] * 5), 1, 1, significance="cls")
    assert torch.equal(context, qkv[:, 32:])
    assert torch.equal(significance, torch.ones(5))


def test_attention_reads_no_row_beyond_its_tensor() -> None:
    storage = torch.full((40, 96), torch.nan)
    storage[:20] = torch.randn(20, 96)
    # The last sequence claims 30 tokens where 10 are left; so does query_indices, and it points beyond the tensor.
    wrong = Packed(storage[:20], offsets([10, 30]), 30, 1)
    right = pack([10, 10], 1, 32)._replace(qkv=storage[:20])
    for score in reference.ATTENTION_SCORES:
        got = attention(*wrong, significance=score, token_type_ids=torch.zeros(20, dtype=torch.int64))
        want = attention(*right, significance=score, token_type_ids=torch.zeros(20, dtype=torch.int64))
        assert torch.equal(got[0], want[0])
        assert torch.equal(got[1], want[1])
    beyond = torch.tensor([3, 25, -7])
    got, _ = attention(*right, query_indices=beyond, cu_seqlens_q=offsets([3, 30]))
    assert got.isfinite().all()
    assert torch.equal(got[0], attention(*right)[0][3])


def test_every_configuration_fits_the_sizes_of_a_product() -> None:
    for arch in (*ARCHITECTURES, "sm_75"):
        for dtype in FLOAT_DTYPES:
            for head_size in range(1, MAX_HEAD_SIZE + 1):
                config = config_for(arch, dtype, head_size)
                assert min(config.block_m, config.block_n, block_of(head_size)) >= 16
                assert head_size <= block_of(head_size) < max(17, 2 * head_size)


def test_compile_cases_give_every_argument_a_type() -> None:
    for arch in ARCHITECTURES:
        cases = list(compile_cases(arch))
        assert len({case.name for case in cases}) == len(cases)
        for case in cases:
            assert set(case.signature) == set(case.kernel.arg_names), case.name
            assert {name for name, kind in case.signature.items() if kind == "constexpr"} == set(case.constexprs)


QKV, CU = torch.zeros(5, 24), torch.tensor([0, 5], dtype=torch.int32)
KEPT = {"query_indices": torch.tensor([0, 2]), "cu_seqlens_q": torch.tensor([0, 2], dtype=torch.int32)}
SEGMENTS = {"significance": "from_question", "token_type_ids": torch.zeros(5, dtype=torch.int64)}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"qkv": QKV.double()}, TypeError, "qkv is torch.float64, the kernels take float32, bfloat16 and float16"),
        ({"qkv": QKV[0]}, ValueError, r"qkv has shape \[24\]"),
        ({"qkv": torch.zeros(24, 5).T}, ValueError, "qkv has strides .* call .contiguous"),
        ({"qkv": QKV.clone().requires_grad_()}, ValueError, "needs gradients, .* choose the backend 'reference'"),
        ({"num_heads": 3}, ValueError, "qkv is 24 wide, which 3 heads do not divide"),
        ({"num_heads": 0}, ValueError, "which 0 heads do not divide"),
        ({"qkv": torch.zeros(5, 390), "num_heads": 1}, ValueError, "heads of 130, the kernel takes up to 128"),
        ({"cu_seqlens": CU.long()}, TypeError, "cu_seqlens is torch.int64, expected torch.int32"),
        ({"cu_seqlens": CU[None]}, ValueError, r"cu_seqlens has shape \[1, 2\]"),
        ({"cu_seqlens": CU[:0]}, ValueError, "cu_seqlens is empty"),
        ({"cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens is on meta"),
        ({"max_seqlen": 4}, ValueError, "1 sequences of max_seqlen 4 cannot hold the 5 tokens"),
        ({"max_seqlen": 2**30}, ValueError, "a sequence of 1073741824 tokens, the kernel addresses up to 89478485"),
        ({"significance": "loudest"}, ValueError, "unknown attention score 'loudest': choose one of received, "),
        ({"significance": "from_question"}, ValueError, "'from_question' needs token_type_ids"),
        ({**SEGMENTS, "token_type_ids": torch.zeros(5).int()}, TypeError, "token_type_ids is torch.int32"),
        ({**SEGMENTS, "token_type_ids": torch.zeros(4).long()}, ValueError, r"token_type_ids has shape \[4\]"),
        ({**KEPT, "significance": "received"}, ValueError, "'received' needs every query"),
        ({**KEPT, "cu_seqlens_q": None}, ValueError, "one of query_indices and cu_seqlens_q is missing"),
        ({**KEPT, "query_indices": None}, ValueError, "one of query_indices and cu_seqlens_q is missing"),
        ({**KEPT, "query_indices": torch.tensor([0.0])}, TypeError, "query_indices is torch.float32"),
        ({**KEPT, "query_indices": torch.tensor([[0]])}, ValueError, r"query_indices has shape \[1, 1\]"),
        ({**KEPT, "cu_seqlens_q": CU.long()}, TypeError, "cu_seqlens_q is torch.int64"),
        ({**KEPT, "cu_seqlens_q": offsets([1, 1])}, ValueError, r"cu_seqlens_q has shape \[3\], expected \[2\]"),
    ],
)
def test_attention_refuses(changed: dict[str, object], error: type[Exception], message: str) -> None:
    right = {"qkv": QKV, "cu_seqlens": CU, "max_seqlen": 5, "num_heads": 2}
    for call in (right, right | KEPT, right | SEGMENTS):
        attention(**call)
    with pytest.raises(error, match=f"^attention: .*{message}"):
        attention(**{**right, **changed})
    shared = {key: value for key, value in changed.items() if key in ("token_type_ids", *right)}
    if not KEPT.keys() & changed.keys():
        with pytest.raises(error, match=f"^attention_significance: .*{message}"):
            attention_significance(**right | shared, kind=changed.get("significance", "received"))


def test_attention_takes_what_needs_gradients_where_none_are_recorded() -> None:
    with torch.no_grad():
        attention(QKV.clone().requires_grad_(), CU, 5, 2)
