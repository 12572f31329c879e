"""The policies that a search chooses from, as parameters of an Optuna trial."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, ClassVar, Literal, Protocol, TypedDict, Unpack

from dtbert.model import AdaptivePolicy, LengthSchedule, Policy, Threshold, TopP, is_logarithmic

PolicyName = Literal["lengths", "threshold", "top-p"]

KeepQuestion = bool | tuple[bool, ...]

# A layer keeps at least this part of the tokens that reach it, and of the sequence: 2 tokens of a window of 384.
LEAST_KEPT = 0.05
LEAST_RATIO = 0.005
# Above 1 a draw means "keep all", so that layers that drop nothing, which cost no scoring, are tried often.
_TOP_CUBE, _TOP = 1.1, 1.2


class DropsBy(TypedDict):
    """What the options of a `Policy` are that a space chooses."""

    scorer: str
    keep_question: KeepQuestion
    keep_cls: bool


class Suggests(Protocol):
    """What a space asks of an Optuna trial."""

    def suggest_float(self, name: str, low: float, high: float) -> float: ...

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any: ...


@dataclass(frozen=True)
class Space(ABC):
    """What the spaces of one kind of policy share: a scorer for all layers, the question, a number for each layer.

    Attributes:
        num_layers: of the model.
        scorers: names to choose from; one scorer serves all layers of a policy.
        keep_question: whether to keep the question first: the choices, each for all layers or one per layer. Where a
            layer lets the question go, [CLS] stays: it says whether there is an answer.
    """

    num_layers: int
    scorers: tuple[str, ...]
    keep_question: tuple[KeepQuestion, ...] = (False, True)

    name: ClassVar[PolicyName]
    made: ClassVar[type[Policy]]
    # What the policies are called that do the same in every layer.
    constant: ClassVar[str]

    def __post_init__(self) -> None:
        if not self.scorers or not self.keep_question:
            raise ValueError("the search needs at least one scorer and one choice of keep_question")
        if len(set(self.scorers)) < len(self.scorers):
            raise ValueError(f"a scorer is named twice: {', '.join(self.scorers)}")
        for scorer in self.scorers:
            constant_ratio(0.5, self.num_layers, scorer)  # names an unknown scorer

    @property
    def parts(self) -> "tuple[Space, ...]":
        """The spaces of one kind each."""
        return (self,)

    def suggest(self, trial: Suggests) -> Policy:
        """The policy of a trial."""
        scorer = trial.suggest_categorical("scorer", self.scorers)
        choices = {_parameter(one): one for one in self.keep_question}
        keep_question = choices[trial.suggest_categorical("keep_question", list(choices))]
        drawn = [self._draw(trial, layer) for layer in range(self.num_layers)]
        return self._make(drawn, **drops_by(scorer, keep_question))

    def parameters_of(self, policy: Policy) -> dict[str, Any]:
        """The parameters whose trial has this policy, to four digits of its numbers.

        Raises:
            ValueError: the policy is not one of this space.
        """
        policy.check_layers(self.num_layers)
        if not isinstance(policy, self.made):
            raise ValueError(_other_kind(policy, self.parts))
        numbers = self._numbers(policy)
        if policy.scorer is None:
            raise ValueError(f"the schedule names no scorer: give it one of {', '.join(self.scorers)}")
        if policy.scorer not in self.scorers:
            raise ValueError(f"the scorer {policy.scorer!r} is not among {', '.join(self.scorers)}")
        keep = policy.keep_question
        if keep not in self.keep_question or policy.keep_cls != isinstance(keep, tuple):
            raise ValueError("keep_cls or keep_question differs from the choices of the search")
        for name, nothing in (("accumulate", False), ("skip_layers", ()), ("floor", 0), ("ceiling", 1)):
            if (value := getattr(policy, name, nothing)) != nothing:
                raise ValueError(f"{name} is {value}: the search leaves it out")
        return {"scorer": policy.scorer, "keep_question": _parameter(keep), **numbers}

    def constants(self) -> list[Policy]:
        """Some policies that do the same in every layer, of every combination, from gentle to harsh.

        A sampler hardly tries again what it has not seen do well.
        """
        combinations = product(range(3), self.scorers, self.keep_question)
        return [self._constant(harshness, **drops_by(scorer, keep)) for harshness, scorer, keep in combinations]

    @abstractmethod
    def _draw(self, trial: Suggests, layer: int) -> float: ...

    @abstractmethod
    def _make(self, drawn: Sequence[float], **options: Unpack[DropsBy]) -> Policy: ...

    @abstractmethod
    def _numbers(self, policy: Policy) -> dict[str, float]:
        """What `_draw` draws for a policy, by the parameter's name."""

    @abstractmethod
    def _constant(self, harshness: int, **options: Unpack[DropsBy]) -> Policy: ...


