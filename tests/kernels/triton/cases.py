"""What the tests of the kernels share: the backend and its oracle, dtypes, sizes, parameters, and float64 twins."""

import copy
from typing import TypeVar

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dtbert.kernels import Backend, get_backend
from dtbert.kernels.parameters import LayerNorm, Linear, of_tensors
from tests.tolerances import STEP

TRITON = get_backend("cpu", "triton")
ORACLE = Backend()

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
TOKENS = [1, 63, 127, 128, 200, 384, 512]
WIDTHS = [312, 384, 768]

M = TypeVar("M", bound=nn.Module)


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Within the step's tolerance of a float64 oracle, in the dtype that was asked for."""
    assert got.dtype == dtype
    assert want.dtype == torch.float64
    torch.testing.assert_close(got.double(), want, atol=STEP[dtype], rtol=STEP[dtype])


def parameters(kind: type[M], **values: Tensor | nn.Module | float | None) -> M:
    """A module of given tensors that are its parameters, as in a model."""
    return of_tensors(
        kind, **{k: nn.Parameter(v, requires_grad=False) if isinstance(v, Tensor) else v for k, v in values.items()}
    )


def random_linear(inner: int, outer: int, dtype: torch.dtype, generator: torch.Generator) -> Linear:
    weight = torch.randn(outer, inner, generator=generator) / inner**0.5
    return parameters(Linear, weight=weight.to(dtype), bias=torch.randn(outer, generator=generator).to(dtype))


def random_norm(width: int, dtype: torch.dtype, generator: torch.Generator, eps: float = 1e-12) -> LayerNorm:
    weight, bias = (torch.randn(width, generator=generator).to(dtype) for _ in range(2))
    return parameters(LayerNorm, weight=weight, bias=bias, eps=eps)


def doubled(module: M) -> M:
    return copy.deepcopy(module).double()


def far_apart(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``[rows, columns]`` whose rows lie 2^30 values apart: from the third on, 32-bit addresses fail.

    Pages that nobody touches take no memory.
    """
    stride = 2**30
    kind = {torch.float32: np.float32, torch.float16: np.float16}[dtype]
    values = torch.from_numpy(np.zeros((rows - 1) * stride + columns, kind))
    return values.as_strided((rows, columns), (stride, 1))
