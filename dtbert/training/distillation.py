"""TinyBERT's distillation: what a teacher shows of itself, and what a student makes of it (Jiao et al. 2020)."""

import torch
from torch import Tensor

from dtbert.model import BertConfig, BertForQuestionAnswering
from dtbert.training.backend import TrainingBackend
from dtbert.training.data import LabelledBatch
from dtbert.training.losses import attention_loss, distillation_loss, hidden_state_loss, span_loss
from dtbert.training.options import Distillation
from dtbert.training.step import Pass, SpanModel


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
