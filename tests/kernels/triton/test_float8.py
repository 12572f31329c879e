"""Rows in fp8 and what multiplies them, against the specification: interpreted, but for the rounding, which is torch's.

The interpreter's own conversion to fp8 is wrong, and it has no products in fp8: the kernels leave float32, and torch
rounds; the product is the plain one. What remains for a GPU is its conversion, and `torch._scaled_mm`.
"""

import gc
import weakref
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import Activation, Backend, Sizes, TokenIds, get_backend
from dtbert.kernels.float8 import FLOAT8, rows_product, scale_rows
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear, of_tensors
from dtbert.kernels.reference import activate
from dtbert.kernels.triton import Float8, Triton, float8
from dtbert.kernels.triton.float8 import carrying, rows_of
from dtbert.kernels.triton.float8 import scale_rows as launch
from dtbert.model import BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.weights.quantize import quantize_layers
from tests.kernels.triton.cases import parameters, random_norm
from tests.kernels.triton.test_graphs import PAIRS, assert_same_bits
from tests.peer import make_config, make_dtbert, make_peer

BF16 = torch.bfloat16
BACKEND = get_backend("cpu", "triton", Sizes(FLOAT8))


def random_rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    # Of very different sizes, the last of zeros.
    return (x * torch.logspace(-3, 3, shape[0])[:, None] * (torch.arange(shape[0]) < shape[0] - 1)[:, None]).to(BF16)


def in_float8(outputs: int, inputs: int, seed: int = 0) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, inputs, generator=generator) / inputs**0.5
    layer = parameters(Linear, weight=weight, bias=torch.randn(outputs, generator=generator).to(BF16))
    values, scale = scale_rows(weight)
    layer.hold_scaled(values, scale.squeeze(1))
    return layer


def assert_carries(x: Tensor) -> None:
    """The rows in fp8 beside a tensor are those of the tensor."""
    carried, want = x._float8, scale_rows(x)  # type: ignore[attr-defined]
    assert torch.equal(carried.values.view(torch.uint8), want.values.view(torch.uint8))
    assert torch.equal(carried.scale, want.scale)


def test_the_backend_is_chosen_by_the_dtype_of_the_products() -> None:
    assert type(BACKEND) is Float8
    assert type(get_backend("cpu", "triton", Sizes(BF16))) is Triton
    assert BACKEND.name == "triton"


@settings(max_examples=10)
@given(rows=st.integers(1, 20), width=st.integers(1, 200), seed=st.integers(0, 99))
def test_rows_have_the_bits_of_the_specification(rows: int, width: int, seed: int) -> None:
    x = random_rows(rows, width, seed=seed)
    assert_carries(carrying(x, *launch(x, "")))


def test_rows_wider_than_a_block_and_of_a_wider_tensor() -> None:
    for x in (random_rows(3, 4100), random_rows(17, 96)[:, 7:55]):
        assert_carries(carrying(x, *launch(x, "")))


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize("width", [48, 4100])
def test_rows_are_activated_first(activation: Activation, width: int) -> None:
    x = random_rows(4, width)
    values, scale = launch(x, activation)
    want = activate(x.double(), activation)
    # Four significant bits, of a value of 8: and of GELU by a polynomial, that is right to 4e-5.
    allowed = want.abs() * (2**-4 + 2**-7) + scale.double() * 2**-10 + 1e-4 * x.abs().double().clamp_max(1)
    assert ((values.double() * scale.double() - want).abs() <= allowed).all()


@pytest.mark.parametrize("rows", [None, torch.tensor([0, 2, 3, 6])], ids=["all", "kept"])
def test_layer_norm_writes_both(rows: Tensor | None) -> None:
    x, layer, residual = random_rows(7, 64), in_float8(48, 64), random_rows(7, 48, seed=1)
    norm = random_norm(48, BF16, torch.Generator().manual_seed(2))
    x = x if rows is None else x[rows]
    got = BACKEND.add_norm(x, layer, residual, norm, rows)
    assert_carries(got)
    assert got.dtype == BF16
    want = Backend().add_norm(x, layer, residual, norm, rows)
    # The one rounds the product to bfloat16, the other the sum.
    torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


def test_embeddings_write_both() -> None:
    tables = [random_rows(count, 40, seed=count) for count in (30, 2, 20)]
    norm = random_norm(40, BF16, torch.Generator().manual_seed(0))
    embeddings = of_tensors(Embeddings, word=tables[0], token_type=tables[1], position=tables[2], norm=norm)
    ids = TokenIds(torch.arange(19), torch.arange(19) % 2, torch.arange(19))
    got = BACKEND.embed(ids, embeddings)
    assert_carries(got)
    assert torch.equal(got, Triton().embed(ids, embeddings))


