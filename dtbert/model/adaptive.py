"""Policies by which the text decides how many tokens a layer keeps, by what their scores are and not by their number.

What they compare is a token's *share*: its part of the significance of all tokens that entered the layer, so that the
shares of a sequence sum to 1. A significance that is a logarithm (``answer``, ``answer_overlap``) is exponentiated
first. Of ``received`` this is the importance of Learned Token Pruning, the mean over heads and queries of the attention
probability that a token receives (Kim et al. 2021, arXiv 2107.00910, equation 2): the mean share of n tokens is 1 / n,
so of a longer text fewer stay in proportion. Where all scores of a sequence are 0 the shares are equal.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from dtbert.kernels import Left, Packing, Partials
from dtbert.model.policy import Policy, PolicyOptions, per_layer, tokens_of, up_to_last
from dtbert.model.scorers import is_logarithmic

# Shares are counted in whole parts of the greatest one, as sums of integers do not depend on their order, nor so on
# what else is in a batch. A sequence may have 2**18 tokens, and less than 6e-14 of the greatest share is none.
_PARTS = 2**44


class AdaptiveOptions(PolicyOptions, total=False):
    """The attributes of an `AdaptivePolicy`, by name."""

    floor: float | Sequence[float]
    ceiling: float | Sequence[float]


@dataclass(frozen=True, kw_only=True)
class AdaptivePolicy(Policy):
    """What `Threshold` and `TopP` have in common.

    Attributes:
        floor: part of the sequence's own length that a layer keeps at least, from 0; one for all layers, or one each.
            One token stays anyway.
        ceiling: part of it that a layer keeps at most, up to 1; one for all layers, or one each.
    """

    floor: float | tuple[float, ...] = 0.0
    ceiling: float | tuple[float, ...] = 1.0

    # The numbers of each layer: their name, and that by which all tokens stay.
    numbers: ClassVar[tuple[str, float]]

    def __post_init__(self) -> None:
        for name in ("floor", "ceiling"):
            given = getattr(self, name)
            is_one = isinstance(given, int | float)
            values = _checked(name, [given] if is_one else given, "a part of the sequence, from 0 to 1")
            if not is_one and len(values) != self.num_layers:
                raise ValueError(f"{len(values)} entries of {name} for {self.num_layers} layers: give one, or one each")
            object.__setattr__(self, name, values[0] if is_one else values)
        super().__post_init__()
        for layer, (low, high) in enumerate(zip(self._each(self.floor), self._each(self.ceiling), strict=True)):
            if low > high or high == 0:
                raise ValueError(f"layer {layer} would keep at least {low} and at most {high} of a sequence")

    @abstractmethod
    def chooses(self, layer: int) -> bool:
        """Whether the scores of a layer say which tokens go, whatever they are."""

    @abstractmethod
    def count(self, layer: int, shares: Tensor, forced: Tensor) -> Tensor:
        """Tokens that a layer keeps which `chooses`, before `floor` and `ceiling`.

        Args:
            layer: 0-based.
            shares: int64 ``[B, S]``, each token's share of its sequence in parts of any size; 0 at padding.
            forced: bool ``[B, S]``, tokens that stay whatever their shares.

        Returns:
            int64 ``[B]``.
        """

    def bounds(self, layer: int, sequence_length: int) -> tuple[int, int]:
        """Tokens that a layer keeps at least and at most of a sequence's own length, if so many enter it."""
        floor, ceiling = self._each(self.floor)[layer], self._each(self.ceiling)[layer]
        return tokens_of(floor, sequence_length), tokens_of(ceiling, sequence_length)

    def may_drop(self, layer: int, entered: int, sequence_length: int) -> bool:
        """Whether a layer may drop some of the tokens of a sequence that enter it."""
        floor, ceiling = self.bounds(layer, sequence_length)
        return layer not in self.skip_layers and (entered > ceiling or (entered > floor and self.chooses(layer)))

    def targets(self, packing: Packing) -> "AdaptiveTargets":
        if torch.compiler.is_exporting() or torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            raise ValueError(
                f"{type(self).__name__} decides by what a text is, which no export holds: give a LengthSchedule"
            )
        return AdaptiveTargets(self, packing.seqlens)

    def first_alone(self, positions: int) -> Self:
        # By its bounds, for which no share is counted.
        name, all_stay = self.numbers
        ends = {name: (getattr(self, name), all_stay), "floor": (self._each(self.floor), 0.0)}
        ends["ceiling"] = self._each(self.ceiling), 1 / positions
        return self._keeping_first(**{one: (*values[:-1], last) for one, (values, last) in ends.items()})

    def scores(self, lengths: Sequence[int]) -> list[bool]:
        own = lengths[0]
        # Whoever remembers scores in a layer for those after it.
        entered = (own,) * self.num_layers if self.remembers else lengths[:-1]
        scored = [self.may_drop(layer, tokens, own) for layer, tokens in enumerate(entered)]
        return up_to_last(scored) if self.remembers else scored

    def _each(self, values: float | tuple[float, ...]) -> tuple[float, ...]:
        return values if isinstance(values, tuple) else (values,) * self.num_layers


