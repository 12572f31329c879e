"""One training step: the full model on the labels, then its sub-models on what the full model says."""

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor, nn

from dtbert.kernels import Backend
from dtbert.model import BertForQuestionAnswering
from dtbert.model.encoder import PackedEncoding, parameters_of
from dtbert.model.question_answering import SpanLogits
from dtbert.training.data import LabelledBatch
from dtbert.training.length_drop import SubModel
from dtbert.training.losses import DistillationLoss, distillation_loss, span_loss


class Pass(NamedTuple):
    """What one forward pass gave."""

    logits: SpanLogits
    encoding: PackedEncoding


class SpanModel(nn.Module):
    """The model as training calls it: a backend and a sub-model of its own for each pass."""

    def __init__(self, model: BertForQuestionAnswering) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        labelled: LabelledBatch,
        backend: Backend,
        sub_model: SubModel | None = None,
        keep_hidden_states: bool = False,
    ) -> Pass:
        def span_head(states: Tensor) -> Tensor:
            return backend.linear(states, *parameters_of(self.model.span))

        encoding = self.model.encoder(
            labelled.batch,
            None if sub_model is None else sub_model.schedule,
            backend=backend,
            keep_hidden_states=keep_hidden_states,
            span_head=span_head,
            skip_layers=frozenset() if sub_model is None else sub_model.skip_layers,
        )
        start, end = span_head(encoding.states).unbind(1)
        return Pass(SpanLogits(start, end), encoding)


def losses_of_step(
    model: nn.Module,
    labelled: LabelledBatch,
    backend: Backend,
    sub_models: list[SubModel],
    kind: DistillationLoss = "cross_entropy",
) -> Iterator[Tensor]:
    """The loss of each pass, summed over the batch's windows: the full model's, then each sub-model's.

    The caller goes backward through one loss before it asks for the next, so that one pass's activations are held at a
    time. Every pass weighs the same (Kim and Cho 2021, algorithm 1).

    Args:
        model: a `SpanModel`, or one wrapped for several devices.
        labelled: the batch.
        backend: differentiable.
        sub_models: none for plain fine-tuning; a sub-model learns from the full model's detached logits alone.
        kind: as `distillation_loss`.
    """
    full: Pass = model(labelled, backend)
    packing = labelled.batch.packing
    teacher = SpanLogits(full.logits.start_logits.detach(), full.logits.end_logits.detach())
    yield span_loss(full.logits, packing, labelled.starts, labelled.ends) / (1 + len(sub_models))
    del full
    for sub_model in sub_models:
        student: Pass = model(labelled, backend, sub_model)
        yield distillation_loss(student.logits, teacher, packing, kind) / (1 + len(sub_models))
