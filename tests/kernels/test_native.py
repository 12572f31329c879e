"""The compiled steps against the plain ones in float64, how they are built, and when they are chosen."""

import copy
import math
import pickle
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, Activation, AttentionScore, Backend, Kept, choose_backend, native
from dtbert.kernels.backend import Sizes
from dtbert.kernels.cpu import multiplies_natively
from dtbert.kernels.native import compiler
from dtbert.kernels.parameters import LayerNorm, Linear, of_tensors
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.weights.quantize import quantize_rows
from tests.kernels.packings import packing as packing_of

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if multiplies_natively(dtype)]
# |out - float64| / |float64|: a few roundings to the dtype.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
NATIVE, PLAIN = native.Native(), Backend()
LENGTHS = st.lists(st.integers(1, 150), min_size=1, max_size=4)
# The last is a NaN of which every bit is set that may be.
NOT_FINITE = [math.nan, math.inf, -math.inf, torch.tensor(2**31 - 1, dtype=torch.int32).view(torch.float32).item()]
not_finite = pytest.mark.parametrize("value", NOT_FINITE, ids=["nan", "inf", "-inf", "full-nan"])


@pytest.fixture(scope="module", autouse=True)
def _built(built_steps: None) -> None:
    """All tests here need them."""


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return float((got.detach().double() - want.detach()).norm() / want.detach().norm().clamp_min(1e-3))


def layer_of(outputs: int, inputs: int, seed: int, dtype: torch.dtype) -> Linear:
    weight = randn(outputs, inputs, seed=seed, dtype=dtype) / inputs**0.5
    return of_tensors(Linear, weight=torch.nn.Parameter(weight), bias=randn(outputs, seed=seed + 1, dtype=dtype))


def laid_out(layer: Linear) -> Linear:
    prepared = of_tensors(Linear, weight=torch.nn.Parameter(layer.weight.detach().clone()), bias=layer.bias)
    NATIVE.prepare(prepared)
    assert prepared.laid_out
    return prepared


def doubled(layer: Linear) -> Linear:
    return of_tensors(Linear, weight=layer.weight.detach().double(), bias=layer.bias.double())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "gelu_tanh", "relu", "silu"])
@given(tokens=st.integers(1, 140), outputs=st.integers(4, 12), inputs=st.integers(4, 12), seed=st.integers(0, 2**20))
def test_linear_agrees_with_float64(
    dtype: torch.dtype, activation: Activation | None, tokens: int, outputs: int, inputs: int, seed: int
) -> None:
    layer, x = layer_of(16 * outputs, 16 * inputs, seed, dtype), randn(tokens, 16 * inputs, seed=seed + 2, dtype=dtype)
    want = PLAIN.linear(x.double(), doubled(layer), activation)
    assert error(NATIVE.linear(x, laid_out(layer), activation), want) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", [*DTYPES, torch.int8], ids=str)
@given(tokens=st.integers(1, 300), kept=st.floats(0, 1), hidden=st.sampled_from([64, 128]), seed=st.integers(0, 2**20))
def test_queries_of_some_rows_have_the_bits_of_the_whole_product(
    dtype: torch.dtype, tokens: int, kept: float, hidden: int, seed: int
) -> None:
    if not native.available(dtype):
        pytest.skip(native.why_not(dtype))
    layer = layer_of(3 * hidden, hidden, seed, torch.float32 if dtype == torch.int8 else dtype)
    if dtype == torch.int8:
        layer.hold_scaled(*quantize_rows(layer.weight.detach()))
    NATIVE.prepare(layer)
    # Rows that do not lie side by side, as slices of others.
    x = randn(tokens, hidden + 16, seed=seed + 2, dtype=layer.bias.dtype)[:, :hidden]
    want = NATIVE.linear(x, layer)
    rows = (
        torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).argsort()[: int(kept * tokens)].sort().values
    )
    qkv = NATIVE.keys_and_values(x, layer)
    assert torch.equal(qkv[:, hidden:], want[:, hidden:])
    got = NATIVE.queries(x, layer, qkv, rows)
    assert torch.equal(got[rows, :hidden], want[rows, :hidden])
    assert torch.equal(got[:, hidden:], want[:, hidden:])
    assert torch.equal(NATIVE.queries(x, layer, NATIVE.keys_and_values(x, layer)), want)