@dataclass(frozen=True)
class Threshold(AdaptivePolicy, kinds=("threshold",)):
    """A layer keeps the tokens whose share is at least its threshold (Kim et al. 2021, equation 4).

    Attributes:
        thresholds: one per layer, from 0, which keeps all, to below 1; fixed, searched (`dtbert search`) or learnt
            (`dtbert.training.learnt_thresholds`).

    Raises:
        ValueError: no thresholds, one out of range, a floor above its ceiling, an unknown scorer, or a layer that
            there is not.
    """

    thresholds: tuple[float, ...]
    kind: ClassVar[str] = "threshold"
    numbers: ClassVar[tuple[str, float]] = ("thresholds", 0.0)

    def __post_init__(self) -> None:
        wanted = "a share of the significance, at least 0 and below 1"
        object.__setattr__(self, "thresholds", _checked("thresholds", self.thresholds, wanted, below_1=True))
        super().__post_init__()

    @property
    def num_layers(self) -> int:
        return len(self.thresholds)

    def chooses(self, layer: int) -> bool:
        return self.thresholds[layer] > 0

    def count(self, layer: int, shares: Tensor, forced: Tensor) -> Tensor:
        least = self.thresholds[layer] * shares.sum(1, keepdim=True).double()
        return ((shares.double() >= least) | forced).sum(1)


@dataclass(frozen=True)
class TopP(AdaptivePolicy, kinds=("top_p",)):
    """A layer keeps the fewest tokens whose shares sum to at least its part; tokens that stay anyway count first.

    Attributes:
        parts: one per layer, above 0 and at most 1, which keeps all.

    Raises:
        ValueError: no parts, one out of range, a floor above its ceiling, an unknown scorer, or a layer that there is
            not.
    """

    parts: tuple[float, ...]
    kind: ClassVar[str] = "top_p"
    numbers: ClassVar[tuple[str, float]] = ("parts", 1.0)

    def __post_init__(self) -> None:
        wanted = "a part of the significance, above 0 and at most 1"
        object.__setattr__(self, "parts", _checked("parts", self.parts, wanted, above_0=True))
        super().__post_init__()

    @property
    def num_layers(self) -> int:
        return len(self.parts)

    def chooses(self, layer: int) -> bool:
        return self.parts[layer] < 1

    def count(self, layer: int, shares: Tensor, forced: Tensor) -> Tensor:
        least = self.parts[layer] * shares.sum(1, keepdim=True).double()
        ordered = (shares + 2 * _PARTS * forced).sort(1, descending=True).values % (2 * _PARTS)
        before = ordered.cumsum(1) - ordered
        return torch.maximum((before.double() < least).sum(1), forced.sum(1))


