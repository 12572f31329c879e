"""Packed batches: the tokens of all sequences end to end, with no padding anywhere inside."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class Packing:
    """Where each of B sequences lies among T packed tokens.

    ``seqlens`` are the lengths in tokens, on the host; ``cu_seqlens`` their running sum, int32 ``[B + 1]`` on the
    device, as flash-attention names it.
    """

    seqlens: tuple[int, ...]
    cu_seqlens: Tensor

    @property
    def num_tokens(self) -> int:
        return sum(self.seqlens)

    @property
    def max_seqlen(self) -> int:
        # Without `default`, which torch.compile does not trace where lengths are symbols.
        return max(self.seqlens) if self.seqlens else 0

    @staticmethod
    def stack(lengths: Sequence[Sequence[int]], device: torch.device) -> list["Packing"]:
        """One packing per row of ``lengths``, in one transfer to the device."""
        sums = torch.tensor([[0, *accumulate(row)] for row in lengths], dtype=torch.int32).to(device, non_blocking=True)
        return [Packing(tuple(row), cu_seqlens) for row, cu_seqlens in zip(lengths, sums, strict=True)]


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of token ids, packed: ``input_ids``, ``token_type_ids``, ``position_ids`` int64 ``[T]``.

    ``id_ranges`` are the lowest and the highest of each of the three, where the batch was made on the host; None:
    whoever needs them must ask the device, and wait for it. A batch that is given other ids needs other ranges.
    ``overlap`` is float32 ``[T]``, `question_overlap` of the whole text, where a scorer asks for it.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    packing: Packing
    id_ranges: tuple[list[int], list[int]] | None = None
    overlap: Tensor | None = None

    @classmethod
    def from_lists(
        cls,
        input_ids: Sequence[Sequence[int]],
        token_type_ids: Sequence[Sequence[int]] | None = None,
        device: torch.device | str = "cpu",
    ) -> "PackedBatch":
        """Pack lists of token ids; segment ids are 0 by default, positions count from 0 in each sequence.

        Raises:
            ValueError: no sequence, an empty one, or segment ids of another length than the token ids.
        """
        lengths = [len(ids) for ids in input_ids]
        if not lengths or not all(lengths):
            raise ValueError(f"expected at least one sequence and one token in each, got lengths {lengths}")
        if token_type_ids is None:
            token_type_ids = [[0] * length for length in lengths]
        if [len(ids) for ids in token_type_ids] != lengths:
            raise ValueError(
                f"token_type_ids have lengths {[len(ids) for ids in token_type_ids]}, input_ids {lengths}: "
                "they must match"
            )
        rows = [
            [token for ids in input_ids for token in ids],
            [segment for ids in token_type_ids for segment in ids],
            [position for length in lengths for position in range(length)],
        ]
        return cls.from_rows(torch.tensor(rows, dtype=torch.int64), lengths, torch.device(device))

    @classmethod
    def from_rows(cls, rows: Tensor, seqlens: Sequence[int], device: torch.device) -> "PackedBatch":
        """The batch of packed token, segment and position ids, int64 ``[3, T]`` on the host, in one transfer."""
        lowest, highest = rows.aminmax(dim=1)
        packing = Packing.stack([seqlens], device)[0]
        tokens, segments, positions = rows.to(device, non_blocking=True)
        return cls(tokens, segments, positions, packing, (lowest.tolist(), highest.tolist()))

    def keep(self, keep_indices: Tensor, packing: Packing) -> "PackedBatch":
        """The batch of the kept tokens alone, each with the position it had."""
        return replace(
            self,
            input_ids=self.input_ids[keep_indices],
            token_type_ids=self.token_type_ids[keep_indices],
            position_ids=self.position_ids[keep_indices],
            packing=packing,
            overlap=None if self.overlap is None else self.overlap[keep_indices],
        )


def pack_padded(
    input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
) -> tuple[PackedBatch, Tensor]:
    """Pack a padded batch.

    Args:
        input_ids: integers ``[B, S]``.
        attention_mask: ``[B, S]``, 1 (or True) at real tokens and 0 at padding, wherever it lies; all real by default.
        token_type_ids: integers ``[B, S]``, 0 by default.

    Returns:
        The packed batch, in which a token's position is its column, and ``rows``, int64 ``[T]``: where each packed
        token stands in the flattened batch (`unpack` takes it).

    Raises:
        ValueError: wrong number of dimensions, shapes or devices that differ, mask values other than 0 and 1, or a row
            of padding alone.
        TypeError: not a tensor of integers.
    """
    for name, tensor in (
        ("input_ids", input_ids),
        ("attention_mask", attention_mask),
        ("token_type_ids", token_type_ids),
    ):
        if tensor is None and name != "input_ids":
            continue
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor of integers [B, S], not {type(tensor).__name__}")
        if tensor.is_complex() or (tensor.is_floating_point() and name != "attention_mask"):
            raise TypeError(f"{name} must be a tensor of integers, not of {tensor.dtype}")
        if tensor.ndim != 2 or tensor.numel() == 0:
            raise ValueError(f"{name} must have shape [B, S] with at least one token, not {list(tensor.shape)}")
        if tensor.shape != input_ids.shape or tensor.device != input_ids.device:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)} on {tensor.device}, "
                f"input_ids {list(input_ids.shape)} on {input_ids.device}: they must match"
            )
    if attention_mask is None:
        mask = torch.ones_like(input_ids, dtype=torch.bool)
    else:
        mask = attention_mask.bool()
        if not torch.equal(mask.to(attention_mask.dtype), attention_mask):
            raise ValueError("attention_mask must hold 1 at real tokens and 0 at padding, and nothing else")
    seqlens = mask.sum(1).tolist()
    if 0 in seqlens:
        raise ValueError(
            f"row {seqlens.index(0)} of attention_mask is padding alone: drop the row or mark its tokens with 1"
        )
    rows = mask.flatten().nonzero().squeeze(1)
    segments = torch.zeros_like(rows) if token_type_ids is None else token_type_ids.flatten()[rows].long()
    packing = Packing.stack([seqlens], input_ids.device)[0]
    batch = PackedBatch(input_ids.flatten()[rows].long(), segments, rows % input_ids.shape[1], packing)
    return batch, rows


def unpack(values: Tensor, rows: Tensor, shape: torch.Size, fill: float) -> Tensor:
    """Packed values ``[T, ...]`` back into a padded batch ``[B, S, ...]``, with ``fill`` at the padding."""
    padded = values.new_full((shape.numel(), *values.shape[1:]), fill)
    return padded.index_copy(0, rows, values).unflatten(0, tuple(shape))
