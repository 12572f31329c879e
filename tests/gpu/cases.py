"""What the tests on a GPU share: dtypes, the bounds of error, packings, and kernels that are a part of a step."""

import math
from itertools import accumulate

import pytest
import torch
from torch import Tensor

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
# |out - float64| / |float64|: a few roundings to the dtype. Scores are sums in float32 whatever the dtype.
BOUND = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
SCORE_BOUND = 1e-5
MIXED = [1, 63, 0, 127, 128, 200, 384, 512]


def relative_error(got: Tensor, want: Tensor) -> float:
    """``|got - want| / |want|``, Euclidean norms in float64; NaN counts as infinitely wrong."""
    error = float((got.double() - want.double()).norm() / want.double().norm())
    return math.inf if math.isnan(error) else error


def assert_near(got: Tensor, want: Tensor, bound: float) -> None:
    assert got.shape == want.shape
    assert relative_error(got, want) <= bound


def offsets(lengths: list[int]) -> Tensor:
    """``cu_seqlens`` on the GPU."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device="cuda")


def randn(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, device="cuda", generator=generator).to(dtype)


def segments_of(lengths: list[int]) -> Tensor:
    """Segment ids: the first third of each sequence is the question."""
    return torch.tensor([int(3 * i >= n) for n in lengths for i in range(n)], dtype=torch.int64, device="cuda")


def keep_of(lengths: list[int], fraction: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A random keep set of each sequence: ``keep_indices`` and its ``cu_seqlens``."""
    generator = torch.Generator().manual_seed(seed)
    counts = [math.ceil(fraction * length) for length in lengths]
    begins = [0, *accumulate(lengths)]
    kept = [
        torch.randperm(length, generator=generator)[:count].sort().values + begin
        for begin, length, count in zip(begins, lengths, counts, strict=False)
    ]
    return torch.cat(kept).cuda(), offsets(counts)


def fused_linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """Product and activation in one kernel, which `linear_gelu` takes where that is faster."""
    # Imported here: imported with this file, triton would make compiled kernels of those that other tests interpret.
    from dtbert.kernels.triton.linear import fused_linear as launch

    return launch(x, weight, bias, activation)


def add_norm(
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    keep_indices: Tensor | None = None,
) -> Tensor:
    """`linear_add_layer_norm` after its product."""
    from dtbert.kernels.triton.add_norm import add_norm as launch

    return launch(product, bias, residual, norm_weight, norm_bias, 1e-12, keep_indices)
