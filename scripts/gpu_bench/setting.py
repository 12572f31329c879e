"""What all sections of the benchmark share: the device, the kernels, the sizes and the inputs."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from bench.windows import squad_lengths
from torch import Tensor

from dtbert.kernels import get_backend, reference
from dtbert.model import Packing
from dtbert.profiling.ceilings import Ceilings
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
    step_tokens: tuple[int, ...]
    alone: int  # tokens of the single sequence
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
    step_tokens=(384, 3072, 12288, 49152),
    alone=128,
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
    step_tokens=(20,),
    alone=12,
    lengths=(20, 18, 12, 8, 4, 2),
    batch_tokens=(400,),
    batch_windows=(2,),
)


@dataclass(frozen=True)
class Setting:
    """Where and how everything is measured; ``kernels`` is the module of kernels under test."""

    device: torch.device
    dtype: torch.dtype
    kernels: Any
    sizes: Sizes
    effort: Effort
    ceilings: Ceilings
    compiles: bool  # whether torch.compile is a peer

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


class StandIn:
    """The reference under the names of the Triton kernels, for trial runs without a GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)

    fused_linear_gelu = staticmethod(reference.linear_gelu)

    @staticmethod
    def gather_add_layer_norm(
        product: Tensor,
        bias: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        keep_indices: Tensor | None = None,
    ) -> Tensor:
        gathered = residual if keep_indices is None else residual.index_select(0, keep_indices)
        return torch.nn.functional.layer_norm(product + bias + gathered, norm_weight.shape, norm_weight, norm_bias, eps)


def kernels_for(device: torch.device) -> Any:
    return get_backend(device, "triton") if device.type == "cuda" else StandIn()


def checkpoint_sizes(sizes: Sizes) -> dict[str, int]:
    """The sizes as transformers' config names them."""
    return {
        "num_attention_heads": sizes.heads,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.feed_forward,
        "num_hidden_layers": len(sizes.lengths),
    }