def test_queries_come_with_the_rest_where_no_panel_holds_them_alone() -> None:
    layer, x = laid_out(layer_of(3 * 48, 48, 0, torch.float32)), randn(5, 48, seed=1)
    qkv = NATIVE.keys_and_values(x, layer)
    assert torch.equal(qkv, NATIVE.linear(x, layer))
    assert NATIVE.queries(x, layer, qkv, torch.tensor([1])) is qkv
    with pytest.raises(RuntimeError, match="no whole panels"):
        torch.ops.dtbert_native.linear_part(x, *layer.weight_and_bias, 3, 48, None, qkv)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(tokens=st.integers(1, 140), hidden=st.integers(4, 12), inputs=st.integers(4, 12), seed=st.integers(0, 2**20))
def test_add_norm_agrees_with_float64(dtype: torch.dtype, tokens: int, hidden: int, inputs: int, seed: int) -> None:
    layer, x = layer_of(16 * hidden, 16 * inputs, seed, dtype), randn(tokens, 16 * inputs, seed=seed + 2, dtype=dtype)
    residual = randn(tokens + 5, 16 * hidden, seed=seed + 3, dtype=dtype)
    rows = torch.randperm(tokens + 5, generator=torch.Generator().manual_seed(seed))[:tokens].sort().values
    weight, bias = (randn(16 * hidden, seed=seed + at, dtype=dtype) for at in (4, 5))
    norm = of_tensors(LayerNorm, weight=weight, bias=bias, eps=1e-12)
    wide = of_tensors(LayerNorm, weight=weight.double(), bias=bias.double(), eps=1e-12)
    for chosen, rest in ((rows, residual), (None, residual[:tokens])):
        want = PLAIN.add_norm(x.double(), doubled(layer), rest.double(), wide, chosen)
        assert error(NATIVE.add_norm(x, laid_out(layer), rest, norm, chosen), want) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("score", ATTENTION_SCORES)
