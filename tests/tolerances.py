"""One table of tolerances, and what is held to a peer instead: how wrong dtbert may be where rounding decides."""

from collections.abc import Sequence

import torch
from torch import Tensor

# Absolute error allowed against the float64 or float32 oracle, for values of order 1: a step may round its result, and
# what enters its products, to the dtype.
STEP = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}

# How much more wrong than the peer, in multiples of the peer's own error and beside it.
MULTIPLE = 2.0
BESIDE = 1e-6


def assert_as_right_as_peer(
    got: Sequence[Tensor], peers: Sequence[Tensor], exact: Sequence[Tensor], about: str = ""
) -> None:
    """Hold a network to the truth, whatever the machine: its greatest error at most twice the peer's, plus 1e-6.

    Args:
        got, peers: what dtbert and the peer computed in one dtype.
        exact: the same in float64, by the peer.
        about: said when it fails.
    """
    for place, (mine, theirs, truth) in enumerate(zip(got, peers, exact, strict=True)):
        assert truth.dtype == torch.float64
        assert mine.shape == theirs.shape == truth.shape
        error, peers_error = ((one.double() - truth).abs().max().item() for one in (mine, theirs))
        # Negated, so that NaN fails.
        if not error <= MULTIPLE * peers_error + BESIDE:
            raise AssertionError(f"{about} [{place}]: wrong by {error:.3g}, the peer by {peers_error:.3g}")