@pytest.mark.parametrize("tokens", [0, 1, 19])
def test_products_are_those_of_the_specification(tokens: int) -> None:
    x, layer = random_rows(20, 64)[:tokens], in_float8(96, 64)
    assert torch.equal(BACKEND.linear(x, layer), Backend().linear(x, layer))


def test_what_was_activated_goes_to_the_next_product_in_fp8_alone() -> None:
    x, wide, back = random_rows(9, 32), in_float8(64, 32), in_float8(32, 64, 1)
    norm = random_norm(32, BF16, torch.Generator().manual_seed(2))
    between = BACKEND.linear(x, wide, "gelu")
    assert between.dtype == FLOAT8
    assert rows_of(between).values.data_ptr() == between.data_ptr()
    got, want = BACKEND.add_norm(between, back, x, norm), Backend()
    want_states = want.add_norm(want.linear(x, wide, "gelu"), back, x, norm)
    torch.testing.assert_close(got, want_states, rtol=5e-2, atol=5e-2)


def test_what_carries_rows_is_freed_with_its_last_name() -> None:
    x, layer = random_rows(9, 32), in_float8(64, 32)
    gc.disable()
    try:
        made = [BACKEND.linear(x, layer, "gelu"), carrying(x.clone(), *launch(x, ""))]
        alive = [weakref.ref(part) for one in made for part in (one, rows_of(one).values)]
        del made
        assert not any(one() is not None for one in alive)
    finally:
        gc.enable()


def test_a_device_is_asked_for_the_right_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    assert float8._is_right(torch.device("cpu"))
    monkeypatch.setattr(float8, "rows_product", lambda *operands: 1.1 * rows_product(*operands))
    assert not float8._is_right(torch.device("cpu"))


def test_a_layer_that_is_not_in_fp8_is_computed_as_ever() -> None:
    x, residual = random_rows(9, 24), random_rows(9, 20)
    generator = torch.Generator().manual_seed(0)
    layer = parameters(Linear, weight=torch.randn(20, 24, generator=generator).to(BF16), bias=torch.zeros(20).to(BF16))
    norm = random_norm(20, BF16, generator)
    assert torch.equal(BACKEND.linear(x, layer, "gelu"), Triton().linear(x, layer, "gelu"))
    assert torch.equal(BACKEND.add_norm(x, layer, residual, norm), Triton().add_norm(x, layer, residual, norm))


def model_in_float8(backend: str | None) -> BertForQuestionAnswering:
    model = make_dtbert(make_peer(make_config(layers=2, heads=2, head_size=16)), backend=backend).to(BF16)
    quantize_layers(model, FLOAT8)
    model._chosen = None
    model.prepare()
    return model


@pytest.fixture(scope="module")
def model() -> BertForQuestionAnswering:
    return model_in_float8("triton")


def random_batch(*lengths: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, 120, (n,), generator=generator).tolist() for n in lengths]
    return PackedBatch.from_lists(ids, [[int(3 * i >= n) for i in range(n)] for n in lengths])


# The scorer "random" keeps the same tokens whatever the rounding.
@pytest.mark.parametrize("schedule", [None, LengthSchedule.ratios((0.6, 0.3), scorer="random", keep_cls=True)])
def test_model_is_as_right_as_the_specification(
    model: BertForQuestionAnswering, schedule: LengthSchedule | None
) -> None:
    batch = random_batch(31, 9, 1)
    assert type(model.backend) is Float8
    exact = make_dtbert(make_peer(make_config(layers=2, heads=2, head_size=16)), backend="reference")
    want = torch.stack(exact.forward_packed(batch, schedule), 1)
    errors = [
        (torch.stack(one.forward_packed(batch, schedule), 1).float() - want).norm() / want.norm()
        for one in (model, model_in_float8("reference"))
    ]
    assert 0 < errors[0] <= 1.5 * errors[1] < 0.3


def test_padded_batches_and_replays_have_the_bits_of_the_batch_alone(model: BertForQuestionAnswering) -> None:
    recorder = assert_same_bits(model, PAIRS, LengthSchedule.ratios((0.6, 0.2), scorer="answer"))
    assert recorder.replayed >= 1


def test_states_in_another_dtype_are_refused(model: BertForQuestionAnswering) -> None:
    for dtype in (torch.float32, torch.float16):
        with pytest.raises(ValueError, match="products in fp8 take and leave states in bfloat16, not in"):
            model_in_float8("triton").to(dtype)


def test_norms_and_embeddings_of_no_rows() -> None:
    layer, norm = in_float8(16, 16), parameters(LayerNorm, weight=torch.ones(16), bias=torch.zeros(16), eps=1e-12)
    none = torch.empty(0, 16, dtype=BF16)
    assert BACKEND.add_norm(none, layer, none, norm).shape == (0, 16)
