"""A product with nothing to fuse: cuBLAS."""

import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels.checks import check_product
from dtbert.kernels.triton.launch import check_launch


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`reference.linear` by cuBLAS, 2 T in out FLOPs; float32 is exact unless the caller has allowed TF32."""
    check_product("linear", x, weight, bias)
    check_launch("linear", x=x, weight=weight, bias=weight if bias is None else bias)
    return F.linear(x, weight, bias)
