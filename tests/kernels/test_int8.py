"""Products in int8: their specification, and the compiled ones against it."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import Activation, Backend, native
from dtbert.kernels.cpu import multiplies_natively
from dtbert.kernels.int8 import int8_product, quantize_tokens
from dtbert.kernels.parameters import LayerNorm, Linear, of_tensors
from tests.kernels.test_native import BOUND, error, not_finite, randn, with_one

DTYPES = [dtype for dtype in (torch.float32, torch.bfloat16) if multiplies_natively(dtype)]
NATIVE, PLAIN = native.Native(), Backend()


def in_int8(outputs: int, inputs: int, seed: int, dtype: torch.dtype) -> Linear:
    generator = torch.Generator().manual_seed(seed)
    values = torch.randint(-127, 128, (outputs, inputs), generator=generator, dtype=torch.int8)
    scale = torch.rand(outputs, generator=generator) / 127 / inputs**0.5
    layer = of_tensors(Linear, weight=None, bias=randn(outputs, seed=seed + 1, dtype=dtype))
    layer.hold_scaled(values, scale)
    return layer


def compiled(layer: Linear) -> Linear:
    assert layer.scale is not None
    other = of_tensors(Linear, weight=None, bias=layer.bias)
    other.hold_scaled(layer.weight.detach().clone(), layer.scale)
    NATIVE.prepare(other)
    assert other.laid_out
    assert torch.equal(other.plain_weight, layer.weight)
    return other


def tokens_of(rows: int, columns: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Of very different sizes, some of one sign, one of zeros."""
    x = randn(rows, columns, seed=seed) * torch.logspace(-4, 4, rows)[:, None]
    x[::3] = x[::3].abs()
    x[1::5] = -x[1::5].abs()
    x[-1] = 0
    return x.to(dtype)


@given(rows=st.integers(1, 20), columns=st.integers(1, 90), seed=st.integers(0, 2**20))
def test_levels_are_within_half_a_step_and_zero_is_exact(rows: int, columns: int, seed: int) -> None:
    x = tokens_of(rows, columns, seed)
    values, zero, step = quantize_tokens(x)
    assert torch.equal(values, values.round())
    assert 0 <= values.min() <= values.max() <= 255
    assert (((values - zero) * step - x).abs() <= 0.501 * step).all()
    assert torch.equal(quantize_tokens(torch.cat([x, x.new_zeros(rows, 1)], 1)).values[:, -1:], zero)


@given(rows=st.integers(1, 20), columns=st.integers(1, 90), outputs=st.integers(1, 40), seed=st.integers(0, 2**20))
def test_product_is_that_of_the_levels(rows: int, columns: int, outputs: int, seed: int) -> None:
    layer, x = in_int8(outputs, columns, seed, torch.float32), tokens_of(rows, columns, seed)
    assert layer.scale is not None
    values, zero, step = (part.double() for part in quantize_tokens(x))
    weight = layer.weight.double() * layer.scale.double()[:, None]
    want = (values - zero) * step @ weight.T + layer.bias.double()
    got = int8_product(x, layer.weight, layer.scale, layer.bias)
    assert error(got, want) <= BOUND[torch.float32]
    alone = torch.cat([int8_product(row[None], layer.weight, layer.scale, layer.bias) for row in x])
    assert torch.equal(got, alone)


@pytest.mark.usefixtures("int8_steps")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "gelu", "relu"])
@given(tokens=st.integers(1, 140), outputs=st.integers(4, 12), inputs=st.integers(4, 12), seed=st.integers(0, 2**20))
def test_compiled_linear_agrees(
    dtype: torch.dtype, activation: Activation | None, tokens: int, outputs: int, inputs: int, seed: int
) -> None:
    layer, x = in_int8(16 * outputs, 16 * inputs, seed, dtype), tokens_of(tokens, 16 * inputs, seed + 2, dtype)
    want = PLAIN.linear(x, layer, activation)
    assert error(NATIVE.linear(x, compiled(layer), activation), want.double()) <= BOUND[dtype]


@pytest.mark.usefixtures("int8_steps")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(tokens=st.integers(1, 140), hidden=st.integers(4, 12), inputs=st.integers(4, 12), seed=st.integers(0, 2**20))
def test_compiled_add_norm_agrees(dtype: torch.dtype, tokens: int, hidden: int, inputs: int, seed: int) -> None:
    layer, x = in_int8(16 * hidden, 16 * inputs, seed, dtype), randn(tokens, 16 * inputs, seed=seed + 2, dtype=dtype)
    residual, weight, bias = (
        randn(*shape, seed=seed + at, dtype=dtype)
        for at, shape in enumerate(((tokens, 16 * hidden), (16 * hidden,), (16 * hidden,)), start=3)
    )
    norm = of_tensors(LayerNorm, weight=weight, bias=bias, eps=1e-12)
    want = PLAIN.add_norm(x, layer, residual, norm)
    assert error(NATIVE.add_norm(x, compiled(layer), residual, norm), want.double()) <= BOUND[dtype]


