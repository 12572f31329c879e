"""What a training run may be told: the default, the range and the meaning of each option, once.

It loads nothing heavy, for the command line makes its options of these fields.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

AttentionTarget = Literal["probabilities", "scores"]
SubModelLoss = Literal["cross_entropy", "kl"]
SubModelPolicy = Literal["lengths", "threshold"]

# What a number must be.
ABOVE_0, _AT_LEAST_0, _PART, _SEED = "above 0", "at least 0", "at least 0 and below 1", "at least 0 and below 2**32"
_RANGES: dict[str, Callable[[float], bool]] = {
    ABOVE_0: lambda value: 0 < value < math.inf,
    _AT_LEAST_0: lambda value: 0 <= value < math.inf,
    _PART: lambda value: 0 <= value < 1,
    _SEED: lambda value: 0 <= value < 2**32,
}


def _option(default: Any, meaning: str, *, must_be: str | None = None, letter: str | None = None, **more: str) -> Any:
    """A field: what it means, the range of its value, and the letter that stands for the value in a usage line.

    ``more`` may have the ``flag`` of the command line where that is not the field's name, and the ``shown`` default.
    """
    return field(default=default, metadata={"meaning": meaning, "must_be": must_be, "letter": letter, **more})


class _Checked:
    def __post_init__(self) -> None:
        for one in fields(self):  # type: ignore[arg-type]  # dataclasses alone have it as a base
            value, must_be = getattr(self, one.name), one.metadata.get("must_be")
            if must_be is not None and not _RANGES[must_be](value):
                raise ValueError(f"{one.name} must be {must_be}, not {value}")


@dataclass(frozen=True)
class LengthDrop(_Checked):
    """How sub-models are drawn, besides the full model, which never loses a layer, and the smallest sub-model.

    ``ratio_bound`` is one number in (0, 1) for all layers, or one in [0, 1) for each, not all 0; lengths are parts of
    each sequence's own length. By ``answer_loss`` the span head learns, from the full model's own logits, to read the
    states that enter each layer; at 0 it learns the last layer's alone. Of ``policies``, ``"lengths"`` keep the drawn
    part of every sequence, ``"threshold"`` keeps it of all sequences of a step together, by one threshold for their
    tokens' shares: of one sequence more, of another fewer, as the policy `dtbert.model.Threshold` will.

    Raises:
        ValueError: a number is outside its range, or a scorer is unknown.
    """

    num_sandwich: int = _option(2, "random sub-models a step", must_be=_AT_LEAST_0, letter="N")
    ratio_bound: float | Sequence[float] = _option(
        0.2, "most of its tokens that a layer drops; or one for each, A,B,...", letter="X"
    )
    layer_dropout: float = _option(0.0, "random sub-models leave a layer out", must_be=_PART, letter="P")
    scorers: Sequence[str] = _option(
        ("received",),
        "a sub-model draws one; NAME+question keeps the question first, NAME+question:3 in 3 layers alone",
        letter="A,B",
        shown="received",
    )
    policies: Sequence[SubModelPolicy] = _option(
        ("lengths",), "lengths, threshold: a sub-model draws one; a name may be repeated", letter="A,B", shown="lengths"
    )
    answer_loss: float = _option(
        0.0,
        "teach the span head to read every layer's states, with this weight, for answer and answer_overlap",
        must_be=_AT_LEAST_0,
        letter="X",
    )

    def __post_init__(self) -> None:
        from dtbert.training.length_drop import ratios_by, scorer_and_layers

        super().__post_init__()
        bound = self.ratio_bound
        if not isinstance(bound, Sequence):
            if not 0 < bound < 1:
                raise ValueError(f"ratio_bound must be above 0 and below 1, not {bound}")
        elif not all(0 <= one < 1 for one in bound) or not any(bound):
            raise ValueError(
                f"a ratio_bound for each layer must be at least 0 and below 1, and one above 0, not {bound}"
            )
        if not self.scorers:
            raise ValueError("scorers is empty: name at least one")
        for scorer in self.scorers:
            ratios_by(scorer_and_layers(scorer)[0], [1.0])
        if not self.policies:
            raise ValueError("policies is empty: name at least one")
        for policy in self.policies:
            if policy not in get_args(SubModelPolicy):
                raise ValueError(f"policies holds {policy!r}: name {' or '.join(get_args(SubModelPolicy))}")

    def bounds(self, num_layers: int) -> Sequence[float]:
        """The ratio_bound of each layer; ValueError where there is one for each layer of another number."""
        if not isinstance(self.ratio_bound, Sequence):
            return [self.ratio_bound] * num_layers
        if len(self.ratio_bound) != num_layers:
            raise ValueError(
                f"{len(self.ratio_bound)} ratio_bounds for {num_layers} layers: give one, or one for each layer"
            )
        return self.ratio_bound


@dataclass(frozen=True)
class Distillation(_Checked):
    """How a student learns from its teacher.

    ``"intermediate"``: to have the teacher's hidden states and attention, either its probabilities or, as the code of
    TinyBERT and Dynamic-TinyBERT does, the scores before the softmax. ``"prediction"``: to give the teacher's
    distributions over tokens, or labels; ``temperature`` divides the logits of both. To either the loss of the data's
    own labels may be added.

    Raises:
        ValueError: a number is outside its range.
    """

    kind: Literal["intermediate", "prediction"] = _option(
        "prediction", "learn its hidden states and attention, or its predictions", flag="distill"
    )
    temperature: float = _option(1.0, "of the predictions", must_be=ABOVE_0, letter="X")
    hard_label_weight: float = _option(0.0, "of the data's own labels", must_be=_AT_LEAST_0, letter="X")
    attention: AttentionTarget = _option(
        "probabilities",
        "intermediate: attention after the softmax, or before it as TinyBERT's code",
        flag="match_attention",
    )

    @property
    def keep(self) -> AttentionTarget | None:
        """What the passes of teacher and student collect of their attention."""
        return self.attention if self.kind == "intermediate" else None

    @property
    def trains_head(self) -> bool:
        """Whether the head has a part in the loss; otherwise it stays as it is."""
        return self.kind == "prediction" or self.hard_label_weight > 0


@dataclass(frozen=True)
class TrainingOptions(_Checked):
    """How to train.

    ``batch_tokens`` are over all devices. The learning rate is the highest, after the warm-up, and falls to 0 linearly.
    The weight decay is decoupled; biases and LayerNorm have none. Gradients longer than ``max_grad_norm`` are scaled to
    it. The seed is of data order, dropout and sub-models. ``sub_model_loss`` is of
    `dtbert.training.losses.distillation_loss`. Without ``length_drop`` it is plain fine-tuning, without
    ``distillation`` there is no teacher.

    Raises:
        ValueError: a number is outside its range.
    """

    epochs: float = _option(2.0, "passes over the data, 0.5: half", must_be=ABOVE_0, letter="X")
    batch_tokens: int = _option(6144, "tokens of a step", must_be=ABOVE_0, letter="N")
    learning_rate: float = _option(3e-5, "the highest", must_be=ABOVE_0, letter="X", shown="3e-5")
    warmup: float = _option(0.06, "part of the steps", must_be=_PART, letter="X")
    weight_decay: float = _option(0.01, "", must_be=_AT_LEAST_0, letter="X")
    max_grad_norm: float = _option(1.0, "", must_be=ABOVE_0, letter="X")
    hidden_dropout: float = _option(0.1, "", must_be=_PART, letter="P")
    attention_dropout: float = _option(0.1, "", must_be=_PART, letter="P")
    seed: int = _option(0, "", must_be=_SEED, letter="N")
    length_drop: LengthDrop | None = None
    sub_model_loss: SubModelLoss = _option(
        "cross_entropy", "sub-models learn by cross-entropy of full against sub, or KL(sub || full)"
    )
    distillation: Distillation | None = None
    save_every: int = _option(100, "steps between checkpoints", must_be=ABOVE_0, letter="N")
    eval_every: int = _option(0, "steps", must_be=_AT_LEAST_0, letter="N", shown="default: each epoch")
    bf16: bool = _option(False, "compute in bfloat16, where the device can; the weights stay float32")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Linear warm-up, then linear decay to 0 at ``num_steps``; steps count from 0."""
        warmup = self.warmup * num_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        return self.learning_rate * (num_steps - step) / max(1.0, num_steps - warmup)
