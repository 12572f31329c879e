"""Where packed tokens lie in a padded batch: known once for each packing."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from dtbert.kernels import Packing

# Of the packings of a step: its batch, and what each layer of each sub-model keeps of it.
_REMEMBERED = 64


class Places(NamedTuple):
    """Of T packed tokens of B sequences: ``rows``, int64 ``[T]``, in ``[B * S]``; ``real``, bool ``[B, S]``."""

    rows: Tensor
    real: Tensor

    def pad(self, packed: Tensor, fill: float = 0) -> Tensor:
        """``[T, ...]`` to ``[B, S, ...]``, with ``fill`` past each sequence's end."""
        padded = packed.new_full((self.real.numel(), *packed.shape[1:]), fill)
        return padded.index_copy(0, self.rows, packed).unflatten(0, self.real.shape)

    def unpad(self, padded: Tensor) -> Tensor:
        """``[B, S, ...]`` to ``[T, ...]``."""
        return padded.flatten(0, 1).index_select(0, self.rows)


@lru_cache(_REMEMBERED)
def places_of(packing: Packing) -> Places:
    """The places of a packing's tokens; the device is not waited for."""
    starts, lengths = packing.cu_seqlens[:-1].long(), packing.cu_seqlens.diff()
    columns = torch.arange(packing.max_seqlen, device=lengths.device)
    # A token's row exceeds its number by the padding before its sequence.
    padding = torch.arange(len(lengths), device=lengths.device) * packing.max_seqlen - starts
    before = padding.repeat_interleave(lengths.long(), output_size=packing.num_tokens)
    return Places(torch.arange(packing.num_tokens, device=lengths.device) + before, columns < lengths[:, None])
