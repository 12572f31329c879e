"""Training in bfloat16 with float32 master weights (Micikevicius et al. 2018, arXiv 1710.03740)."""

import copy

import torch
from torch import nn


class NarrowWeights:
    """A module's copy in bfloat16, which the passes go through, while the optimizer changes the module itself.

    The weights are converted once a step, where autocast does it in every pass, and what goes from step to step of the
    network needs no conversion.

    Args:
        masters: the module that is trained, in float32.

    Attributes:
        module: the copy, on the same device.
    """

    def __init__(self, masters: nn.Module) -> None:
        self.module = copy.deepcopy(masters).bfloat16()
        pairs = list(zip(masters.parameters(), self.module.parameters(), strict=True))
        self._masters, self._copies = map(list, zip(*(pair for pair in pairs if pair[0].requires_grad), strict=True))

    @torch.no_grad()
    def refresh(self) -> None:
        """Make the copy's weights the masters', rounded."""
        torch._foreach_copy_(self._copies, self._masters)

    @torch.no_grad()
    def hand_over(self) -> None:
        """Add the copy's gradients to the masters', in float32, and forget them."""
        for master, narrow in zip(self._masters, self._copies, strict=True):
            if narrow.grad is None:
                continue
            if master.grad is None:
                master.grad = narrow.grad.float()
            else:
                master.grad += narrow.grad
            narrow.grad = None
