"""Packings of given lengths, on the CPU."""

from collections.abc import Sequence

import torch

from dtbert.kernels import Packing


def packing(seqlens: Sequence[int]) -> Packing:
    return Packing.stack([list(seqlens)], torch.device("cpu"))[0]
