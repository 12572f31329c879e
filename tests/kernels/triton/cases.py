"""What the tests of the kernels share: dtypes, sizes, and float64 twins of their inputs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.tolerances import STEP

DTYPES = [
    pytest.param(torch.float32, id="fp32"),
    pytest.param(torch.float16, id="fp16"),
    pytest.param(torch.bfloat16, id="bf16"),
]
TOKENS = [1, 63, 127, 128, 200, 384, 512]
WIDTHS = [312, 384, 768]


def assert_close(got: Tensor, want: Tensor, dtype: torch.dtype) -> None:
    """Within the step's tolerance of a float64 oracle, in the dtype that was asked for."""
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want.double(), atol=STEP[dtype], rtol=STEP[dtype])


def doubled(*tensors: Tensor) -> list[Tensor]:
    return [tensor.double() for tensor in tensors]


def far_apart(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Zeros ``[rows, columns]`` whose rows lie 2^30 values apart: from the third on, 32-bit addresses fail.

    Pages that nobody touches take no memory.
    """
    stride = 2**30
    kind = {torch.float32: np.float32, torch.float16: np.float16}[dtype]
    values = torch.from_numpy(np.zeros((rows - 1) * stride + columns, kind))
    return values.as_strided((rows, columns), (stride, 1))
