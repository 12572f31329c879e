"""TinyBERT's distillation: what a teacher shows of itself, and what a student makes of it (Jiao et al. 2020)."""

from abc import ABC, abstractmethod
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from dtbert.model import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, PackedBatch
from dtbert.training.backend import AttentionPieces, TrainingBackend
from dtbert.training.data import LabelledBatch
from dtbert.training.losses import attention_loss, distillation_loss, hidden_state_loss, span_loss
from dtbert.training.options import Distillation
from dtbert.training.step import Pass, SpanModel
from dtbert.training.texts import ClassifierModel, LabelledTextBatch, TextPass, agreement_loss, text_label_loss
from dtbert.weights import places_of


class _Shown(Protocol):
    @property
    def hidden_states(self) -> tuple[Tensor, ...]: ...

    @property
    def attention(self) -> list[AttentionPieces]: ...


class _Labelled(Protocol):
    @property
    def batch(self) -> PackedBatch: ...


P = TypeVar("P", bound=_Shown)
L = TypeVar("L", bound=_Labelled)


class Teacher(ABC, Generic[P, L]):
    """A model whose opinion a student learns: without dropout and without gradients.

    Args:
        passes: the model as training calls it, on the student's device, its weights plain: of `dtbert.load_model` or
            `dtbert.load_classifier` with ``backend="reference"``.
        distillation: how.
        config: the model's sizes.
        student: the student's.

    Raises:
        ValueError: the teacher has fewer layers than the student.
    """

    def __init__(self, passes: nn.Module, distillation: Distillation, config: BertConfig, student: BertConfig) -> None:
        layers = config.num_hidden_layers
        if layers < student.num_hidden_layers:
            raise ValueError(
                f"the teacher has {layers} layers, the student {student.num_hidden_layers}: it needs at least as many"
            )
        self.distillation, self.config = distillation, config
        self.passes = passes.requires_grad_(False).eval()
        # Layer i of the student learns from layer g(i) = i * L_teacher / L_student; 0 is the embeddings.
        self.layer_map = [index * layers // student.num_hidden_layers for index in range(student.num_hidden_layers + 1)]

    @torch.no_grad()
    def show(self, labelled: L) -> P:
        """The teacher's pass over a batch."""
        keep = self.distillation.keep
        shown: P = self.passes(labelled, TrainingBackend(keep=keep), keep_hidden_states=keep is not None)
        return shown

    def loss(self, student: P, labelled: L) -> Tensor:
        """The loss of the student's full pass, summed over the batch's windows, or texts."""
        shown, packing = self.show(labelled), labelled.batch.packing
        if self.distillation.kind == "prediction":
            total = self._difference(student, shown, labelled)
        else:
            states = [shown.hidden_states[layer] for layer in self.layer_map]
            attention = [shown.attention[layer - 1] for layer in self.layer_map[1:]]
            total = hidden_state_loss(student.hidden_states, states, packing)
            total = total + attention_loss(student.attention, attention, packing)
        if self.distillation.hard_label_weight:
            total = total + self.distillation.hard_label_weight * self._label_loss(student, labelled)
        return total

    @abstractmethod
    def _difference(self, student: P, shown: P, labelled: L) -> Tensor:
        """How far the student's predictions are from the teacher's."""

    @abstractmethod
    def _label_loss(self, student: P, labelled: L) -> Tensor: ...


class SpanTeacher(Teacher[Pass, LabelledBatch]):
    """One that answers questions: arguments and errors are `Teacher`'s."""

    def __init__(self, model: BertForQuestionAnswering, distillation: Distillation, student: BertConfig) -> None:
        self.model = model
        super().__init__(SpanModel(model), distillation, model.config, student)

    def _difference(self, student: Pass, shown: Pass, labelled: LabelledBatch) -> Tensor:
        temperature = self.distillation.temperature
        return distillation_loss(student.logits, shown.logits, labelled.batch.packing, temperature=temperature)

    def _label_loss(self, student: Pass, labelled: LabelledBatch) -> Tensor:
        return span_loss(student.logits, labelled.batch.packing, labelled.starts, labelled.ends)


class TextTeacher(Teacher[TextPass, LabelledTextBatch]):
    """One that labels texts, with the labels of the ``student``, in whatever order; the rest as `Teacher`.

    Raises:
        ValueError: the teacher has other labels, or there is a temperature where both give numbers.
    """

    def __init__(
        self,
        model: BertForSequenceClassification,
        distillation: Distillation,
        student: BertForSequenceClassification,
    ) -> None:
        self.model = model
        numbers = model.is_regression and student.is_regression
        if numbers and distillation.temperature != 1:
            raise ValueError("temperature is of the probabilities of labels, and a model of one label gives a number")
        # Where there is one, its name says nothing.
        self._places = [0] if numbers else places_of(student.labels, model.labels)
        super().__init__(ClassifierModel(model), distillation, model.config, student.config)

    def _difference(self, student: TextPass, shown: TextPass, labelled: LabelledTextBatch) -> Tensor:
        temperature = self.distillation.temperature
        return agreement_loss(student.logits, shown.logits[:, self._places], temperature=temperature)

    def _label_loss(self, student: TextPass, labelled: LabelledTextBatch) -> Tensor:
        return text_label_loss(student, labelled)
