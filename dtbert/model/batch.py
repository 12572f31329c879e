"""Packed batches: the tokens of all sequences end to end, with no padding anywhere inside."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dtbert.kernels import Packing, TokenIds
from dtbert.kernels.packing import to_device
from dtbert.model.config import BertConfig


@dataclass(frozen=True)
class PackedBatch:
    """B sequences of token ids, packed: ``input_ids``, ``token_type_ids``, ``position_ids`` int64 ``[T]``.

    ``id_ranges`` are the lowest and the highest of each of the three, where the batch was made on the host; None:
    whoever needs them must ask the device, and wait for it. A batch that is given other ids needs other ranges.
    """

    input_ids: Tensor
    token_type_ids: Tensor
    position_ids: Tensor
    packing: Packing
    id_ranges: tuple[list[int], list[int]] | None = None

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
        (packing,) = Packing.stack([seqlens], device)
        input_ids, token_type_ids, position_ids = to_device(rows, device).unbind()
        return cls(input_ids, token_type_ids, position_ids, packing, _ranges(rows))

    @property
    def ids(self) -> TokenIds:
        return TokenIds(self.input_ids, self.token_type_ids, self.position_ids)

    def check(self, config: BertConfig) -> None:
        """Raise ValueError where an id is outside its table; waits for the device where `id_ranges` are not known."""
        lowest, highest = self.id_ranges or _ranges(torch.stack(self.ids))
        limits = (
            ("input_ids", config.vocab_size, "the vocabulary", "use the tokenizer of this model"),
            ("token_type_ids", config.type_vocab_size, "type_vocab_size", "segments count from 0"),
            ("positions", config.max_position_embeddings, "the position table", "split longer texts into windows"),
        )
        for (name, size, table, advice), low, high in zip(limits, lowest, highest, strict=True):
            if low < 0 or high >= size:
                raise ValueError(f"{name} run from {low} to {high}, {table} holds 0 to {size - 1}: {advice}")


def _ranges(rows: Tensor) -> tuple[list[int], list[int]]:
    """The lowest and the highest of each row of ``[3, T]``, in one wait for the device."""
    lowest, highest = torch.stack(rows.aminmax(dim=1)).tolist()
    return lowest, highest


class PaddedInputs(NamedTuple):
    """What a model is called with, as `pack_padded` takes it."""

    input_ids: Tensor
    attention_mask: Tensor | None = None
    token_type_ids: Tensor | None = None


def padded_ids(
    input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
) -> tuple[TokenIds, Tensor | None]:
    """A padded batch's ids, int64 ``[B, S]`` each, and its mask, bool ``[B, S]``: `pack_padded` without a look inside.

    Raises:
        ValueError, TypeError: as `pack_padded`, but for what the tensors hold.
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
    positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand(input_ids.shape)
    segments = torch.zeros_like(positions) if token_type_ids is None else token_type_ids
    mask = None if attention_mask is None else attention_mask.bool()
    return TokenIds(input_ids.long(), segments.long(), positions), mask


def pack_padded(
    input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
) -> tuple[PackedBatch, Tensor | None]:
    """Pack a padded batch.

    Args:
        input_ids: integers ``[B, S]``.
        attention_mask: ``[B, S]``, 1 (or True) at real tokens and 0 at padding, wherever it lies; all real by default.
        token_type_ids: integers ``[B, S]``, 0 by default.

    Returns:
        The packed batch, in which a token's position is its column, and ``rows``, int64 ``[T]``: where each packed
        token stands in the flattened batch, or None where nothing is padding (`unpack` takes it).

    Raises:
        ValueError: wrong number of dimensions, shapes or devices that differ, mask values other than 0 and 1, or a row
            of padding alone.
        TypeError: not a tensor of integers.
    """
    padded, mask = padded_ids(input_ids, attention_mask, token_type_ids)
    seqlens = [input_ids.shape[1]] * len(input_ids)
    rows = None
    if attention_mask is not None and mask is not None:
        if not torch.equal(mask.to(attention_mask.dtype), attention_mask):
            raise ValueError("attention_mask must hold 1 at real tokens and 0 at padding, and nothing else")
        seqlens = mask.sum(1).tolist()
        if 0 in seqlens:
            raise ValueError(
                f"row {seqlens.index(0)} of attention_mask is padding alone: drop the row or mark its tokens with 1"
            )
        if sum(seqlens) < mask.numel():
            rows = mask.flatten().nonzero().squeeze(1)
    ids = torch.stack(padded).flatten(1)
    if rows is not None:
        ids = ids.index_select(1, rows)
    (packing,) = Packing.stack([seqlens], input_ids.device)
    own, segments, positions = ids.unbind()
    return PackedBatch(own, segments, positions, packing, _ranges(ids)), rows


def unpack(values: Tensor, rows: Tensor | None, shape: torch.Size, fill: float) -> Tensor:
    """Packed values ``[T, ...]`` back into a padded batch ``[B, S, ...]``, with ``fill`` at the padding."""
    if rows is None:
        return values.unflatten(0, tuple(shape))
    padded = values.new_full((shape.numel(), *values.shape[1:]), fill)
    return padded.index_copy_(0, rows, values).unflatten(0, tuple(shape))
