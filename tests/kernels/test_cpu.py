"""The CPU's steps against the reference: packed and plain weights, fused and separate epilogues, every dtype."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtbert.kernels import ATTENTION_SCORES, cpu, get_backend, reference
from tests.tolerances import STEP

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS = [[1], [63, 1, 128], [127, 200], [384], [512, 2]]


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


@pytest.fixture(params=[True, False], ids=["packed", "plain"])
def packs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Packs weights, or does not, whatever pays on this machine."""
    monkeypatch.setattr(cpu, "packing_pays", lambda: request.param)
    return bool(request.param)


def prefix_sums(seqlens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(seqlens).cumsum(0)], dtype=torch.int32)


def assert_close(got: torch.Tensor, want: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(got.double(), want.double(), atol=STEP[dtype], rtol=STEP[dtype])


def test_this_machine_can_pack_float32_weights() -> None:
    # Without this the tests below would compare the plain path with itself.
    assert cpu._packs(torch.float32)


def test_packed_products_meet_few_numbers_of_rows() -> None:
    rounded = [cpu._round_up(rows) for rows in range(1, 4097)]
    assert all(0 <= more - rows < max(16, rows / 8) for rows, more in enumerate(rounded, start=1))
    assert len(set(rounded)) < 64


@given(rows=st.integers(1, 40), spare=st.integers(0, 40))
def test_packed_product_does_not_see_what_lies_behind_its_rows(rows: int, spare: int) -> None:
    weight, bias = torch.randn(24, 16), torch.randn(24)
    storage = torch.full((rows + spare, 16), torch.nan)
    storage[:rows] = torch.randn(rows, 16)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    assert_close(
        cpu.linear(storage[:rows], packed, bias), reference.linear(storage[:rows], weight, bias), torch.float32
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("rows", [1, 7, 128, 200])
def test_products_agree_with_reference(rows: int, dtype: torch.dtype, packs: bool) -> None:
    x, weight = torch.randn(rows, 96, dtype=dtype), torch.randn(72, 96, dtype=dtype) * 0.1
    bias, residual = torch.randn(72, dtype=dtype), torch.randn(rows + 3, 72, dtype=dtype)
    norm = (torch.randn(72, dtype=dtype), torch.randn(72, dtype=dtype), 1e-12)
    keep = torch.randperm(rows + 3)[:rows].sort().values
    exact = [tensor.double() for tensor in (x, weight, bias)]
    packed = cpu.pack_weight(weight)
    assert packed.is_mkldnn == (packs and cpu._packs(dtype))
    untouched = residual.clone()
    assert_close(cpu.linear(x, packed, bias), reference.linear(*exact), dtype)
    for activation in ("gelu", "gelu_tanh", "relu"):
        got = cpu.linear_gelu(x, packed, bias, activation)
        assert_close(got, reference.linear_gelu(*exact, activation), dtype)
    got = cpu.linear_add_layer_norm(x, packed, bias, residual, *norm, keep)
    wide = (norm[0].double(), norm[1].double(), norm[2])
    assert_close(got, reference.linear_add_layer_norm(*exact, residual.double(), *wide, keep), dtype)
    got = cpu.linear_add_layer_norm(x, packed, bias, residual[:rows], *norm)
    assert_close(got, reference.linear_add_layer_norm(*exact, residual[:rows].double(), *wide), dtype)
    torch.testing.assert_close(residual, untouched, rtol=0, atol=0)


def test_packed_weight_gives_the_plain_one_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "packing_pays", lambda: True)
    weight = torch.randn(24, 40)
    packed = cpu.pack_weight(weight)
    assert torch.equal(packed.to_dense(), weight)
    assert cpu.pack_weight(packed) is packed


@pytest.mark.parametrize("kind", [None, *ATTENTION_SCORES])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("seqlens", LENGTHS, ids=name_of)
def test_attention_agrees_with_reference(seqlens: list[int], dtype: torch.dtype, kind: str | None) -> None:
    qkv = torch.randn(sum(seqlens), 3 * 2 * 16).to(dtype)
    segments = torch.randint(0, 2, (sum(seqlens),))
    arguments = (prefix_sums(seqlens), max(seqlens), 2)
    options = {"significance": kind, "token_type_ids": segments}
    context, score = cpu.attention(qkv, *arguments, **options)
    want, expected = reference.attention(qkv.double(), *arguments, **options)
    assert_close(context, want, dtype)
    assert context.dtype == dtype
    if kind is None:
        assert score is None
        return
    alone = cpu.attention_significance(qkv, *arguments, kind, segments)
    # A sum over up to 512 queries: the error is held relative to the largest score.
    for got in (score, alone):
        assert got.dtype == torch.float32
        scale = expected.max().clamp(min=1)
        assert_close(got / scale, expected / scale, dtype)


@given(seqlens=st.lists(st.integers(1, 50), min_size=1, max_size=5), data=st.data())
def test_attention_of_chosen_queries_agrees_with_reference(seqlens: list[int], data: st.DataObject) -> None:
    keep, kept, start = [], [], 0
    for length in seqlens:
        chosen = sorted(data.draw(st.sets(st.integers(0, length - 1))))
        keep += [start + i for i in chosen]
        kept.append(len(chosen))
        start += length
    qkv = torch.randn(sum(seqlens), 3 * 2 * 8)
    options = {"query_indices": torch.tensor(keep, dtype=torch.int64), "cu_seqlens_q": prefix_sums(kept)}
    got, _ = cpu.attention(qkv, prefix_sums(seqlens), max(seqlens), 2, **options)
    want, _ = reference.attention(qkv, prefix_sums(seqlens), max(seqlens), 2, **options)
    assert_close(got, want, torch.float32)


@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 1.0, 2.0, -torch.inf, torch.inf]), max_size=9), min_size=1, max_size=5
    ),
    data=st.data(),
)
def test_select_tokens_agrees_with_reference_on_ties(rows: list[list[float]], data: st.DataObject) -> None:
    kept = [data.draw(st.integers(0, len(row))) for row in rows]
    seqlens = [len(row) for row in rows]
    scores = torch.tensor([value for row in rows for value in row], dtype=torch.float32)
    arguments = (scores, prefix_sums(seqlens), prefix_sums(kept), sum(kept), max(seqlens))
    assert cpu.select_tokens(*arguments).tolist() == reference.select_tokens(*arguments).tolist()


def test_restore_agrees_with_reference() -> None:
    states, keep, kept = torch.randn(6, 3), torch.tensor([0, 4]), torch.randn(2, 3)
    want = reference.restore(states, keep, kept)
    assert torch.equal(cpu.restore(states.clone(), keep, kept), want)


def test_get_backend_picks_by_device_and_refuses_what_cannot_run() -> None:
    assert get_backend("cpu") is cpu
    assert get_backend("cpu", "reference") is reference
    assert get_backend("meta") is reference
    with pytest.raises(ValueError, match="needs tensors on the CPU"):
        get_backend("meta", "cpu")
    with pytest.raises(ValueError, match="reference, cpu"):
        get_backend("cpu", "fastest")  # type: ignore[arg-type]
