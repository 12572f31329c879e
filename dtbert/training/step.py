"""One training step: the full model on the labels or its teacher, then its sub-models on what the full model says."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtbert.model import BertForQuestionAnswering, SpanLogits
from dtbert.training.backend import AttentionPieces, TrainingBackend
from dtbert.training.data import LabelledBatch
from dtbert.training.length_drop import SubModel
from dtbert.training.losses import distillation_loss
from dtbert.training.options import SubModelLoss


class Pass(NamedTuple):
    """What one forward pass gave.

    ``hidden_states``, of the embeddings and each layer, are in the teacher's width; ``layer_logits`` are the span
    head's of the states that enter each of the L layers, ``[T, L]``; ``attention`` is what the backend kept of each
    layer.
    """

    logits: SpanLogits
    layer_logits: SpanLogits | None
    hidden_states: tuple[Tensor, ...]
    attention: list[AttentionPieces]


# The loss of the full pass, summed over the windows.
FullLoss = Callable[[Pass, LabelledBatch], Tensor]


def projected(
    projection: nn.Linear | None, hidden_states: tuple[Tensor, ...], logits: Tensor
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Hidden states in a teacher's width, and logits, which depend on the projection where there are no such states.

    DistributedDataParallel waits for the gradient of every parameter, be it 0.
    """
    if projection is None:
        return hidden_states, logits
    if not hidden_states:
        logits = logits + 0 * (projection.weight.sum() + projection.bias.sum())
    return tuple(projection(states) for states in hidden_states), logits


class SpanModel(nn.Module):
    """The model as training calls it: a backend and a sub-model of its own for each pass.

    Args:
        model: the network.
        projection: from its width to a teacher's, for hidden states; None where the widths are the same.
    """

    def __init__(self, model: BertForQuestionAnswering, projection: nn.Linear | None = None) -> None:
        super().__init__()
        self.model = model
        self.projection = projection

    def forward(
        self,
        labelled: LabelledBatch,
        backend: TrainingBackend,
        sub_model: SubModel | None = None,
        keep_hidden_states: bool = False,
        keep_layer_logits: bool = False,
    ) -> Pass:
        span_head = self.model.span_head(backend)
        encoding = self.model.encoder(
            labelled.batch,
            None if sub_model is None else sub_model.schedule,
            backend=backend,
            keep_hidden_states=keep_hidden_states or keep_layer_logits,
            span_head=span_head,
            skip_layers=frozenset() if sub_model is None else sub_model.skip_layers,
        )
        start, end = span_head(encoding.states).unbind(1)
        layer_logits = None
        if keep_layer_logits:
            of_layers = torch.stack([span_head(states) for states in encoding.hidden_states[:-1]], 2)
            layer_logits = SpanLogits(*of_layers.unbind(1))
        hidden_states = encoding.hidden_states if keep_hidden_states else ()
        hidden_states, start = projected(self.projection, hidden_states, start)
        return Pass(SpanLogits(start, end), layer_logits, hidden_states, backend.kept)


def losses_of_step(
    model: nn.Module,
    labelled: LabelledBatch,
    backend: TrainingBackend,
    sub_models: list[SubModel],
    full_loss: FullLoss,
    sub_model_loss: SubModelLoss = "cross_entropy",
    answer_loss: float = 0.0,
) -> Iterator[Tensor]:
    """The loss of each pass, summed over the batch's windows: the full model's, then each sub-model's.

    The caller goes backward through one loss before it asks for the next, so that one pass's activations are held at a
    time. Every pass weighs the same (Kim and Cho 2021, algorithm 1).

    Args:
        model: a `SpanModel`, or one wrapped for several devices.
        labelled: the batch.
        backend: of the full pass; the sub-models' keeps nothing for a teacher.
        sub_models: none for plain fine-tuning; a sub-model learns from the full model's detached logits alone.
        full_loss: of the full pass.
        sub_model_loss: as `distillation_loss`.
        answer_loss: weight of the span head's cross-entropy on the states that enter each layer, in the mean over
            layers, against the full model's own detached logits.
    """
    keep = {"keep_hidden_states": backend.keep is not None, "keep_layer_logits": answer_loss > 0}
    full: Pass = model(labelled, backend, **keep)
    packing = labelled.batch.packing
    said = SpanLogits(full.logits.start_logits.detach(), full.logits.end_logits.detach())
    loss = full_loss(full, labelled)
    if full.layer_logits is not None:
        num_layers = full.layer_logits.start_logits.shape[1]
        loss = loss + answer_loss / num_layers * distillation_loss(full.layer_logits, said, packing)
    del full
    yield loss / (1 + len(sub_models))
    del loss
    backend = backend.keeping_nothing()
    for sub_model in sub_models:
        student: Pass = model(labelled, backend, sub_model)
        yield distillation_loss(student.logits, said, packing, sub_model_loss) / (1 + len(sub_models))
