"""A policy says how many tokens each layer keeps: what `LengthSchedule`, `Threshold` and `TopP` have in common."""

import json
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, fields, replace
from itertools import pairwise
from typing import Any, ClassVar, Protocol, Self, TypedDict

from torch import Tensor

from dtbert.files import Json
from dtbert.kernels import BackendName, Left, Packing, Partials
from dtbert.model.config import BertConfig, OwnScorer
from dtbert.model.scorers import available_scorers, scorer_named, unknown_scorer
from dtbert.model.work import Macs, macs_of

_KINDS: dict[str, "type[Policy]"] = {}


class PolicyOptions(TypedDict, total=False):
    """The attributes of a `Policy`, by name."""

    scorer: str | Sequence[str] | None
    keep_cls: bool
    keep_question: bool | Sequence[bool]
    accumulate: bool
    skip_layers: Sequence[int]


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """How many tokens each layer keeps, by which scorer, and which layers are left out: immutable, JSON in and out.

    Attributes:
        scorer: one name for all layers, or one per layer. None is the model's own, and goes with its
            ``keep_question``: see `resolve`.
        keep_cls: keep the first token whatever its score.
        keep_question: keep the tokens of segment 0 before all others; where a layer has room for fewer, the first. One
            for all layers, or one per layer: once the text's tokens have read the question it may go.
        accumulate: a token's significance is the sum of its scores in this layer and in all before it, as in SpAtten's
            cascade (Wang et al. 2021, arXiv 2012.09852), so that layers before the last that drops score too.
        skip_layers: 0-based layers that are left out, ascending; what is said of how many tokens these keep is not
            read. Length-Adaptive Transformer's ``layer_config`` names the others (Kim and Cho 2021, section 3.2).
    """

    scorer: str | tuple[str, ...] | None = None
    keep_cls: bool = False
    keep_question: bool | tuple[bool, ...] = False
    accumulate: bool = False
    skip_layers: tuple[int, ...] = ()

    # What JSON calls it.
    kind: ClassVar[str]

    def __init_subclass__(cls, kinds: Sequence[str] = ()) -> None:
        super().__init_subclass__()
        _KINDS.update(dict.fromkeys(kinds, cls))

    def __post_init__(self) -> None:
        if not isinstance(self.scorer, str | None):
            names = per_layer("scorer", self.scorer)
            if len(names) != self.num_layers:
                raise ValueError(f"{len(names)} scorers for {self.num_layers} layers: give one name, or one per layer")
            object.__setattr__(self, "scorer", names)
        for name in self.scorers:
            if name not in available_scorers():
                raise ValueError(unknown_scorer(name))
        for name in ("keep_cls", "accumulate"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")
        if not isinstance(self.keep_question, bool):
            object.__setattr__(self, "keep_question", self._one_if_equal("keep_question", self.keep_question))
        skipped = per_layer("skip_layers", self.skip_layers)
        for layer in skipped:
            if not isinstance(layer, int) or isinstance(layer, bool) or not 0 <= layer < self.num_layers:
                raise ValueError(
                    f"skip_layers holds {layer!r}: each must be a layer's number, 0 to {self.num_layers - 1}"
                )
        if len(set(skipped)) != len(skipped) or len(skipped) == self.num_layers:
            raise ValueError(f"skip_layers must name each layer once, and leave one, not {list(skipped)}")
        object.__setattr__(self, "skip_layers", tuple(sorted(skipped)))

    @property
    @abstractmethod
    def num_layers(self) -> int: ...

    @property
    def remembers(self) -> bool:
        """Whether scores are read in later layers, so that all layers score up to the last that drops."""
        return self.accumulate or any(scorer_named(name).remembers for name in self.scorers)

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorer of each layer; before `resolve`, of a policy that names none, ``received``."""
        scorer = OwnScorer().scorer if self.scorer is None else self.scorer
        return (scorer,) * self.num_layers if isinstance(scorer, str) else scorer

    @property
    def keeps_question(self) -> tuple[bool, ...]:
        """Whether each layer keeps the question."""
        keep = self.keep_question
        return keep if isinstance(keep, tuple) else (keep,) * self.num_layers

    def resolve(self, own: OwnScorer) -> Self:
        """The policy as a model runs it: itself, or by the model's own scorer where it names none.

        Args:
            own: of `BertConfig.own_scorer`, or of the model's `schedules.json`; every model resolves what it is given.

        Raises:
            ValueError: the model's own scorer is unknown, or has another number of layers.
        """
        if self.scorer is not None:
            return self
        return replace(self, scorer=own.scorer, keep_question=self.keep_question or own.keep_question)

    def _one_if_equal(self, name: str, values: Any) -> bool | tuple[bool, ...]:
        """What each layer does, by one word where all do the same."""
        if isinstance(values, str) or not hasattr(values, "__iter__"):
            raise TypeError(f"{name} must be True or False, or a list with one of them per layer, not {values!r}")
        each = per_layer(name, values)
        if any(not isinstance(one, bool) for one in each):
            raise TypeError(f"{name} must hold True or False for each layer, not {values!r}")
        if len(each) != self.num_layers:
            raise ValueError(f"{len(each)} entries of {name} for {self.num_layers} layers: give one, or one each")
        return each[0] if len(set(each)) == 1 else each

    def _keeping_first(self, **last: Any) -> Self:
        # Of one token there is no choice: a score would be work for nothing, and this one is none.
        return replace(self, scorer=(*self.scorers[:-1], "random"), keep_cls=True, **last)

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError unless the policy has one entry per layer of the model."""
        if self.num_layers != num_layers:
            raise ValueError(
                f"the schedule has {self.num_layers} entries, the model {num_layers} layers: they must match"
            )

    @abstractmethod
    def first_alone(self, positions: int) -> Self:
        """The policy by which the first token stays in every layer, and in the last one nothing else.

        Args:
            positions: tokens that a sequence has at most.
        """

    @abstractmethod
    def scores(self, lengths: Sequence[int]) -> list[bool]:
        """Whether each layer scores a sequence, of the tokens that enter the first layer and that leave each."""

    def macs_of_kept(
        self,
        config: BertConfig,
        sequence_length: int,
        kept: Sequence[int],
        *,
        question_length: int | None = None,
        backend: BackendName = "cpu",
    ) -> Macs:
        """Multiply-accumulates for one sequence of which the layers kept so many tokens; see `LengthSchedule.macs`.

        Raises:
            ValueError: the policy does not fit the config, or so many tokens cannot have been kept.
        """
        self.check_layers(config.num_hidden_layers)
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        lengths = (sequence_length, *kept)
        if len(kept) != self.num_layers or any(not 1 <= after <= before for before, after in pairwise(lengths)):
            raise ValueError(f"of {sequence_length} tokens {self.num_layers} layers cannot keep {list(kept)}")
        policy = self.resolve(config.own_scorer)
        return macs_of(policy, config, lengths, policy.scores(lengths), question_length, backend)

    @abstractmethod
    def targets(self, packing: Packing) -> "Targets":
        """How many tokens of each sequence leave each layer, of a batch as it enters the network."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them."""
        own = [one for one in fields(self) if one.name not in Policy.__dataclass_fields__]
        rest = [one for one in fields(self) if one.name in Policy.__dataclass_fields__]
        # What came later is written where it is used, so that the dtbert before that reads the rest.
        rest = [one for one in rest if one.name not in _LATER or getattr(self, one.name) != one.default]
        values = {one.name: getattr(self, one.name) for one in (*own, *rest)}
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
        return {"kind": self.kind, **plain}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """The policy of `to_dict`, of the class that its kind says.

        Raises:
            ValueError: unknown or missing fields, another kind, or as the class refuses.
        """
        if not isinstance(values, dict):
            raise ValueError(f"a schedule must be a JSON object, not {type(values).__name__}")
        known = sorted(name for name, found in _KINDS.items() if issubclass(found, cls))
        if "kind" not in values:
            raise ValueError(f"a schedule has a kind, one of {', '.join(known)}: missing ['kind']")
        if values["kind"] not in known:
            raise ValueError(f"kind must be one of {', '.join(known)}, not {values['kind']!r}")
        made = _KINDS[values["kind"]]
        names = {one.name: one.default is MISSING for one in fields(made)}
        unknown = sorted(set(values) - set(names) - {"kind"})
        missing = sorted({name for name, needed in names.items() if needed} - set(values))
        if unknown or missing:
            shown = dict.fromkeys(["kind", *names])
            raise ValueError(f"a schedule has the fields {', '.join(shown)}: missing {missing}, unknown {unknown}")
        given = {name: value for name, value in values.items() if name in names}
        return made(**given)  # type: ignore[return-value]  # `known` are subclasses of this one

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The policy of `to_json`; ValueError as `from_dict`, or when the text is not JSON."""
        return cls.from_dict(Json.parse(text).value)


class Targets(Protocol):
    """How many tokens of each sequence leave each layer."""

    @property
    def last_drop(self) -> int:
        """The last layer that drops, or may drop, some; -1 where there is none."""

    def may_drop(self, layer: int, packing: Packing) -> bool:
        """Whether some of the tokens that enter a layer may not leave it."""

    def target(self, layer: int, left: Left, significance: Tensor | Partials) -> Packing:
        """Where those lie that leave a layer, of tokens of this significance."""


class KnownTargets:
    """`Targets` that do not depend on what the tokens are.

    Args:
        packing: of the batch as it enters.
        targets: the packing that leaves each layer.
    """

    def __init__(self, packing: Packing, targets: Sequence[Packing]) -> None:
        self._entered, self._targets = packing, targets

    @property
    def last_drop(self) -> int:
        drops = [a.seqlens != b.seqlens for a, b in pairwise((self._entered, *self._targets))]
        return max((layer for layer, drop in enumerate(drops) if drop), default=-1)

    def may_drop(self, layer: int, packing: Packing) -> bool:
        return self._targets[layer].seqlens != packing.seqlens

    def target(self, layer: int, left: Left, significance: Tensor | Partials) -> Packing:
        return self._targets[layer]


_LATER = ("accumulate", "skip_layers")


def tokens_of(ratio: float, sequence_length: int) -> int:
    """A part of a sequence in whole tokens, rounded up, at least 1."""
    # Rounded first, so that 0.07 of 100 is 7 and not the 8 that binary fractions make of it.
    return max(1, math.ceil(round(ratio * sequence_length, 6)))


def in_first_layers(first: int, num_layers: int) -> tuple[bool, ...]:
    """Whether each layer is one of the first so many, as `Policy.keep_question` says it."""
    return tuple(layer < first for layer in range(num_layers))


def up_to_last(layers: Sequence[bool]) -> list[bool]:
    """Whether each layer is one of these or before one of these."""
    return [any(layers[index:]) for index in range(len(layers))]


def per_layer(name: str, values: Any) -> tuple[Any, ...]:
    """A list of one entry per layer as a tuple of Python's own values; ValueError where it is no list."""
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name} must be a list with one entry per layer, not {values!r}")
    # NumPy and torch scalars become Python's own numbers.
    return tuple(value.item() if hasattr(value, "item") else value for value in values)
