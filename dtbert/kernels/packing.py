"""Packed sequences: where each lies among the tokens of all, and which of these a layer keeps."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch import Tensor


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device; a GPU is not waited for."""
    # From memory that is not pinned a copy waits for all that the GPU was told before.
    pinned = host.pin_memory() if device.type == "cuda" and not torch.compiler.is_compiling() else host
    return pinned.to(device, non_blocking=True)


class Packing:
    """Where each of B sequences lies among T packed tokens.

    Attributes:
        seqlens: lengths in tokens, on the host.
        cu_seqlens: their running sum, int32 ``[B + 1]`` on the device, as flash-attention names it.
        num_tokens: T.
        max_seqlen: tokens in the longest sequence.
    """

    __slots__ = ("cu_seqlens", "max_seqlen", "num_tokens", "seqlens")

    def __init__(self, seqlens: Sequence[int], cu_seqlens: Tensor) -> None:
        self.seqlens = tuple(seqlens)
        self.cu_seqlens = cu_seqlens
        self.num_tokens = sum(self.seqlens)
        # Without `default`, which torch.compile does not trace where lengths are symbols.
        self.max_seqlen = max(self.seqlens) if self.seqlens else 0

    @classmethod
    def stack(cls, lengths: Sequence[Sequence[int]], device: torch.device) -> "list[Packing]":
        """One packing per row of ``lengths``, in one transfer to the device."""
        sums = to_device(torch.tensor([[0, *accumulate(row)] for row in lengths], dtype=torch.int32), device)
        return [cls(row, cu_seqlens) for row, cu_seqlens in zip(lengths, sums.unbind(), strict=True)]

    @classmethod
    def on_device(cls, cu_seqlens: Tensor, num_tokens: int, max_seqlen: int) -> "Packing":
        """Sequences whose lengths no host knows: ``seqlens`` are empty, ``max_seqlen`` is theirs, or more."""
        packing = cls((), cu_seqlens)
        packing.num_tokens, packing.max_seqlen = num_tokens, max_seqlen
        return packing

    @property
    def slices(self) -> list[slice]:
        """The rows of each sequence."""
        return [slice(begin, end) for begin, end in pairwise(accumulate(self.seqlens, initial=0))]


class Kept(NamedTuple):
    """Tokens that a layer keeps: ``rows``, int64 ``[K]``, ascending among the packed tokens, and their own packing."""

    rows: Tensor
    packing: Packing


class Left(NamedTuple):
    """The tokens of a batch that are left, and the final states of the others.

    Attributes:
        packing: of the T tokens that are left.
        rows: int64 ``[T]``, where these stand in the batch; None while all are left.
        final: the states ``[., H]`` of the batch, those that are not left as they will stay; None while all are left.
        segments: int64, of the batch: tokens of segment 0 stay whatever their significance; None: they need not.
        keep_first: the first token of each sequence stays.
    """

    packing: Packing
    rows: Tensor | None = None
    final: Tensor | None = None
    segments: Tensor | None = None
    keep_first: bool = False

    def forced(self) -> Tensor | None:
        """bool ``[T]``: the tokens that stay whatever their significance; None where each has to show its own."""
        stay = None
        if self.segments is not None:
            stay = (self.segments if self.rows is None else self.segments.index_select(0, self.rows)) == 0
        if self.keep_first:
            if stay is None:
                stay = torch.zeros(self.packing.num_tokens, dtype=torch.bool, device=self.packing.cu_seqlens.device)
            stay = stay.index_fill(0, self.packing.cu_seqlens[:-1].long(), True)
        return stay

    def above_all(self, significance: Tensor) -> Tensor:
        """The significance ``[T]``, infinite where a token stays whatever it is."""
        forced = self.forced()
        return significance if forced is None else significance.masked_fill(forced, torch.inf)


class Partials(NamedTuple):
    """Significance in parts, as a backend may leave it for its own `Backend.drop`.

    Attributes:
        values: float32 ``[P, N, T]``, for blocks of queries and heads; a sequence has as many blocks as it needs.
        block: queries in a block.
        maximum: a token's significance is the greatest of its parts, else their sum.
    """

    values: Tensor
    block: int
    maximum: bool


class TokenIds(NamedTuple):
    """What a token enters the network as: three int64 ``[T]``."""

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
