"""What all sections of the benchmark share: the device, the backend, the sizes and the inputs."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from bench.windows import squad_lengths
from torch import Tensor

from dtbert.kernels import Activation, Backend, get_backend
from dtbert.kernels.parameters import LayerNorm, Linear, of_tensors
from dtbert.model import Packing
from gpu_bench.timing import Effort

Row = dict[str, Any]
Rows = Iterator[Row]

# Tokens of segment 0 in every sequence: [CLS], a question, [SEP].
QUESTION_TOKENS = 14
# Input sets together are several times the largest L2 cache.
_ROTATED_BYTES = 2**28
_MOST_SETS = 16


class Sizes(NamedTuple):
    """Everything that a trial run on a CPU makes smaller."""

    heads: int
    head_size: int
    feed_forward: int
    equal: tuple[int, int]  # sequences x tokens
    windows: int  # of SQuAD
    tuned_windows: int  # on which configurations are timed
    step_tokens: tuple[int, ...]
    alone: int  # tokens of the single sequence
    small_batches: tuple[tuple[int, int], ...]  # sequences x tokens, on which CUDA graphs are measured
    lengths: tuple[int, ...]  # after each layer
    batch_tokens: tuple[int, ...]  # that dtbert tries on SQuAD
    batch_windows: tuple[int, ...]  # that its peers try

    @property
    def hidden_size(self) -> int:
        return self.heads * self.head_size


# Dynamic-TinyBERT: 6 layers of 768, at the published lengths.
FULL = Sizes(
    heads=12,
    head_size=64,
    feed_forward=3072,
    equal=(32, 384),
    windows=256,
    tuned_windows=64,
    step_tokens=(384, 3072, 12288, 49152),
    alone=128,
    small_batches=((1, 128), (1, 384), (8, 384), (32, 384)),
    lengths=(269, 253, 252, 202, 104, 34),
    batch_tokens=(8192, 16384, 65536),
    batch_windows=(32, 64, 256),
)
TINY = Sizes(
    heads=2,
    head_size=16,
    feed_forward=48,
    equal=(2, 24),
    windows=3,
    tuned_windows=0,
    step_tokens=(20,),
    alone=12,
    small_batches=((1, 12),),
    lengths=(20, 18, 12, 8, 4, 2),
    batch_tokens=(400,),
    batch_windows=(2,),
)


class Launchers(NamedTuple):
    """Kernels that are a part of a step, or the whole of it where that is faster.

    Attributes:
        fused_linear: of x, weight, bias and activation: a product and its activation.
        add_norm: of product, bias, residual, the norm's weight and bias, eps and rows: `Backend.add_norm` after it.
    """

    fused_linear: Callable[[Tensor, Tensor, Tensor | None, Activation], Tensor]
    add_norm: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, Tensor | None], Tensor]


@dataclass(frozen=True)
class Setting:
    """Where and how everything is measured; ``backend`` is the one under test."""

    device: torch.device
    dtype: torch.dtype
    backend: Backend
    launchers: Launchers
    sizes: Sizes
    effort: Effort

    @classmethod
    def on(cls, device: torch.device, sizes: Sizes, effort: Effort) -> "Setting":
        """In bfloat16 on the kernels, without a GPU in float32."""
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        return cls(device, dtype, *backend_for(device), sizes, effort)

    @property
    def works(self) -> dict[str, list[int]]:
        """The two packings on which attention is measured, by name: lengths of the sequences."""
        sequences, tokens = self.sizes.equal
        lengths = squad_lengths(self.sizes.windows)
        return {
            f"{sequences}x{tokens}": [tokens] * sequences,
            f"{len(lengths)} SQuAD lengths": lengths,
        }

    def randn(self, *shape: int, seed: int = 0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        return torch.randn(shape, device=self.device, generator=generator).to(self.dtype)

    def sets(self, bytes_each: int) -> int:
        """How many input sets of so many bytes are rotated."""
        if self.device.type != "cuda":
            return 2
        return min(_MOST_SETS, max(2, math.ceil(_ROTATED_BYTES / bytes_each)))

    def packing(self, lengths: Sequence[int]) -> Packing:
        return Packing.stack([lengths], self.device)[0]


def backend_for(device: torch.device) -> tuple[Backend, Launchers]:
    """The kernels; without a GPU the reference in their place, for a trial."""
    if device.type != "cuda":
        return Backend(), Launchers(_linear, _add_norm)
    from dtbert.kernels.triton.add_norm import add_norm
    from dtbert.kernels.triton.linear import fused_linear

    return get_backend(device, "triton"), Launchers(fused_linear, add_norm)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation) -> Tensor:
    return Backend().linear(x, linear_of(weight, bias), activation)


def _add_norm(
    product: Tensor,
    bias: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    eps: float,
    rows: Tensor | None,
) -> Tensor:
    gathered = residual if rows is None else residual.index_select(0, rows)
    return F.layer_norm(product + bias + gathered, norm_weight.shape, norm_weight, norm_bias, eps)


def linear_of(weight: Tensor, bias: Tensor | None) -> Linear:
    return of_tensors(Linear, weight=weight, bias=bias)


def norm_of(weight: Tensor, bias: Tensor, eps: float) -> LayerNorm:
    return of_tensors(LayerNorm, weight=weight, bias=bias, eps=eps)


def checkpoint_sizes(sizes: Sizes) -> dict[str, int]:
    """The sizes as transformers' config names them."""
    return {
        "num_attention_heads": sizes.heads,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": len(sizes.lengths),
    }
