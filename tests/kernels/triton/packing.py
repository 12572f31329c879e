"""Packed inputs of attention, as the tests of its context and of its scores share them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """The first four arguments of attention."""

    qkv: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    num_heads: int

    def doubled(self) -> "Packed":
        return self._replace(qkv=self.qkv.double())


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).int()


def pack(lengths: list[int], heads: int, head_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3 * heads * head_size, generator=generator).to(dtype)
    return Packed(qkv, offsets(lengths), max(lengths, default=0), heads)


def looking_at(chosen: Tensor, dtype: torch.dtype) -> Packed:
    """One sequence of one head of 64, in which query i attends to ``chosen[i]`` and, however rounded, to no other.

    Values are integers that depend on the token. Sums of probabilities are counts, and context is a row of values.
    """
    tokens = len(chosen)
    # Two different codes of 8 signs, repeated 8 times, differ in 8 places at least: 128 units of the exponent.
    bits = torch.arange(tokens)[:, None] >> torch.arange(8) & 1
    codes = (2.0 * bits - 1).repeat(1, 8)
    values = (torch.arange(tokens)[:, None] * 7 + torch.arange(64) * 3) % 512 - 256.0
    qkv = torch.cat([64 * codes[chosen], codes, values], 1).to(dtype)
    return Packed(qkv, offsets([tokens]), tokens, 1)