@given(lengths=LENGTHS, head_size=st.sampled_from([16, 32, 64]), seed=st.integers(0, 2**20))
def test_attention_and_its_scores_agree_with_float64(
    dtype: torch.dtype, score: AttentionScore, lengths: list[int], head_size: int, seed: int
) -> None:
    packing = packing_of(lengths)
    qkv = randn(packing.num_tokens, 3 * 2 * head_size, seed=seed, dtype=dtype)
    segments = torch.cat([(torch.arange(length) > length // 3).long() for length in lengths])
    context = PLAIN.attention(qkv.double(), packing, 2)
    want = PLAIN.significance(qkv.double(), packing, 2, score, segments)
    assert error(NATIVE.attention(qkv, packing, 2), context) <= BOUND[dtype]
    # Scores are sums in float32 of products that are exact enough, whatever the dtype.
    assert error(NATIVE.significance(qkv, packing, 2, score, segments), want) <= BOUND[torch.float32]
    if score not in ("cls", "from_question"):
        got, significance = NATIVE.scored_attention(qkv, packing, 2, score)
        assert error(got, context) <= BOUND[dtype]
        assert error(significance, want) <= BOUND[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(lengths=LENGTHS, seed=st.integers(0, 2**20))
def test_chosen_queries_have_the_context_of_all(dtype: torch.dtype, lengths: list[int], seed: int) -> None:
    packing, generator = packing_of(lengths), torch.Generator().manual_seed(seed)
    qkv = randn(packing.num_tokens, 96, seed=seed, dtype=dtype)
    kept = [torch.randperm(n, generator=generator)[: n // 2 + 1].sort().values for n in lengths]
    rows = torch.cat([part + piece.start for part, piece in zip(kept, packing.slices, strict=True)])
    queries = Kept(rows, packing_of([len(part) for part in kept]))
    want = PLAIN.attention(qkv.double(), packing, 1)[rows]
    assert error(NATIVE.attention(qkv, packing, 1, queries), want) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_the_batch_nor_on_threads(dtype: torch.dtype) -> None:
    alone, packing = packing_of([100]), packing_of([100, 7, 300])
    qkv = randn(407, 3 * 64, seed=0, dtype=dtype)
    layer = laid_out(layer_of(128, 192, 1, dtype))
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for rows, place in ((slice(0, 100), alone), (slice(0, 407), packing)):
                context, significance = NATIVE.scored_attention(qkv[rows], place, 2, "received")
                found.append((context[:100], significance[:100], NATIVE.linear(qkv[rows], layer, "gelu")[:100]))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, other) for result in found for one, other in zip(result, found[0], strict=True))


def with_one(x: Tensor, row: int, column: int, value: float) -> Tensor:
    """As x but for one value; it is copied by its bits."""
    x = x.clone()
    x[row, column] = torch.tensor(value).to(x.dtype)
    return x


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@not_finite
@pytest.mark.parametrize("lengths", [(70, 200, 9), (3, 2, 1)], ids=str)
def test_attention_hands_on_what_is_not_finite(dtype: torch.dtype, value: float, lengths: tuple[int, ...]) -> None:
    packing, token = packing_of(lengths), lengths[0] + lengths[1] // 2
    qkv = randn(sum(lengths), 3 * 64, seed=0, dtype=dtype)
    mates = torch.cat([torch.arange(lengths[0]), torch.arange(sum(lengths[:2]), sum(lengths))])
    chosen = Kept(torch.tensor([0, token, token + lengths[1] // 3]), packing_of([1, 2, 0]))
    for part in range(3):
        broken = with_one(qkv, token, 64 * part + 5, value)
        for score in ("received", "received_off_diagonal", "received_max", "value_norm"):
            got, want, before = (
                backend.scored_attention(values, packing, 2, score)
                for backend, values in ((NATIVE, broken), (PLAIN, broken), (NATIVE, qkv))
            )
            for one, other, clean in zip(got, want, before, strict=True):
                assert torch.equal(one.isfinite(), other.isfinite()), (part, score)
                assert torch.equal(one[mates], clean[mates])
        few, wanted = (backend.attention(broken, packing, 2, chosen) for backend in (NATIVE, PLAIN))
        assert torch.equal(few.isfinite(), wanted.isfinite())


def test_logits_beyond_float32_are_no_context() -> None:
    context, significance = NATIVE.scored_attention(torch.full((40, 96), 3e19), packing_of([40]), 2, "received_max")
    assert context.isnan().all()
    assert significance.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@not_finite
def test_products_hand_on_what_is_not_finite(dtype: torch.dtype, value: float) -> None:
    layer, x, residual = (
        layer_of(80, 64, 0, dtype),
        randn(70, 64, seed=2, dtype=dtype),
        randn(70, 80, seed=3, dtype=dtype),
    )
    norm = of_tensors(LayerNorm, weight=randn(80, seed=4, dtype=dtype), bias=randn(80, seed=5, dtype=dtype), eps=1e-12)
    compiled, broken, mates = laid_out(layer), with_one(x, 33, 9, value), torch.arange(70) != 33
    activations: tuple[Activation | None, ...] = (None, "gelu", "gelu_tanh", "relu", "silu")
    for activation in activations:
        got, before = (NATIVE.linear(values, compiled, activation) for values in (broken, x))
        assert torch.equal(got.isfinite(), PLAIN.linear(broken, layer, activation).isfinite()), activation
        assert torch.equal(got[mates], before[mates])
    for values, rest in ((broken, residual), (x, with_one(residual, 33, 7, value))):
        got, before = (NATIVE.add_norm(*pair, norm) for pair in ((values, compiled, rest), (x, compiled, residual)))
        assert got[33].isnan().all()
        assert torch.equal(got[mates], before[mates])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_lie_anywhere(dtype: torch.dtype) -> None:
    qkv, packing = randn(75, 99, seed=0, dtype=dtype)[:, 1:97], packing_of([75])
    got, want = (NATIVE.scored_attention(rows, packing, 1, "received") for rows in (qkv, qkv.contiguous()))
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))


def test_a_dtype_that_the_steps_do_not_take_is_named() -> None:
    steps, x = torch.ops.dtbert_native, randn(80, 64, seed=0)
    panels = steps.to_panels(x, None)
    for dtype, said in ((torch.float16, "Half"), (torch.float64, "Double"), (torch.int8, "Char")):
        with pytest.raises(TypeError, match=f"states in float32 or bfloat16, not in {said}"):
            steps.linear(x.to(dtype), panels, torch.zeros(80, dtype=dtype), 0)
    with pytest.raises(TypeError, match="weights in float32, bfloat16 or int8, not in Half"):
        steps.to_panels(x.half(), None)


def test_sizes_that_the_steps_do_not_take_go_to_torch() -> None:
    small = layer_of(2, 48, 0, torch.float32)
    NATIVE.prepare(small)
    assert not small.laid_out
    x, packing = randn(9, 48, seed=1), packing_of([4, 5])
    assert error(NATIVE.linear(x, small), PLAIN.linear(x.double(), doubled(small))) < 1e-6
    qkv = randn(9, 3 * 26, seed=2)
    assert error(NATIVE.attention(qkv, packing, 1), PLAIN.attention(qkv.double(), packing, 1)) < 1e-6


def test_no_tokens_give_no_rows() -> None:
    layer, none = laid_out(layer_of(64, 64, 0, torch.float32)), torch.empty(0, 64)
    assert NATIVE.linear(none, layer).shape == (0, 64)
    assert NATIVE.attention(torch.empty(0, 96), packing_of([]), 1).shape == (0, 32)


def make_model(backend: str) -> BertForQuestionAnswering:
    sizes = BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, intermediate_size=128, vocab_size=50)
    model = BertForQuestionAnswering(sizes, backend=backend)  # type: ignore[arg-type]
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.prepare()
    return model.eval()


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        LengthSchedule.ratios([0.6, 0.3]),
        LengthSchedule.ratios([0.5, 0.5], scorer="cls"),
        LengthSchedule.ratios([0.7, 0.7], scorer="answer_overlap"),
    ],
)
def test_model_agrees_with_the_reference(schedule: LengthSchedule | None) -> None:
    ids = [list(range(n)) for n in (5, 40, 17)]
    batch = PackedBatch.from_lists(ids, [[int(i > 3) for i in one] for one in ids])
    got, want = (make_model(name).forward_packed(batch, schedule) for name in ("native", "reference"))
    for one, other in zip(got, want, strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_layout_is_no_identity() -> None:
    model, plain = make_model("native"), make_model("reference")
    assert model.encoder.layers[0].qkv.laid_out
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.encoder.layers[0].qkv.laid_out
        for name, value in plain.state_dict().items():
            assert torch.equal(other.state_dict()[name], value), name
    model.requires_grad_(True)
    assert model.encoder.layers[0].qkv.weight.shape == (192, 64)


def test_what_is_laid_out_stays_so() -> None:
    model = make_model("native")
    before = model.encoder.layers[0].qkv.weight.clone()
    model.prepare()
    assert torch.equal(model.encoder.layers[0].qkv.weight, before)


def test_one_dtype_that_is_right_is_enough_where_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_right", lambda dtype: dtype == torch.float32)
    native.available.cache_clear()
    assert choose_backend("cpu", "native") == "native"
    assert not native.available(torch.bfloat16)
    native.available.cache_clear()


def test_the_default_is_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = Sizes(torch.float32)
    for ratio, chosen in ((0.9, "native"), (1.1, "cpu")):
        native.pays.cache_clear()
        monkeypatch.setattr(native, "verdict", lambda ratio=ratio: {"torch.float32": ratio})
        assert choose_backend("cpu", None, sizes) == chosen
    native.pays.cache_clear()
    assert choose_backend("cpu", "native", sizes) == "native"
    with pytest.raises(ValueError, match=r"does not compute in torch\.float64"):
        choose_backend("cpu", "native", Sizes(torch.float64))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Nothing is built there yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    native.pays.cache_clear()
    yield tmp_path
    native.pays.cache_clear()


def test_without_a_compiler_torch_serves(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(elsewhere))
    with pytest.raises(native.BuildError, match=r"no C\+\+ compiler is here: install one of g\+\+, clang\+\+"):
        native.build()
    assert choose_backend("cpu", None, Sizes(torch.float32)) == "cpu"
    with pytest.raises(ValueError, match="was not built for this torch and processor: run `dtbert build`"):
        choose_backend("cpu", "native", Sizes(torch.float32))


def test_a_failing_compiler_is_quoted_and_leaves_nothing(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = elsewhere / "g++"
    failing.write_text("#!/bin/sh\necho 'x.cpp:1: error: no such thing' >&2\nexit 1\n")
    failing.chmod(failing.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{elsewhere}:/usr/bin:/bin")
    with pytest.raises(native.BuildError, match="no such thing"):
        native.build()
    assert [file.name for file in native.library().parent.iterdir()] == ["lock"]


def test_what_was_measured_is_kept(elsewhere: Path) -> None:
    native.library().parent.mkdir(parents=True)
    assert compiler.verdict() == {}
    native.record({"torch.float32": 0.8})
    assert compiler.verdict() == {"torch.float32": 0.8}
    for damaged in ("{", "[]", '{"torch.float32": null}'):
        native.library().with_suffix(".json").write_text(damaged)
        assert compiler.verdict() == {}


def test_gelu_is_exact_far_out() -> None:
    layer = layer_of(64, 64, 0, torch.float32)
    layer.weight.data = torch.eye(64)
    layer.bias.zero_()
    x = torch.linspace(-30, 30, 64)[None]
    assert torch.allclose(NATIVE.linear(x, laid_out(layer), "gelu"), F.gelu(x), atol=2e-6)


@pytest.mark.skipif(torch.bfloat16 not in DTYPES, reason="this processor has no products in bfloat16")
def test_gelu_of_bfloat16_is_right_to_a_ten_thousandth() -> None:
    layer = layer_of(64, 64, 0, torch.bfloat16)
    layer.weight.data = torch.eye(64, dtype=torch.bfloat16)
    layer.bias.zero_()
    x = torch.cat([torch.linspace(-end, end, 64 * 32) for end in (6.0, 60.0)]).view(-1, 64).bfloat16()
    want = F.gelu(x.double())
    rounded = 2**-8 * want.abs()
    assert ((NATIVE.linear(x, laid_out(layer), "gelu") - want).abs() <= 1e-4 + rounded).all()


def test_a_cache_that_cannot_be_looked_into_holds_nothing(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", f"/{'x' * 300}")  # as wrong for root as another's folder is for others
    assert choose_backend("cpu", None, Sizes(torch.float32)) == "cpu"
    assert "run `dtbert build`" in native.why_not(torch.float32)


def test_whoever_has_no_home_needs_none(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", homeless)
    assert choose_backend("cpu", None, Sizes(torch.float32)) == "cpu"
    with pytest.raises(native.BuildError, match=r"Could not determine home directory.*set XDG_CACHE_HOME"):
        native.build()


def test_the_library_of_openmp_may_lie_in_a_folder_with_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/my project/.venv/torch/lib/libgomp-24e2ab19.so.1.0.0"
    maps = f"7f00-7f01 r-xp 00000000 08:01 1234                       {path}\n7f02-7f03 rw-p 00000000 00:00 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: maps)
    assert compiler._openmp() == [path]
