"""The compiled steps of training against plain ones in float64, which drop the same."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, AttentionScore, Kept, native
from dtbert.kernels.parameters import Linear, of_tensors
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.training.backend import TrainingBackend
from tests.kernels.test_native import DTYPES, error, randn
from tests.training.test_attention import packing, some_of

# |out - float64| / |float64|: a few roundings to the dtype.
BOUND = {torch.float32: 5e-6, torch.bfloat16: 2e-2}
CHANCES = st.sampled_from([0.0, 0.1, 0.6])
SEEDS = st.integers(0, 2**20)
HELD = 16  # what the rows of probabilities are padded to

each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(scope="module", autouse=True)
def _built(built_steps: None) -> None:
    """All tests here need them."""


@pytest.fixture
def _paying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "pays", lambda dtype: True)


def probabilities_of(held: Tensor, lengths: list[int], asked: tuple[int, ...], heads: int) -> list[Tensor]:
    """Those of each sequence, ``[N, q, n]``, from what attention holds."""
    padded = [-(-length // HELD) * HELD for length in lengths]
    parts = held.split([heads * rows * columns for rows, columns in zip(asked, padded, strict=True)])
    found = [
        part.view(heads, rows, columns).split([length, columns - length], 2)
        for part, rows, columns, length in zip(parts, asked, padded, lengths, strict=True)
    ]
    assert not any(past.any() for _, past in found)  # not nearly 0, which is slow to multiply
    return [real for real, _ in found]


def context_by(
    held: Tensor, qkv: Tensor, lengths: list[int], heads: int, chance: float, queries: Kept | None
) -> Tensor:
    """Attention by plain operators, which drops what has a sign in ``held``."""
    query, key, value = qkv.unflatten(1, (3, heads, -1)).permute(1, 2, 0, 3)
    asked = tuple(lengths) if queries is None else queries.packing.seqlens
    if queries is not None:
        query = query[:, queries.rows]
    contexts = []
    parts = query.split(list(asked), 1), key.split(lengths, 1), value.split(lengths, 1)
    for q, k, v, signed in zip(*parts, probabilities_of(held, lengths, asked, heads), strict=True):
        probabilities = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        torch.testing.assert_close(signed.abs().double(), probabilities.detach(), rtol=2e-2, atol=1e-6)
        kept = probabilities.masked_fill(signed.float().signbit(), 0) / (1 - chance)
        contexts.append((kept @ v).transpose(0, 1).flatten(1))
    return torch.cat(contexts)


@each_dtype
@given(
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=3),
    heads=st.integers(1, 3),
    head_size=st.sampled_from([16, 32, 64]),
    chance=CHANCES,
    chooses=st.booleans(),
    seed=SEEDS,
)
def test_attention_and_its_gradient_agree_with_float64(
    dtype: torch.dtype, lengths: list[int], heads: int, head_size: int, chance: float, chooses: bool, seed: int
) -> None:
    queries, hidden = some_of(lengths, seed) if chooses else None, heads * head_size
    qkv = randn(sum(lengths), 3 * hidden, seed=seed, dtype=dtype)
    context, held = native.dropped_attention(qkv, packing(lengths), heads, chance, seed, queries)
    wide = qkv.double().requires_grad_()
    wanted = context_by(held, wide, lengths, heads, chance, queries)
    assert error(context, wanted) <= BOUND[dtype]
    weights = randn(*wanted.shape, seed=seed + 1, dtype=dtype)
    (of_wide,) = torch.autograd.grad((wanted * weights).sum(), wide)
    found = native.dropped_attention_gradient(weights, qkv, held, packing(lengths), heads, chance, queries)
    # Of queries and keys as one: of a single key nothing depends on either, and what is left are roundings.
    for part in (slice(2 * hidden), slice(2 * hidden, None)):
        scale = of_wide.norm() / of_wide[:, part].norm().clamp_min(1e-6)
        assert error(found[:, part], of_wide[:, part]) <= BOUND[dtype] * scale
    if queries is not None:
        others = torch.ones(len(qkv), dtype=torch.bool)
        others[queries.rows] = False
        assert not found[others, :hidden].any()


@each_dtype
@given(rows=st.integers(1, 150), tiles=st.integers(1, 9), chance=CHANCES, seed=SEEDS)
def test_norm_and_its_gradient_agree_with_float64(
    dtype: torch.dtype, rows: int, tiles: int, chance: float, seed: int
) -> None:
    x, residual, gradient = (randn(rows, 16 * tiles, seed=seed + at, dtype=dtype) for at in range(3))
    weight, bias = (randn(16 * tiles, seed=seed + at, dtype=dtype) for at in (3, 4))
    out, *held = native.dropped_norm(x, residual, weight, bias, 1e-5, chance, seed)
    of_x, of_residual, *of_norm = native.dropped_norm_gradient(gradient, *held, weight, chance, seed)
    dropped = (of_x == 0) & (of_residual != 0)
    wide = [one.double().requires_grad_() for one in (x, residual, weight, bias)]
    summed = wide[0].masked_fill(dropped, 0) / (1 - chance) + wide[1]
    wanted = F.layer_norm(summed, weight.shape, wide[2], wide[3], 1e-5)
    assert error(out, wanted) <= BOUND[dtype]
    wanted_gradients = torch.autograd.grad((wanted * gradient).sum(), wide)
    for found, want in zip((of_x, of_residual, *of_norm), wanted_gradients, strict=True):
        assert error(found, want) <= BOUND[dtype]


@each_dtype
@given(rows=st.integers(1, 80), tiles=st.integers(1, 40), spread=st.sampled_from([0.1, 1.0, 30.0]), seed=SEEDS)
def test_gelu_and_its_gradient_agree_with_float64(
    dtype: torch.dtype, rows: int, tiles: int, spread: float, seed: int
) -> None:
    x, gradient = randn(rows, 16 * tiles, seed=seed, dtype=dtype) * spread, randn(rows, 16 * tiles, seed=1, dtype=dtype)
    wide = x.double().requires_grad_()
    wanted = F.gelu(wide)
    assert error(native.gelu(x), wanted) <= BOUND[dtype]
    (of_wide,) = torch.autograd.grad((wanted * gradient).sum(), wide)
    assert error(native.gelu_gradient(gradient, x), of_wide) <= BOUND[dtype]


@each_dtype
@pytest.mark.parametrize("chance", [0.001, 0.1, 0.5, 0.97])
def test_what_is_dropped_is_by_chance_of_the_seed_and_not_of_the_threads(dtype: torch.dtype, chance: float) -> None:
    lengths, heads = [130, 7, 200], 4
    qkv = randn(sum(lengths), 3 * heads * 16, seed=0, dtype=dtype)

    def dropped(seed: int) -> Tensor:
        held = native.dropped_attention(qkv, packing(lengths), heads, chance, seed)[1]
        parts = probabilities_of(held, lengths, tuple(lengths), heads)
        return torch.cat([part.flatten() for part in parts]).signbit()

    first = dropped(7)
    five_errors = 5 * (chance * (1 - chance) / len(first)) ** 0.5
    assert abs(first.double().mean().item() - chance) < five_errors
    # Two draws of the same probability agree by chance.
    by_chance = chance**2 + (1 - chance) ** 2
    for one, other in ((first, dropped(8)), (first[1:], first[:-1]), (first[16:], first[:-16])):
        assert abs((one == other).double().mean().item() - by_chance) < 0.01
    try:
        torch.set_num_threads(3)
        assert torch.equal(dropped(7), first)
    finally:
        torch.set_num_threads(1)


@each_dtype
def test_values_that_are_not_finite_stay_in_their_sequence(dtype: torch.dtype) -> None:
    lengths = [20, 30]
    qkv = randn(50, 3 * 32, seed=0, dtype=dtype)
    qkv[3, 40] = math.nan
    context, held = native.dropped_attention(qkv, packing(lengths), 2, 0.1, 1)
    gradient = native.dropped_attention_gradient(torch.ones_like(context), qkv, held, packing(lengths), 2, 0.1)
    for found in (context, gradient):
        assert found[:20].isnan().any()
        assert found[20:].isfinite().all()


@each_dtype
def test_they_are_found_right_here(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    assert native._trains_right.__wrapped__(dtype)
    monkeypatch.setattr(native, "gelu_gradient", lambda gradient, x: 1.001 * gradient * x)
    assert not native._trains_right.__wrapped__(dtype)


@each_dtype
@pytest.mark.parametrize("score", [None, "received", "value_norm"])
@pytest.mark.usefixtures("_paying")
def test_backend_takes_them_where_they_pay(dtype: torch.dtype, score: AttentionScore | None) -> None:
    assert score is None or score in ATTENTION_SCORES
    lengths = [40, 9]
    qkv = randn(49, 3 * 32, seed=0, dtype=dtype).requires_grad_()
    backend = TrainingBackend()
    if score is None:
        context = backend.attention(qkv, packing(lengths), 2)
    else:
        context, scores = backend.scored_attention(qkv, packing(lengths), 2, score)
        wanted = backend._plain_attention(qkv.double(), packing(lengths), 2, 0, score, None)[1]
        assert wanted is not None
        assert not scores.requires_grad
        torch.testing.assert_close(scores.double(), wanted, rtol=2e-2, atol=1e-2)
    assert context.grad_fn is not None
    assert "_AttentionBackward" in type(context.grad_fn).__name__
    layer = of_tensors(
        Linear, weight=torch.nn.Parameter(randn(64, 32, seed=1, dtype=dtype)), bias=randn(64, seed=2, dtype=dtype)
    )
    assert "_Gelu" in type(backend.linear(qkv[:, :32], layer, "gelu").grad_fn).__name__


@each_dtype
def test_gradients_of_a_model_that_drops_tokens_are_those_of_plain_steps(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = BertConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)
    model = BertForQuestionAnswering(config).to(dtype)
    with torch.no_grad():
        for one in model.parameters():
            one.normal_(0, 0.2)
    ids = torch.randint(config.vocab_size, (82,), generator=torch.Generator().manual_seed(0))
    batch = PackedBatch.from_lists([part.tolist() for part in ids.split([30, 7, 45])])
    weights = randn(82, 2, seed=1, dtype=dtype)
    # By chance, so that what is kept does not hang on a rounding.
    schedule = LengthSchedule.ratios((0.7, 0.5, 0.3), scorer="random")
    found = []
    for pays in (True, False):
        monkeypatch.setattr(native, "pays", lambda dtype, pays=pays: pays)
        model.zero_grad()
        torch.manual_seed(0)
        backend = TrainingBackend()
        states = model.encoder(batch, schedule, backend=backend).states
        (model.span_head(backend)(states) * weights).sum().backward()
        found.append({name: one.grad for name, one in model.named_parameters()})
    for (name, got), want in zip(found[0].items(), found[1].values(), strict=True):
        assert got is not None, name
        assert want is not None, name
        # A key's bias changes no probability: its gradient is rounding.
        part = slice(64, None) if name.endswith("qkv.bias") else slice(None)
        assert error(got[part], want[part].double()) <= BOUND[dtype], name
