"""Which tokens each layer kept, as the models tell it on request."""

from typing import NamedTuple

import torch
from torch import Tensor

from dtbert.model.batch import unpack
from dtbert.model.encoder import PackedEncoding


class LayerKept(NamedTuple):
    """What one layer kept of a padded batch, ``[B, S]``, or of a packed one, ``[T]``.

    Attributes:
        mask: bool; the tokens that leave the layer, False at padding.
        significance: float32; what each token that entered the layer scored, infinite where it stays whatever its
            score, and NaN at all others. The highest are kept, of equals the first. None where the layer drops nothing:
            then nothing is scored.
        lengths: how many tokens of each sequence leave the layer.
    """

    mask: Tensor
    significance: Tensor | None
    lengths: tuple[int, ...]

    def unpack(self, rows: Tensor | None, shape: torch.Size) -> "LayerKept":
        """Of a packed batch the padded form; ``rows`` as `pack_padded` gives them."""
        scores = None if self.significance is None else unpack(self.significance, rows, shape, torch.nan)
        return LayerKept(unpack(self.mask, rows, shape, False), scores, self.lengths)


def layers_kept(encoding: PackedEncoding, num_tokens: int) -> tuple[LayerKept, ...]:
    """By layer, of an encoding that holds significance, of a batch of so many tokens."""
    nothing = torch.zeros(num_tokens, dtype=torch.bool, device=encoding.states.device)
    return tuple(
        LayerKept(~nothing if rows is None else nothing.index_fill(0, rows, True), scores, lengths)
        for rows, scores, lengths in zip(encoding.kept, encoding.significance, encoding.lengths, strict=True)
    )
