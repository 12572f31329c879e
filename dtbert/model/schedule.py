"""How many tokens each layer keeps, by which scorer, and what that costs."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from dtbert.files import Json
from dtbert.kernels import BackendName
from dtbert.model.config import BertConfig, OwnScorer
from dtbert.model.scorers import available_scorers, unknown_scorer
from dtbert.model.work import Macs, macs_of


@dataclass(frozen=True)
class LengthSchedule:
    """Tokens that each layer keeps: made by `absolute` or `ratios`, immutable, a pure function of the length.

    Attributes:
        kind: ``"absolute"`` or ``"ratios"``.
        length_config: one entry per layer, not increasing: tokens, or parts of the sequence's own length.
        scorer: one name for all layers, or one per layer. None is the model's own, and goes with its
            ``keep_question``: see `resolve`.
        keep_cls: keep the first token whatever its score.
        keep_question: keep the tokens of segment 0 before all others; where a layer has room for fewer, the first.
    """

    kind: Literal["absolute", "ratios"]
    length_config: tuple[float, ...]
    scorer: str | tuple[str, ...] | None = None
    keep_cls: bool = False
    keep_question: bool = False

    def __post_init__(self) -> None:
        if self.kind not in ("absolute", "ratios"):
            raise ValueError(f"kind must be 'absolute' or 'ratios', not {self.kind!r}")
        config = _as_tuple("length_config", self.length_config)
        if not config:
            raise ValueError("length_config is empty: give one length per layer")
        for value in config:
            wanted = (
                "a whole number of tokens, at least 1" if self.kind == "absolute" else "a ratio above 0 and at most 1"
            )
            if self.kind == "absolute":
                good = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            else:
                good = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1
            if not good:
                raise ValueError(f"length_config holds {value!r}: each entry must be {wanted}")
        for layer, (before, after) in enumerate(zip(config, config[1:], strict=False), start=1):
            if after > before:
                raise ValueError(
                    f"length_config grows from {before} to {after} at layer {layer}: dropped tokens do not come back"
                )
        if self.kind == "ratios":
            config = tuple(float(value) for value in config)
        object.__setattr__(self, "length_config", config)
        if not isinstance(self.scorer, str | None):
            names = _as_tuple("scorer", self.scorer)
            if len(names) != len(config):
                raise ValueError(f"{len(names)} scorers for {len(config)} layers: give one name, or one per layer")
            object.__setattr__(self, "scorer", names)
        for name in self.scorers:
            if name not in available_scorers():
                raise ValueError(unknown_scorer(name))
        for name in ("keep_cls", "keep_question"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, not {getattr(self, name)!r}")

    @classmethod
    def absolute(
        cls,
        lengths: Sequence[int],
        *,
        scorer: str | Sequence[str] | None = None,
        keep_cls: bool = False,
        keep_question: bool = False,
    ) -> "LengthSchedule":
        """Tokens after each layer, as the literature's ``length_config``; a shorter sequence keeps all it has.

        Raises:
            ValueError: no entries, an entry below 1 or not whole, growing lengths, or an unknown scorer.
        """
        scorers = scorer if isinstance(scorer, str | None) else _as_tuple("scorer", scorer)
        return cls("absolute", _as_tuple("lengths", lengths), scorers, keep_cls, keep_question)

    @classmethod
    def ratios(
        cls,
        ratios: Sequence[float],
        *,
        scorer: str | Sequence[str] | None = None,
        keep_cls: bool = False,
        keep_question: bool = False,
    ) -> "LengthSchedule":
        """Parts of the sequence's own length that stay after each layer, rounded up to whole tokens.

        Raises:
            ValueError: no entries, an entry outside (0, 1], growing ratios, or an unknown scorer.
        """
        scorers = scorer if isinstance(scorer, str | None) else _as_tuple("scorer", scorer)
        return cls("ratios", _as_tuple("ratios", ratios), scorers, keep_cls, keep_question)

    @classmethod
    def parse(cls, text: str) -> "LengthSchedule":
        """A schedule as people write it: a list, with brackets of any kind or without, or the JSON of `to_json`.

        Whole numbers are tokens, as in ``(269, 253, 252, 202, 104, 34)``; others, and ones alone, are ratios.

        Raises:
            ValueError: an entry is not a number, or as `absolute`, `ratios` and `from_json`.
        """
        if text.lstrip().startswith("{"):
            return cls.from_json(text)
        inner = text.strip()
        if inner[:1] + inner[-1:] in ("()", "[]"):
            # A tuple may end in a comma.
            inner = inner[1:-1].strip().removesuffix(",")
        entries = [entry.strip() for entry in inner.split(",")]
        # A text cut to one token from the first layer on has no use, so ones alone mean "all of it".
        if all(entry.isdecimal() for entry in entries) and set(entries) != {"1"}:
            return cls.absolute([int(entry) for entry in entries])
        return cls.ratios([_number(entry) for entry in entries])

    @property
    def num_layers(self) -> int:
        return len(self.length_config)

    @property
    def scorers(self) -> tuple[str, ...]:
        """The scorer of each layer; before `resolve`, of a schedule that names none, ``received``."""
        scorer = OwnScorer().scorer if self.scorer is None else self.scorer
        return (scorer,) * self.num_layers if isinstance(scorer, str) else scorer

    def resolve(self, own: OwnScorer) -> "LengthSchedule":
        """The schedule as a model runs it: itself, or by the model's own scorer where it names none.

        Args:
            own: of `BertConfig.own_scorer`, or of the model's `schedules.json`; every model resolves what it is given.

        Raises:
            ValueError: the model's own scorer is unknown, or has another number of layers.
        """
        if self.scorer is not None:
            return self
        return replace(self, scorer=own.scorer, keep_question=self.keep_question or own.keep_question)

    def lengths(self, sequence_length: int) -> tuple[int, ...]:
        """Tokens that each layer keeps of a sequence of ``sequence_length`` tokens."""
        if self.kind == "absolute":
            return tuple(min(int(length), sequence_length) for length in self.length_config)
        # Rounded first, so that 0.07 of 100 is 7 and not the 8 that binary fractions make of it.
        return tuple(max(1, math.ceil(round(ratio * sequence_length, 6))) for ratio in self.length_config)

    def kept(self, seqlens: Sequence[int]) -> list[tuple[int, ...]]:
        """Tokens that each layer keeps of each of several sequences: by layer, one number a sequence."""
        of_length = {length: self.lengths(length) for length in seqlens}
        return list(zip(*(of_length[length] for length in seqlens), strict=True))

    def most_kept(self, sequences: int, tokens: int, longest: int) -> tuple[int, ...]:
        """By layer, no fewer tokens than it keeps of any ``sequences`` or fewer.

        Args:
            sequences: how many there are at most.
            tokens: that they have together at most.
            longest: tokens of each at most.
        """
        of_each = [sequences * length for length in self.lengths(longest)]
        if self.kind == "absolute":
            return tuple(min(tokens, most) for most in of_each)
        # Rounded up, a sequence keeps less than one token above its part; `lengths` rounds to a millionth first.
        parts = (math.floor(ratio * tokens + 1.00001 * sequences) for ratio in self.length_config)
        return tuple(min(tokens, most, part) for most, part in zip(of_each, parts, strict=True))

    def check_layers(self, num_layers: int) -> None:
        """Raise ValueError unless the schedule has one entry per layer of the model."""
        if self.num_layers != num_layers:
            raise ValueError(
                f"the schedule has {self.num_layers} entries, the model {num_layers} layers: they must match"
            )

    def macs(
        self,
        config: BertConfig,
        sequence_length: int,
        *,
        question_length: int | None = None,
        backend: BackendName = "cpu",
    ) -> Macs:
        """Multiply-accumulates for one sequence, span head included; weights of the embedding tables cost none.

        Args:
            config: the model's sizes, and its own scorer.
            sequence_length: tokens that enter the first layer.
            question_length: tokens of segment 0, which the score ``from_question`` alone costs; by default it is
                counted as if every token were one. ``overlap`` multiplies nothing, and what a registered scorer
                computes is not counted.
            backend: whose executed count: one computes products for a score again that another has at hand.

        Raises:
            ValueError: the schedule does not fit the config, or a length below 1.
        """
        self.check_layers(config.num_hidden_layers)
        if sequence_length < 1:
            raise ValueError(f"sequence_length must be at least 1, not {sequence_length}")
        return macs_of(self.resolve(config.own_scorer), config, sequence_length, question_length, backend)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; `from_dict` reads them."""
        return {
            "kind": self.kind,
            "length_config": list(self.length_config),
            "scorer": list(self.scorer) if isinstance(self.scorer, tuple) else self.scorer,
            "keep_cls": self.keep_cls,
            "keep_question": self.keep_question,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "LengthSchedule":
        """The schedule of `to_dict`.

        Raises:
            ValueError: unknown or missing fields, or as `absolute` and `ratios`.
        """
        if not isinstance(fields, dict):
            raise ValueError(f"a schedule must be a JSON object, not {type(fields).__name__}")
        unknown = sorted(set(fields) - set(cls.__dataclass_fields__))
        missing = sorted({"kind", "length_config"} - set(fields))
        if unknown or missing:
            raise ValueError(
                f"a schedule has the fields {', '.join(cls.__dataclass_fields__)}: missing {missing}, unknown {unknown}"
            )
        return cls(**fields)

    def to_json(self) -> str:
        return json.dumps(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> "LengthSchedule":
        """The schedule of `to_json`; ValueError as `from_dict`, or when the text is not JSON."""
        return cls.from_dict(Json.parse(text).value)


def _number(entry: str) -> float:
    try:
        return float(entry)
    except ValueError:
        raise ValueError(f"{entry!r} is not a number") from None


def _as_tuple(name: str, values: Any) -> tuple[Any, ...]:
    if isinstance(values, str | bytes) or not hasattr(values, "__iter__"):
        raise ValueError(f"{name} must be a list with one entry per layer, not {values!r}")
    # NumPy and torch scalars become Python's own numbers.
    return tuple(value.item() if hasattr(value, "item") else value for value in values)
