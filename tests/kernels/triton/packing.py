"""Kept tokens and packed inputs of attention, as the tests of several steps share them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dtbert.kernels import Kept, Packing
from tests.kernels.packings import packing as packing_of


def keep(packing: Packing, places: Sequence[Sequence[int]]) -> Kept:
    """The tokens at these places of each sequence, counted from its start."""
    rows = [rows.start + place for rows, kept in zip(packing.slices, places, strict=True) for place in kept]
    return Kept(torch.tensor(rows, dtype=torch.int64), packing_of([len(kept) for kept in places]))


class Packed(NamedTuple):
    """The first three arguments of attention."""

    qkv: Tensor
    packing: Packing
    num_heads: int

    def doubled(self) -> "Packed":
        return self._replace(qkv=self.qkv.double())


def pack(lengths: list[int], heads: int, head_size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Packed:
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(sum(lengths), 3 * heads * head_size, generator=generator).to(dtype)
    return Packed(qkv, packing_of(lengths), heads)


def among_others(alone: Packed) -> tuple[Packed, slice]:
    """A batch that holds the same sequence after two and before one of other lengths, and its rows there."""
    (length,), others = alone.packing.seqlens, [130, 7]
    before = pack(others, alone.num_heads, alone.qkv.shape[1] // (3 * alone.num_heads), alone.qkv.dtype, seed=1).qkv
    packing = packing_of([*others, length, 3])
    return Packed(torch.cat([before, alone.qkv, before[:3]]), packing, alone.num_heads), packing.slices[2]


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
    return Packed(qkv, packing_of([tokens]), 1)
