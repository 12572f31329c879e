"""How many tokens each layer keeps, by which scorer, and what that costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Self, Unpack

from dtbert.kernels import BackendName, Packing
from dtbert.model.adaptive import AdaptiveOptions, Threshold
from dtbert.model.config import BertConfig
from dtbert.model.policy import KnownTargets, Policy, PolicyOptions, per_layer, tokens_of, up_to_last
from dtbert.model.work import Macs


@dataclass(frozen=True)
class LengthSchedule(Policy, kinds=("absolute", "ratios")):
    """Tokens that each layer keeps: made by `absolute` or `ratios`, immutable, a pure function of the length.

    The other attributes are those of `Policy`.

    Attributes:
        kind: ``"absolute"`` or ``"ratios"``.
        length_config: one entry per layer, not increasing: tokens, or parts of the sequence's own length.
    """

    kind: Literal["absolute", "ratios"]  # type: ignore[misc]  # one of two, where other policies have one
    length_config: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.kind not in ("absolute", "ratios"):
            raise ValueError(f"kind must be 'absolute' or 'ratios', not {self.kind!r}")
        config = per_layer("length_config", self.length_config)
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
        super().__post_init__()

    @classmethod
    def absolute(cls, lengths: Sequence[int], **options: Unpack[PolicyOptions]) -> "LengthSchedule":
        """Tokens after each layer, as the literature's ``length_config``; a shorter sequence keeps all it has.

        Args:
            lengths: one per layer.
            options: the attributes of `Policy`, by name.

        Raises:
            ValueError: no entries, an entry below 1 or not whole, growing lengths, an unknown scorer, or a layer that
                there is not.
        """
        return cls("absolute", per_layer("lengths", lengths), **options)  # type: ignore[arg-type]  # lists become tuples

    @classmethod
    def ratios(cls, ratios: Sequence[float], **options: Unpack[PolicyOptions]) -> "LengthSchedule":
        """Parts of the sequence's own length that stay after each layer, rounded up to whole tokens.

        Args:
            ratios: one per layer.
            options: the attributes of `Policy`, by name.

        Raises:
            ValueError: no entries, an entry outside (0, 1], growing ratios, an unknown scorer, or a layer that there is
                not.
        """
        return cls("ratios", per_layer("ratios", ratios), **options)  # type: ignore[arg-type]  # lists become tuples

    @staticmethod
    def thresholds(thresholds: Sequence[float], **options: Unpack[AdaptiveOptions]) -> Threshold:
        """Not a schedule, for the text decides how many tokens stay: `Threshold`, whose arguments these are."""
        return Threshold(per_layer("thresholds", thresholds), **options)  # type: ignore[arg-type]  # lists become tuples

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

    def lengths(self, sequence_length: int) -> tuple[int, ...]:
        """Tokens that each layer keeps of a sequence of ``sequence_length`` tokens."""
        if self.kind == "absolute":
            lengths = [min(int(length), sequence_length) for length in self.length_config]
        else:
            lengths = [tokens_of(ratio, sequence_length) for ratio in self.length_config]
        return self._passing(sequence_length, lengths)

    def targets(self, packing: Packing) -> KnownTargets:
        """The packing that leaves each layer."""
        return KnownTargets(packing, Packing.stack(self.kept(packing.seqlens), packing.cu_seqlens.device))

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
        return self._passing(tokens, [min(tokens, most, part) for most, part in zip(of_each, parts, strict=True)])

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
                counted as if every token were one. ``overlap`` multiplies nothing; a registered scorer takes what
                it was registered with.
            backend: whose executed count: one computes products for a score again that another has at hand.

        Raises:
            ValueError: the schedule does not fit the config, or a length below 1.
        """
        self.check_layers(config.num_hidden_layers)
        kept = self.lengths(sequence_length)
        return self.macs_of_kept(config, sequence_length, kept, question_length=question_length, backend=backend)

    def first_alone(self, positions: int) -> Self:
        one = 1 if self.kind == "absolute" else 1 / positions
        *before, last = self.length_config
        return self._keeping_first(length_config=(*before, min(one, last)))

    def scores(self, lengths: Sequence[int]) -> list[bool]:
        drops = [after < before for before, after in pairwise(lengths)]
        return up_to_last(drops) if self.remembers else drops

    def _passing(self, entered: int, kept: Sequence[int]) -> tuple[int, ...]:
        """Tokens that leave each layer, where those left out let all pass."""
        passed = list(kept)
        for layer in self.skip_layers:
            passed[layer] = passed[layer - 1] if layer else entered
        return tuple(passed)


def _number(entry: str) -> float:
    try:
        return float(entry)
    except ValueError:
        raise ValueError(f"{entry!r} is not a number") from None