class SearchSpace(Space):
    """Schedules of ratios: each layer keeps a factor of what reached it, so that lengths never grow.

    A factor is drawn as its cube, uniformly, so that gentle drops are tried more often than harsh ones.
    """

    name, made, constant = "lengths", LengthSchedule, "constant ratio"

    def _draw(self, trial: Suggests, layer: int) -> float:
        return trial.suggest_float(f"keep_{layer}_cubed", LEAST_KEPT**3, _TOP_CUBE)

    def _make(self, drawn: Sequence[float], **options: Unpack[DropsBy]) -> LengthSchedule:
        ratio, ratios = 1.0, []
        for cube in drawn:
            ratio *= min(1.0, cube ** (1 / 3))
            ratios.append(max(round(ratio, 4), LEAST_RATIO))
        return LengthSchedule.ratios(ratios, **options)

    def _numbers(self, policy: Policy) -> dict[str, float]:
        assert isinstance(policy, LengthSchedule)
        if policy.kind != "ratios":
            raise ValueError("lengths are absolute: the search is over ratios of the sequence's own length")
        numbers, before = {}, 1.0
        for layer, ratio in enumerate(policy.length_config):
            factor = ratio / before
            if factor < LEAST_KEPT or ratio < LEAST_RATIO:
                raise ValueError(
                    f"layer {layer} keeps {factor:.3f} of its tokens and {ratio} of the sequence, the search tries at "
                    f"least {LEAST_KEPT} and {LEAST_RATIO}"
                )
            numbers[f"keep_{layer}_cubed"] = _TOP_CUBE if factor == 1 else factor**3
            before = ratio
        return numbers

    def _constant(self, harshness: int, **options: Unpack[DropsBy]) -> LengthSchedule:
        return constant_ratio((0.95, 0.88, 0.8)[harshness], self.num_layers, **options)


class AdaptiveSpace(Space):
    """What `ThresholdSpace` and `TopPSpace` have in common: the logarithm of a share is drawn, uniformly.

    A draw is from 0, the harshest, to 1, the gentlest, and above that all is kept. The shares of logarithmic scores lie
    further apart than others.
    """

    made: ClassVar[type[AdaptivePolicy]]
    # Decimal digits of the share, at the harshest and from there to the gentlest: of scores, and of logarithmic ones,
    # of which a late layer's lie mostly with the few tokens that may be the answer.
    digits: ClassVar[tuple[tuple[float, float], tuple[float, float]]]

    def _draw(self, trial: Suggests, layer: int) -> float:
        return trial.suggest_float(f"gentle_{layer}", 0, _TOP)

    def _make(self, drawn: Sequence[float], **options: Unpack[DropsBy]) -> AdaptivePolicy:
        least, span = self._span(options["scorer"])
        shares = [0.0 if one > 1 else float(f"{10 ** -(least + span * one):.4g}") for one in drawn]
        return self._of_shares(shares, **options)

    def _numbers(self, policy: Policy) -> dict[str, float]:
        assert isinstance(policy, AdaptivePolicy)
        least, span = self._span(policy.scorers[0])
        numbers = {}
        for layer, share in enumerate(self._shares(policy)):
            gentle = _TOP if share == 0 else (-math.log10(share) - least) / span
            # The fourth digit of a share may lie beyond the end.
            if share and not -1e-3 < gentle < 1.001:
                ends = [f"{10 ** -(least + span * end):.3g}" for end in (1, 0)]
                raise ValueError(
                    f"layer {layer} has the share {share:g}, the search tries {' to '.join(ends)}, or none"
                )
            numbers[f"gentle_{layer}"] = min(max(gentle, 0.0), 1.0) if share else _TOP
        return numbers

    def _constant(self, harshness: int, **options: Unpack[DropsBy]) -> AdaptivePolicy:
        return self._make([(0.8, 0.55, 0.3)[harshness]] * self.num_layers, **options)

    def _span(self, scorer: str) -> tuple[float, float]:
        return self.digits[is_logarithmic(scorer)]

    @abstractmethod
    def _of_shares(self, shares: Sequence[float], **options: Any) -> AdaptivePolicy: ...

    @abstractmethod
    def _shares(self, policy: AdaptivePolicy) -> Sequence[float]: ...


