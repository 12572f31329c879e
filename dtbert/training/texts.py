"""Training on labelled texts: their batches, a classifier's passes, and the losses of a step."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtbert.evaluation import LabelledTexts
from dtbert.kernels.packing import to_device
from dtbert.model import BertForSequenceClassification, PackedBatch
from dtbert.text import TextReader, TextTokens
from dtbert.text.running import pack
from dtbert.training.backend import TrainingBackend
from dtbert.training.data import TrainingData
from dtbert.training.dropout import dropout
from dtbert.training.length_drop import SubModel
from dtbert.training.options import SubModelLoss
from dtbert.weights import places_of


class LabelledTextBatch(NamedTuple):
    """A packed batch of B texts; ``labels`` ``[B]``: int64 by the model's numbers, or float32, the numbers."""

    batch: PackedBatch
    labels: Tensor


@dataclass(frozen=True)
class TextTrainingSet(TrainingData):
    """Labelled texts as tokens.

    Attributes:
        texts: tokens of each.
        labels: ``[n]``, as `LabelledTextBatch` has them.
        ids: what to call each: its line.
        unusable: what is wrong with each text that was left out.
    """

    unit = "text"

    texts: list[TextTokens]
    labels: Tensor
    ids: list[str]
    unusable: list[str]

    @classmethod
    def from_texts(cls, data: LabelledTexts, reader: TextReader, labels: Sequence[str]) -> "TextTrainingSet":
        """Tokenize texts for a model with these labels.

        Raises:
            ValueError: no text is left, or the labels are not the data's.
        """
        places = places_of(data.labels, labels) if data.labels else []
        texts, numbers, ids, unusable = list[TextTokens](), list[float](), list[str](), list[str]()
        read = (one for part in reader.read_many(example.texts for example in data.examples) for one in part)
        for example, one in zip(data.examples, read, strict=True):
            if not isinstance(one, TextTokens):
                unusable.append(f"line {example.line}: {one}")
                continue
            texts.append(one)
            numbers.append(places[int(example.label)] if places else example.label)
            ids.append(f"line {example.line}")
        if not texts:
            raise ValueError(f"none of {len(unusable)} texts can be trained on: {'; '.join(unusable[:3])}")
        return cls(texts, torch.tensor(numbers, dtype=torch.int64 if places else torch.float32), ids, unusable)

    @property
    def lengths(self) -> list[int]:
        return [len(one.ids) for one in self.texts]

    def id_of(self, index: int) -> str:
        return self.ids[index]

    def collate(self, indices: Sequence[int], device: torch.device) -> LabelledTextBatch:
        batch = pack([self.texts[index] for index in indices], device)
        return LabelledTextBatch(batch, to_device(self.labels[list(indices)], device))


class ClassifierModel(nn.Module):
    """The classifier as training calls it: a backend and a sub-model of its own for each pass."""

    def __init__(self, model: BertForSequenceClassification) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, labelled: LabelledTextBatch, backend: TrainingBackend, sub_model: SubModel | None = None
    ) -> Tensor:
        """Logits ``[B, num_labels]``, with dropout before the classifier as transformers has it."""
        model, drops = self.model, sub_model or SubModel(None)
        states = model.cls_states(labelled.batch, drops.schedule, backend, drops.skip_layers)
        return backend.linear(dropout(model.pooled(states, backend), backend.hidden_dropout), model.classifier)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels, or the squared error of numbers, summed over the texts."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        return F.mse_loss(wide[:, 0], labels.to(wide.dtype), reduction="sum")
    return F.cross_entropy(wide, labels, reduction="sum")


def agreement_loss(student: Tensor, teacher: Tensor, kind: SubModelLoss = "cross_entropy") -> Tensor:
    """How far a sub-model is from what the full model says, summed over the texts; no gradient goes to the latter.

    Of labels as `dtbert.training.losses.distillation_loss`, which explains ``kind``; of one, a number, its square.
    """
    own, other = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (student, teacher.detach()))
    if own.shape[1] == 1:
        return F.mse_loss(own, other, reduction="sum")
    own_log, other_log = own.log_softmax(1), other.log_softmax(1)
    terms = own_log.exp() * (own_log - other_log) if kind == "kl" else -other_log.exp() * own_log
    return terms.sum()


def text_losses_of_step(
    model: nn.Module,
    labelled: LabelledTextBatch,
    backend: TrainingBackend,
    sub_models: list[SubModel],
    sub_model_loss: SubModelLoss = "cross_entropy",
) -> Iterator[Tensor]:
    """The loss of each pass of a `ClassifierModel`, summed over the texts: as `dtbert.training.step.losses_of_step`."""
    logits: Tensor = model(labelled, backend)
    said = logits.detach()
    yield label_loss(logits, labelled.labels) / (1 + len(sub_models))
    del logits
    for sub_model in sub_models:
        yield agreement_loss(model(labelled, backend, sub_model), said, sub_model_loss) / (1 + len(sub_models))
