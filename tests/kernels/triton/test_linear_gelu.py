"""Product, bias and activation, in one kernel and as a product and a pass, against the reference in float64."""

import importlib
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import Activation, reference
from dtbert.kernels.triton import fused_linear_gelu, linear_gelu
from dtbert.kernels.triton.launch import ARCHITECTURES
from tests.kernels.triton.cases import DTYPES, TOKENS, WIDTHS, assert_close, doubled, far_apart

ACTIVATIONS = get_args(Activation)
# The package's name for it is the function.
MODULE = importlib.import_module("dtbert.kernels.triton.linear_gelu")


def inputs(tokens: int, inner: int, outer: int, dtype: torch.dtype, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((tokens, inner), (outer, inner), (outer,))
    x, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    return [tensor.to(dtype) for tensor in (x, weight / inner**0.5, bias)]


def check(values: list[Tensor], activation: Activation = "gelu") -> None:
    want = reference.linear_gelu(*doubled(*values), activation)
    for step in (fused_linear_gelu, linear_gelu):
        assert_close(step(*values, activation), want, values[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", WIDTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_linear_gelu_agrees_with_reference(activation: Activation, inner: int, dtype: torch.dtype) -> None:
    check(inputs(63, inner, 70, dtype), activation)


@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_linear_gelu_takes_any_number_of_tokens(tokens: int) -> None:
    check(inputs(tokens, 33, 65, torch.float32))


@settings(max_examples=15)
@given(
    tokens=st.integers(1, 70),
    inner=st.integers(1, 70),
    outer=st.integers(1, 140),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_linear_gelu_takes_any_shape(tokens: int, inner: int, outer: int, activation: Activation) -> None:
    check(inputs(tokens, inner, outer, torch.float32), activation)


def test_linear_gelu_takes_no_bias() -> None:
    x, weight, _ = inputs(5, 40, 30, torch.float32)
    for step in (fused_linear_gelu, linear_gelu):
        torch.testing.assert_close(step(x, weight, None), reference.linear_gelu(x, weight, None), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fused_product_of_integers_is_exact_in_every_configuration(
    arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 161 terms of -1, 0 and 1 sum to integers that every dtype holds.
    monkeypatch.setattr(MODULE, "architecture", lambda device: arch)
    x, weight, bias = (torch.randint(-1, 2, shape).to(dtype) for shape in ((150, 160), (200, 160), (200,)))
    got, want = fused_linear_gelu(x, weight, bias, "relu"), (x.double() @ weight.double().T + bias).relu()
    assert want.max() <= 256
    assert torch.equal(got.double(), want)


def test_activations_are_exact_far_from_0() -> None:
    x = torch.tensor([[-40.0], [-9.0], [0.0], [9.0], [40.0], [1e4]])
    for activation in ACTIVATIONS:
        got = fused_linear_gelu(x, torch.ones(1, 1), None, activation)
        torch.testing.assert_close(got, reference.activate(x, activation), atol=1e-7, rtol=1e-6)


def test_one_kernel_is_taken_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(MODULE, "_fused_linear_gelu", lambda x, *_: calls.append(len(x)))
    values = inputs(4, 8, 8, torch.float32)
    linear_gelu(*values)
    assert calls == []
    monkeypatch.setattr(MODULE, "FUSED_FROM", {("interpreter", torch.float32): 4})
    linear_gelu(*values)
    linear_gelu(values[0][:3], *values[1:])
    assert calls == [4]


def test_fused_product_addresses_more_than_2_to_the_31_values() -> None:
    x, weight = far_apart(3, 20, torch.float16), far_apart(3, 20, torch.float16)
    x[2], weight[2] = 1, 2
    assert fused_linear_gelu(x, weight, None, "relu").tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 40]]
