"""TinyBERT's distillation: what a teacher shows of itself, and what a student makes of it (Jiao et al. 2020)."""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dtbert.model import BertConfig, BertForQuestionAnswering
from dtbert.training.backend import AttentionTarget, TrainingBackend
from dtbert.training.data import LabelledBatch
from dtbert.training.losses import attention_loss, distillation_loss, hidden_state_loss, span_loss
from dtbert.training.step import Pass, SpanModel


class Distillation(NamedTuple):
    """How a student learns from its teacher.

    Attributes:
        kind: ``"intermediate"``: to have the teacher's hidden states and attention; ``"prediction"``: to give the
            teacher's distributions over tokens.
        temperature: divides the logits of both, for ``prediction``.
        hard_label_weight: of the cross-entropy with the data's own labels, added to the teacher's loss.
        attention: ``intermediate`` compares attention probabilities, or the scores before the softmax, as TinyBERT's
            and Dynamic-TinyBERT's own code do.
    """

    kind: Literal["intermediate", "prediction"] = "prediction"
    temperature: float = 1.0
    hard_label_weight: float = 0.0
    attention: AttentionTarget = "probabilities"

    def check(self) -> None:
        """Raise ValueError where a value is outside its range."""
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be above 0, not {self.temperature}")
        if not 0 <= self.hard_label_weight < math.inf:
            raise ValueError(f"hard_label_weight must be at least 0, not {self.hard_label_weight}")

    @property
    def keep(self) -> AttentionTarget | None:
        """What the passes of teacher and student collect of their attention."""
        return self.attention if self.kind == "intermediate" else None

    @property
    def trains_span_head(self) -> bool:
        """Whether the span head has a part in the loss; otherwise it stays as it is."""
        return self.kind == "prediction" or self.hard_label_weight > 0


class Teacher:
    """A model whose opinion a student learns: without dropout and without gradients.

    Args:
        model: on the student's device, its weights plain: `dtbert.load_model` with ``backend="reference"``.
        distillation: how.
        student: the student's sizes.

    Raises:
        ValueError: the teacher has fewer layers than the student.
    """

    def __init__(self, model: BertForQuestionAnswering, distillation: Distillation, student: BertConfig) -> None:
        layers = model.config.num_hidden_layers
        if layers < student.num_hidden_layers:
            raise ValueError(
                f"the teacher has {layers} layers, the student {student.num_hidden_layers}: it needs at least as many"
            )
        self.distillation = distillation
        self.model = model
        self._model = SpanModel(model.requires_grad_(False).eval())
        self.config = model.config
        # Layer i of the student learns from layer g(i) = i * L_teacher / L_student; 0 is the embeddings.
        self.layer_map = [index * layers // student.num_hidden_layers for index in range(student.num_hidden_layers + 1)]

    @torch.no_grad()
    def show(self, labelled: LabelledBatch) -> Pass:
        """The teacher's pass over a batch."""
        keep = self.distillation.keep
        return self._model(labelled, TrainingBackend(keep=keep), keep_hidden_states=keep is not None)

    def loss(self, student: Pass, labelled: LabelledBatch) -> Tensor:
        """The loss of the student's full pass, summed over the batch's windows."""
        shown, packing = self.show(labelled), labelled.batch.packing
        if self.distillation.kind == "prediction":
            total = distillation_loss(student.logits, shown.logits, packing, temperature=self.distillation.temperature)
        else:
            states = [shown.hidden_states[layer] for layer in self.layer_map]
            attention = [shown.attention[layer - 1] for layer in self.layer_map[1:]]
            total = hidden_state_loss(student.hidden_states, states, packing)
            total = total + attention_loss(student.attention, attention, packing)
        if self.distillation.hard_label_weight:
            labels = span_loss(student.logits, packing, labelled.starts, labelled.ends)
            total = total + self.distillation.hard_label_weight * labels
        return total
