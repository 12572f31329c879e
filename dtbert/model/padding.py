"""Batches brought to sizes that many share, so that one CUDA graph serves them all.

Rows are added that belong to no sequence, and sequences without rows. What the steps make of such rows is undefined,
and nobody reads it. Where a choice of tokens fills fewer rows than there are, it names -1 in the others, or the last
row of what entered the layer, which is always an added one: gathers read and scatters write where nobody looks.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from dtbert.kernels import Packing
from dtbert.model.batch import PackedBatch
from dtbert.model.schedule import LengthSchedule

# Tokens come in multiples of the first, longest sequences of the second, kept tokens of the third. Chosen, not measured
# beside others: in a small batch launches take longer than the rows that are added.
_TOKENS, _LONGEST, _KEPT = 64, 128, 16


class Bucket(NamedTuple):
    """What padded batches have in common.

    Attributes:
        sequences: how many, those without tokens counted.
        tokens: rows, the added ones counted.
        longest: no sequence has more tokens.
        schedule: of the tokens that are dropped; None where it drops none of these batches'.
        drops: by layer, whether it drops.
    """

    sequences: int
    tokens: int
    longest: int
    schedule: LengthSchedule | None
    drops: tuple[bool, ...]

    @property
    def sizes(self) -> list[tuple[int, int]]:
        """Rows and longest sequence at most: of the batch, then of what leaves each layer of the schedule."""
        sizes = [(self.tokens, self.longest)]
        if self.schedule is None:
            return sizes
        most, longest = (
            self.schedule.most_kept(self.sequences, self.tokens - 1, self.longest),
            self.schedule.lengths(self.longest),
        )
        for drops, tokens, length in zip(self.drops, most, longest, strict=True):
            # One row more than can be kept, which is padding then.
            sizes.append((min(_up(tokens + 1, _KEPT), sizes[-1][0]), length) if drops else sizes[-1])
        return sizes


class Plan(NamedTuple):
    """A batch's bucket, and its sequences' lengths: as they enter, then as they leave each layer of the schedule."""

    bucket: Bucket
    lengths: list[tuple[int, ...]]

    @classmethod
    def of(cls, packing: Packing, schedule: LengthSchedule | None, positions: int) -> "Plan":
        """How to pad sequences of at most ``positions`` tokens."""
        lengths, drops = [packing.seqlens], tuple[bool, ...]()
        if schedule is not None:
            lengths += schedule.kept(packing.seqlens)
            drops = tuple(before != after for before, after in zip(lengths, lengths[1:], strict=False))
            if not any(drops) and not schedule.skip_layers:
                lengths, drops, schedule = lengths[:1], (), None
        sequences = 1 << (len(packing.seqlens) - 1).bit_length()
        tokens = packing.num_tokens + (schedule is not None)
        tokens = _up(tokens, max(_TOKENS, 1 << max(0, (tokens - 1).bit_length() - 4)))
        longest = tokens if sequences == 1 else _up(packing.max_seqlen, _LONGEST)
        return cls(Bucket(sequences, tokens, min(longest, positions), schedule, drops), lengths)


class PaddedPacking(Packing):
    """A packing among more rows than its sequences fill, of which the last ones may be empty."""

    __slots__ = ()

    def __init__(self, seqlens: Sequence[int], cu_seqlens: Tensor, size: tuple[int, int]) -> None:
        super().__init__(seqlens, cu_seqlens)
        self.num_tokens, self.max_seqlen = size


class PaddedInputs:
    """The memory on a device in which the batches of a bucket lie, one after another, for a padded forward."""

    def __init__(self, bucket: Bucket, device: torch.device) -> None:
        self._bucket, self._sizes = bucket, bucket.sizes
        # Ids of added rows are 0, or those of an earlier batch: either way they are in the tables.
        self._ids = torch.zeros(3, bucket.tokens, dtype=torch.int64, device=device)
        shape = (len(self._sizes), bucket.sequences + 1)
        self._offsets = torch.zeros(shape, dtype=torch.int32, device=device)

    def fill(self, batch: PackedBatch, plan: Plan) -> None:
        """Put a batch in, with one transfer from the host."""
        ids = self._ids[:, : batch.packing.num_tokens].unbind()
        torch._foreach_copy_(ids, (batch.input_ids, batch.token_type_ids, batch.position_ids))
        empty = self._bucket.sequences - len(batch.packing.seqlens)
        offsets = [[0, *accumulate(row + (0,) * empty)] for row in plan.lengths]
        self._offsets.copy_(torch.tensor(offsets, dtype=torch.int32), non_blocking=True)

    def batch(self, plan: Plan) -> tuple[PackedBatch, list[Packing]]:
        """The padded batch, and the packing that leaves each layer.

        ``seqlens`` are the plan's, for whoever reads them on the host. On the device all follows what is put in.
        """
        empty = self._bucket.sequences - len(plan.lengths[0])
        lengths = [row + (0,) * empty for row in plan.lengths]
        packings = [*map(PaddedPacking, lengths, self._offsets.unbind(), self._sizes)]
        input_ids, token_type_ids, position_ids = self._ids.unbind()
        return PackedBatch(input_ids, token_type_ids, position_ids, packings[0]), [*packings[1:]]


def _up(number: int, step: int) -> int:
    """The least multiple of a step that is not below a number."""
    return -(-number // step) * step