class ThresholdSpace(AdaptiveSpace):
    """`Threshold` with thresholds of 0.03 to 0.0001, or of 0.3 to 1e-11 where scores are logarithmic."""

    name, made, constant, digits = "threshold", Threshold, "constant threshold", ((1.5, 2.5), (0.5, 10.5))

    def nearest(self, policy: Threshold) -> Threshold:
        """The policy with thresholds that the search tries: none below the least, none above the greatest."""
        least, span = self._span(policy.scorers[0])
        low, high = (float(f"{10 ** -(least + span * end):.4g}") for end in (1, 0))
        return replace(policy, thresholds=tuple(0.0 if one < low else min(one, high) for one in policy.thresholds))

    def _of_shares(self, shares: Sequence[float], **options: Any) -> Threshold:
        return Threshold(tuple(shares), **options)

    def _shares(self, policy: AdaptivePolicy) -> Sequence[float]:
        assert isinstance(policy, Threshold)
        return policy.thresholds


class TopPSpace(AdaptiveSpace):
    """`TopP` with parts that leave out shares of 0.6 to 0.006, or to 6e-10 where scores are logarithmic."""

    name, made, constant, digits = "top-p", TopP, "constant part", ((0.2, 2.0), (0.2, 9.0))

    def _of_shares(self, shares: Sequence[float], **options: Any) -> TopP:
        # To a digit more than the least share has.
        return TopP(tuple(round(1 - share, 14) for share in shares), **options)

    def _shares(self, policy: AdaptivePolicy) -> Sequence[float]:
        assert isinstance(policy, TopP)
        return [float(f"{1 - part:.4g}") for part in policy.parts]


_SPACES: tuple[type[Space], ...] = (SearchSpace, ThresholdSpace, TopPSpace)


@dataclass(frozen=True)
class MixedSpace:
    """Several spaces: a trial draws one of them, then a policy of it.

    A parameter carries the name of its space, so that a sampler which knows of conditions learns of each by itself.

    Attributes:
        parts: spaces that differ in the kind of their policies alone.
    """

    parts: tuple[Space, ...]

    @property
    def scorers(self) -> tuple[str, ...]:
        return self.parts[0].scorers

    def suggest(self, trial: Suggests) -> Policy:
        """As `Space.suggest`."""
        name = trial.suggest_categorical("policy", [part.name for part in self.parts])
        (drawn,) = (part for part in self.parts if part.name == name)
        return drawn.suggest(_OfSpace(trial, name))

    def parameters_of(self, policy: Policy) -> dict[str, Any]:
        """As `Space.parameters_of`."""
        for part in self.parts:
            if isinstance(policy, part.made):
                own = part.parameters_of(policy)
                return {"policy": part.name, **{f"{part.name} {name}": value for name, value in own.items()}}
        raise ValueError(_other_kind(policy, self.parts))


class _OfSpace:
    """A trial, asked for the parameters of one of several spaces."""

    def __init__(self, trial: Suggests, space: PolicyName) -> None:
        self._trial, self._space = trial, space

    def suggest_float(self, name: str, low: float, high: float) -> float:
        return self._trial.suggest_float(f"{self._space} {name}", low, high)

    def suggest_categorical(self, name: str, choices: Sequence[Any]) -> Any:
        return self._trial.suggest_categorical(f"{self._space} {name}", choices)


def space_of(
    policies: Sequence[PolicyName], num_layers: int, scorers: tuple[str, ...], keep_question: tuple[KeepQuestion, ...]
) -> Space | MixedSpace:
    """The space of policies of these kinds.

    Raises:
        ValueError: as `Space`.
    """
    parts = tuple(space(num_layers, scorers, keep_question) for space in _SPACES if space.name in policies)
    return MixedSpace(parts) if len(parts) > 1 else parts[0]


def constant_ratio(
    factor: float,
    num_layers: int,
    scorer: str = "received",
    keep_question: KeepQuestion = False,
    keep_cls: bool = False,
) -> LengthSchedule:
    """The baseline: every layer keeps the same part of the tokens that reach it."""
    ratios = [max(round(factor ** (layer + 1), 4), LEAST_RATIO) for layer in range(num_layers)]
    return LengthSchedule.ratios(ratios, scorer=scorer, keep_question=keep_question, keep_cls=keep_cls)


def drops_by(scorer: str, keep_question: KeepQuestion) -> DropsBy:
    """The options of a policy of a space."""
    return {"scorer": scorer, "keep_question": keep_question, "keep_cls": isinstance(keep_question, tuple)}


def _parameter(keep_question: KeepQuestion) -> bool | str:
    """A choice as a study keeps it."""
    return json.dumps(keep_question) if isinstance(keep_question, tuple) else keep_question


def _other_kind(policy: Policy, parts: Sequence[Space]) -> str:
    kinds = " or ".join(part.made.__name__ for part in parts)
    return f"a {type(policy).__name__} is no {kinds}, which the search is over: see --policy"
