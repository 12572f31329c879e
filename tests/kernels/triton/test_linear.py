"""Product, bias and activation, in one kernel and as a product and a pass, against the reference in float64."""

import importlib
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import Activation, reference
from dtbert.kernels.parameters import Linear
from dtbert.kernels.triton.launch import ARCHITECTURES
from tests.kernels.triton.cases import (
    DTYPES,
    ORACLE,
    TOKENS,
    TRITON,
    WIDTHS,
    assert_close,
    doubled,
    far_apart,
    parameters,
    random_linear,
)

ACTIVATIONS = get_args(Activation)
# The package's name for it is the function.
MODULE = importlib.import_module("dtbert.kernels.triton.linear")


def fused(x: Tensor, layer: Linear, activation: Activation) -> Tensor:
    return MODULE.fused_linear(x, layer.weight, layer.bias, activation)


def inputs(tokens: int, inner: int, outer: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Linear]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, inner, generator=generator).to(dtype)
    return x, random_linear(inner, outer, dtype, generator)


def check(x: Tensor, layer: Linear, activation: Activation = "gelu") -> None:
    want = ORACLE.linear(x.double(), doubled(layer), activation)
    for step in (fused, TRITON.linear):
        assert_close(step(x, layer, activation), want, x.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", WIDTHS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activated_product_agrees_with_reference(activation: Activation, inner: int, dtype: torch.dtype) -> None:
    check(*inputs(63, inner, 70, dtype), activation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_agrees_with_reference(dtype: torch.dtype) -> None:
    x, layer = inputs(63, 312, 70, dtype)
    assert_close(TRITON.linear(x, layer), ORACLE.linear(x.double(), doubled(layer)), dtype)


@pytest.mark.parametrize("tokens", [0, *TOKENS])
def test_activated_product_takes_any_number_of_tokens(tokens: int) -> None:
    check(*inputs(tokens, 33, 65, torch.float32))


@settings(max_examples=15)
@given(
    tokens=st.integers(1, 70),
    inner=st.integers(1, 70),
    outer=st.integers(1, 140),
    activation=st.sampled_from(ACTIVATIONS),
)
def test_activated_product_takes_any_shape(tokens: int, inner: int, outer: int, activation: Activation) -> None:
    check(*inputs(tokens, inner, outer, torch.float32), activation)


def test_product_takes_no_bias() -> None:
    x, layer = inputs(5, 40, 30, torch.float32)
    layer.bias = None
    check(x, layer)
    assert_close(TRITON.linear(x, layer), ORACLE.linear(x.double(), doubled(layer)), torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_fused_product_of_integers_is_exact_in_every_configuration(
    arch: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # 161 terms of -1, 0 and 1 sum to integers that every dtype holds.
    monkeypatch.setattr(MODULE, "architecture", lambda device: arch)
    x, weight, bias = (torch.randint(-1, 2, shape).to(dtype) for shape in ((150, 160), (200, 160), (200,)))
    got = fused(x, parameters(Linear, weight=weight, bias=bias), "relu")
    want = (x.double() @ weight.double().T + bias).relu()
    assert want.max() <= 256
    assert torch.equal(got.double(), want)


def test_activations_are_exact_far_from_0() -> None:
    x = torch.tensor([[-40.0], [-9.0], [0.0], [9.0], [40.0], [1e4]])
    for activation in ACTIVATIONS:
        got = fused(x, parameters(Linear, weight=torch.ones(1, 1), bias=None), activation)
        torch.testing.assert_close(got, reference.activate(x, activation), atol=1e-7, rtol=1e-6)


def test_one_kernel_is_taken_where_the_table_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(MODULE, "fused_linear", lambda x, *_: calls.append(len(x)))
    x, layer = inputs(4, 8, 8, torch.float32)
    TRITON.linear(x, layer, "gelu")
    assert calls == []
    monkeypatch.setattr(MODULE, "FUSED_FROM", {("interpreter", torch.float32): 4})
    TRITON.linear(x, layer, "gelu")
    TRITON.linear(x[:3], layer, "gelu")
    TRITON.linear(x, layer)
    assert calls == [4]


def test_fused_product_addresses_more_than_2_to_the_31_values() -> None:
    x, weight = far_apart(3, 20, torch.float16), far_apart(3, 20, torch.float16)
    x[2], weight[2] = 1, 2
    got = fused(x, parameters(Linear, weight=weight, bias=None), "relu")
    assert got.tolist() == [[0, 0, 0], [0, 0, 0], [0, 0, 40]]