class AdaptiveTargets:
    """`Targets` of an adaptive policy, for sequences of these lengths; `target` waits for the device once."""

    def __init__(self, policy: AdaptivePolicy, sequence_lengths: Sequence[int]) -> None:
        self._policy, self._own = policy, sequence_lengths

    @property
    def last_drop(self) -> int:
        layers = range(self._policy.num_layers)
        return max((layer for layer in layers if self._may_drop(layer, self._own)), default=-1)

    def may_drop(self, layer: int, packing: Packing) -> bool:
        return self._may_drop(layer, packing.seqlens)

    def target(self, layer: int, left: Left, significance: Tensor | Partials) -> Packing:
        """Where those lie that leave a layer.

        Raises:
            ValueError: a significance has no shares: it is negative, infinite or NaN.
        """
        assert isinstance(significance, Tensor), "parts are for the backend that left them"
        packing = left.packing
        if not self.may_drop(layer, packing):
            return packing
        counts: Sequence[int] = packing.seqlens
        if self._policy.chooses(layer):
            counts = counts_by_share(
                partial(self._policy.count, layer), layer, self._policy.scorers[layer], left, significance
            )
        kept = []
        for count, entered, length in zip(counts, packing.seqlens, self._own, strict=True):
            floor, ceiling = self._policy.bounds(layer, length)
            kept.append(min(entered, max(floor, min(ceiling, count))))
        return packing if tuple(kept) == packing.seqlens else Packing.stack([kept], significance.device)[0]

    def _may_drop(self, layer: int, entered: Sequence[int]) -> bool:
        return any(self._policy.may_drop(layer, *one) for one in zip(entered, self._own, strict=True))


def counts_by_share(
    count: Callable[[Tensor, Tensor], Tensor], layer: int, scorer: str, left: Left, significance: Tensor
) -> list[int]:
    """Tokens of each sequence that stay, as ``count`` says of shares and forced tokens: see `AdaptivePolicy.count`.

    The device is waited for once.

    Raises:
        ValueError: a significance, which is the scorer's in this layer, has no shares: it is negative, infinite or NaN.
    """
    logarithmic = is_logarithmic(scorer)
    real = torch.arange(left.packing.max_seqlen, device=significance.device) < _lengths(left.packing)
    shares, wrong = _shares(significance, real, logarithmic)
    stay, forced = torch.zeros_like(real), left.forced()
    if forced is not None:
        stay.masked_scatter_(real, forced)
    counts: list[int] = count(shares, stay).masked_fill(wrong, -1).tolist()
    if -1 in counts:
        wanted = "below infinity" if logarithmic else "finite and at least 0"
        raise ValueError(
            f"the scores of {scorer!r} in layer {layer} cannot be shared out: each must be {wanted}; register the "
            "scorer as logarithmic=True, or give a LengthSchedule"
        )
    return counts


def _lengths(packing: Packing) -> Tensor:
    """``[B, 1]``, on the device."""
    return packing.cu_seqlens.diff()[:, None]


def _shares(significance: Tensor, real: Tensor, logarithmic: bool) -> tuple[Tensor, Tensor]:
    """Each token's share of its sequence, in `_PARTS` of the greatest, and the sequences where there are no such.

    Args:
        significance: ``[T]``.
        real: bool ``[B, S]``, where sequences padded to the longest have tokens.
        logarithmic: whether the significance is the logarithm of what is shared out.

    Returns:
        int64 ``[B, S]``, 0 at padding; and bool ``[B]``.
    """
    nothing = -torch.inf if logarithmic else 0.0
    padded = torch.full(real.shape, nothing, dtype=torch.float64, device=real.device)
    padded.masked_scatter_(real, significance.detach().double())
    greatest = padded.amax(1, keepdim=True)
    wrong = padded.isnan() | (padded == torch.inf)
    if not logarithmic:
        wrong |= padded < 0
    parts = (padded - greatest).exp() if logarithmic else padded / greatest
    parts = torch.where(greatest == nothing, 1.0, parts).masked_fill(~real | wrong, 0.0)
    return (parts * _PARTS).round().long(), wrong.any(1)


def _checked(name: str, values: Any, wanted: str, *, above_0: bool = False, below_1: bool = False) -> tuple[float, ...]:
    """Numbers from 0 to 1, one per layer; ValueError says which is none."""
    numbers = per_layer(name, values)
    if not numbers:
        raise ValueError(f"{name} is empty: give one entry per layer")
    for value in numbers:
        good = isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
        if not good or (above_0 and value == 0) or (below_1 and value == 1):
            raise ValueError(f"{name} holds {value!r}: each entry must be {wanted}")
    return tuple(float(value) for value in numbers)
