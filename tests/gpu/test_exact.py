"""Integer-valued inputs, whose results are exact in any order of summation: a single wrong operand shows.

Some ptxas versions miscompile pipelined products on Hopper whose left operand is in registers, so every shipped
configuration is held to exact results, many times over.
"""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from dtbert.kernels import attention, linear_gelu
from tests.gpu.cases import DTYPES, fused_linear, offsets
from tests.gpu.exact import EXACT_SCORES, exact_score, exact_sequence, question_of

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned")]

REPEATS = 40
HEADS = 12
LENGTHS = [1, 16, 100, 128, 200, 384, 512, 333]


SHAPES = [(1, 768, 3072), (127, 312, 1200), (384, 384, 1536), (1000, 768, 3072), (4096, 768, 3072)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_size", [32, 64, 128])
@pytest.mark.parametrize("kind", [None, *EXACT_SCORES])
def test_attention_with_probabilities_of_powers_of_two_is_exact(kind: Any, head_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(4):
        sequences = [exact_sequence(length, HEADS, head_size, generator) for length in LENGTHS]
        qkv = torch.cat([sequence.qkv.flatten(1) for sequence in sequences]).to(dtype)
        context = torch.cat([sequence.context.flatten(1) for sequence in sequences]).to(dtype)
        segments = [torch.arange(length, device="cuda") >= question_of(length) for length in LENGTHS]
        options = {"significance": kind, "token_type_ids": torch.cat(segments).long()}
        for _ in range(REPEATS // 4):
            got, significance = attention(qkv, offsets(LENGTHS), max(LENGTHS), HEADS, **options, backend="triton")
            assert torch.equal(got, context)
            if kind is not None:
                want = [exact_score(kind, s.probabilities, question_of(len(s.qkv))) for s in sequences]
                # 2^x and log2 are the hardware's approximations; a wrong operand is off by far more.
                torch.testing.assert_close(significance, torch.cat(want).float(), rtol=1e-5, atol=1e-5)


@pytest.fixture
def _summed_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """By default cuBLAS may split a product and add its parts in half precision, which is not exact."""
    for dtype in ("fp16", "bf16"):
        monkeypatch.setattr(torch.backends.cuda.matmul, f"allow_{dtype}_reduced_precision_reduction", False)


@pytest.mark.usefixtures("_summed_in_float32")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "step",
    [
        pytest.param(fused_linear, id="fused_linear"),
        pytest.param(functools.partial(linear_gelu, backend="triton"), id="linear_gelu"),
    ],
)
def test_linear_relu_of_integers_is_exact(step: Callable[..., Tensor], dtype: torch.dtype) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator, device="cuda").to(dtype)

    for tokens, width, wide in SHAPES:
        x, weight, bias = integers(tokens, width), integers(wide, width), integers(wide)
        want = (x.double() @ weight.double().T + bias.double()).relu().to(dtype)
        for _ in range(REPEATS):
            assert torch.equal(step(x, weight, bias, "relu"), want)
