"""What a training run may be told."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from dtbert.training.distillation import Distillation
from dtbert.training.length_drop import LengthDrop
from dtbert.training.losses import SubModelLoss


@dataclass(frozen=True)
class TrainingOptions:
    """How to train.

    Attributes:
        epochs: passes over the data; parts of one are allowed.
        batch_tokens: tokens of a step, over all devices.
        learning_rate: the highest, after the warm-up; it falls to 0 linearly.
        warmup: part of all steps in which it rises.
        weight_decay: decoupled; none on biases and LayerNorm.
        max_grad_norm: longer gradients are scaled to this length.
        hidden_dropout, attention_dropout: probabilities.
        seed: of data order, dropout and sub-models.
        length_drop: how sub-models are drawn; None for plain fine-tuning.
        sub_model_loss: how sub-models learn from the full model (`dtbert.training.losses.distillation_loss`).
        distillation: how the full model learns from a teacher; None where there is none.
        save_every: steps between checkpoints.
        eval_every: steps between evaluations; 0: at the end of each epoch.
        bf16: autocast to bfloat16.

    Raises:
        ValueError: a number is outside its range, or a scorer is unknown.
    """

    epochs: float = 2.0
    batch_tokens: int = 6144
    learning_rate: float = 3e-5
    warmup: float = 0.06
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    seed: int = 0
    length_drop: LengthDrop | None = None
    sub_model_loss: SubModelLoss = "cross_entropy"
    distillation: Distillation | None = None
    save_every: int = 100
    eval_every: int = 0
    bf16: bool = False

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_tokens", "learning_rate", "max_grad_norm", "save_every"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, not {getattr(self, name)}")
        for name in ("warmup", "hidden_dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1, not {getattr(self, name)}")
        for name in ("weight_decay", "eval_every"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be at least 0 and below 2**32, not {self.seed}")
        for part in (self.length_drop, self.distillation):
            if part is not None:
                part.check()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        fields = asdict(self)
        for name in ("length_drop", "distillation"):
            part = getattr(self, name)
            fields[name] = None if part is None else part._asdict()
        return fields

    def learning_rate_at(self, step: int, num_steps: int) -> float:
        """Linear warm-up, then linear decay to 0 at ``num_steps``; steps count from 0."""
        warmup = self.warmup * num_steps
        if step < warmup:
            return self.learning_rate * (step + 1) / (warmup + 1)
        return self.learning_rate * (num_steps - step) / max(1.0, num_steps - warmup)
