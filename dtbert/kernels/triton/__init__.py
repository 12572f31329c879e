"""The steps on a GPU: Triton kernels, one step per file, and cuBLAS for the products. Inference only.

Importing this package imports triton. With ``TRITON_INTERPRET=1`` set before that, the kernels are interpreted on the
CPU: slow, and for tests alone.
"""

from dtbert.kernels.triton.attention import MAX_HEAD_SIZE, attention, attention_significance
from dtbert.kernels.triton.embed_layer_norm import embed_layer_norm
from dtbert.kernels.triton.launch import FLOAT_DTYPES, INTERPRETED
from dtbert.kernels.triton.linear import linear
from dtbert.kernels.triton.linear_add_layer_norm import gather_add_layer_norm, linear_add_layer_norm
from dtbert.kernels.triton.linear_gelu import fused_linear_gelu, linear_gelu
from dtbert.kernels.triton.restore import restore
from dtbert.kernels.triton.select_tokens import select_tokens

__all__ = [
    "FLOAT_DTYPES",
    "INTERPRETED",
    "MAX_HEAD_SIZE",
    "attention",
    "attention_significance",
    "embed_layer_norm",
    "fused_linear_gelu",
    "gather_add_layer_norm",
    "linear",
    "linear_add_layer_norm",
    "linear_gelu",
    "restore",
    "select_tokens",
]