@pytest.mark.usefixtures("int8_steps")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_depend_neither_on_the_batch_nor_on_threads(dtype: torch.dtype) -> None:
    layer, x = compiled(in_int8(192, 128, 0, dtype)), tokens_of(407, 128, 1, dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found += [NATIVE.linear(x[100 : 100 + rows], layer, "gelu")[:50] for rows in (50, 307)]
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(one, found[0]) for one in found)


@not_finite
def test_a_token_that_is_not_finite_gives_nan_and_no_other_does(value: float) -> None:
    layer, x = in_int8(10, 20, 0, torch.float32), tokens_of(9, 20, 1)
    assert layer.scale is not None
    product = partial(int8_product, weight=layer.weight, scale=layer.scale, bias=layer.bias)
    for place in (0, 7, 19):
        got = product(with_one(x, 5, place, value))
        assert got[5].isnan().all()
        assert torch.equal(got[[0, 1, 2, 3, 4, 6, 7, 8]], product(x)[[0, 1, 2, 3, 4, 6, 7, 8]])


def test_a_token_whose_range_is_beyond_float32_gives_nan() -> None:
    layer, x = in_int8(10, 20, 0, torch.float32), with_one(torch.full((1, 20), 3e38), 0, 3, -3e38)
    assert layer.scale is not None
    assert int8_product(x, layer.weight, layer.scale, layer.bias).isnan().all()


@pytest.mark.usefixtures("int8_steps")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@not_finite
def test_compiled_steps_give_nan_for_a_token_that_is_not_finite(dtype: torch.dtype, value: float) -> None:
    layer, x, residual = (
        compiled(in_int8(80, 64, 0, dtype)),
        tokens_of(70, 64, 1, dtype),
        randn(70, 80, seed=2, dtype=dtype),
    )
    norm = of_tensors(LayerNorm, weight=randn(80, seed=3, dtype=dtype), bias=randn(80, seed=4, dtype=dtype), eps=1e-12)
    activations: tuple[Activation | None, ...] = (None, "gelu", "gelu_tanh", "relu", "silu")
    mates = torch.arange(70) != 33
    for place in (0, 21, 63):
        broken = with_one(x, 33, place, value)
        steps = [partial(NATIVE.linear, layer=layer, activation=activation) for activation in activations]
        for step in (*steps, partial(NATIVE.add_norm, layer=layer, residual=residual, norm=norm)):
            got, before = step(broken), step(x)
            assert got[33].isnan().all()
            assert torch.equal(got[mates], before[mates])


@pytest.mark.usefixtures("int8_steps")
def test_compiled_steps_give_nan_beyond_the_range_of_float32() -> None:
    x = with_one(torch.full((1, 64), 3e38), 0, 3, -3e38)
    assert NATIVE.linear(x, compiled(in_int8(80, 64, 0, torch.float32))).isnan().all()


@pytest.mark.usefixtures("int8_steps")
def test_a_size_that_is_not_compiled_is_computed_by_torch() -> None:
    layer, x = in_int8(10, 20, 0, torch.float32), randn(7, 20, seed=1)
    NATIVE.prepare(layer)
    assert not layer.laid_out
    assert torch.equal(NATIVE.linear(x, layer), PLAIN.linear(x, layer))


def test_a_token_of_next_to_nothing_is_nothing(int8_steps: None) -> None:
    layer, x = in_int8(80, 64, 0, torch.float32), torch.full((2, 64), 1e-38)
    x[1] = -1e-42
    assert layer.scale is not None
    assert torch.equal(int8_product(x, layer.weight, layer.scale, layer.bias), layer.bias.expand(2, 80))
    assert torch.equal(NATIVE.linear(x, compiled(layer)), layer.bias.expand(2, 80))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_states_that_the_compiled_steps_do_not_take_go_to_torch(dtype: torch.dtype, int8_steps: None) -> None:
    layer, x = in_int8(80, 64, 0, dtype), tokens_of(5, 64, 1, dtype) / 100
    want = PLAIN.linear(x, layer, "gelu")
    NATIVE.prepare(layer)
    assert torch.equal(NATIVE.linear(x, layer, "gelu"), want)
