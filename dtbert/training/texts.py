"""Training on labelled texts: their batches, a classifier's passes, and the losses of a step."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtbert.evaluation import LabelledTexts
from dtbert.kernels.packing import to_device
from dtbert.model import BertForSequenceClassification, PackedBatch
from dtbert.model.heads import first_states
from dtbert.text import TextReader, TextTokens
from dtbert.text.running import pack
from dtbert.training.backend import AttentionPieces, TrainingBackend
from dtbert.training.data import TrainingData
from dtbert.training.dropout import dropout
from dtbert.training.length_drop import SubModel
from dtbert.training.options import SubModelLoss
from dtbert.training.step import projected
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


class TextPass(NamedTuple):
    """What one forward pass gave: logits ``[B, num_labels]``; the others as `dtbert.training.step.Pass` has them."""

    logits: Tensor
    hidden_states: tuple[Tensor, ...]
    attention: list[AttentionPieces]


# The loss of the full pass, summed over the texts.
FullTextLoss = Callable[[TextPass, LabelledTextBatch], Tensor]


class ClassifierModel(nn.Module):
    """The classifier as training calls it; arguments are those of `dtbert.training.step.SpanModel`."""

    def __init__(self, model: BertForSequenceClassification, projection: nn.Linear | None = None) -> None:
        super().__init__()
        self.model = model
        self.projection = projection

    def forward(
        self,
        labelled: LabelledTextBatch,
        backend: TrainingBackend,
        sub_model: SubModel | None = None,
        keep_hidden_states: bool = False,
    ) -> TextPass:
        """With dropout before the classifier, as transformers has it."""
        model, batch, drops = self.model, labelled.batch, sub_model or SubModel(None)
        hidden_states: tuple[Tensor, ...] = ()
        if keep_hidden_states:
            # Of all tokens, for a teacher shows all of its own; the last layer's have no other reader.
            encoding = model.encoder(batch, None, backend=backend, keep_hidden_states=True)
            hidden_states = encoding.hidden_states
            states = first_states(encoding)
        else:
            states = model.cls_states(batch, drops.schedule, backend, drops.skip_layers)
        logits = backend.linear(dropout(model.pooled(states, backend), backend.hidden_dropout), model.classifier)
        hidden_states, logits = projected(self.projection, hidden_states, logits)
        return TextPass(logits, hidden_states, backend.kept)


def label_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of the labels, or the squared error of numbers, summed over the texts."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if labels.is_floating_point():
        return F.mse_loss(wide[:, 0], labels.to(wide.dtype), reduction="sum")
    return F.cross_entropy(wide, labels, reduction="sum")


def agreement_loss(
    student: Tensor, teacher: Tensor, kind: SubModelLoss = "cross_entropy", temperature: float = 1.0
) -> Tensor:
    """How far a model is from what its teacher says, summed over the texts; no gradient goes to the teacher.

    Of labels as `dtbert.training.losses.distillation_loss`, which explains the rest; of one, a number, the square.
    """
    own, other = (one.to(torch.promote_types(one.dtype, torch.float32)) for one in (student, teacher.detach()))
    if own.shape[1] == 1:
        return F.mse_loss(own, other, reduction="sum")
    own_log, other_log = ((one / temperature).log_softmax(1) for one in (own, other))
    terms = own_log.exp() * (own_log - other_log) if kind == "kl" else -other_log.exp() * own_log
    return terms.sum()


def text_label_loss(full: TextPass, labelled: LabelledTextBatch) -> Tensor:
    """`label_loss` of a pass."""
    return label_loss(full.logits, labelled.labels)


def text_losses_of_step(
    model: nn.Module,
    labelled: LabelledTextBatch,
    backend: TrainingBackend,
    sub_models: list[SubModel],
    full_loss: FullTextLoss = text_label_loss,
    sub_model_loss: SubModelLoss = "cross_entropy",
) -> Iterator[Tensor]:
    """The loss of each pass of a `ClassifierModel`, summed over the texts: as `dtbert.training.step.losses_of_step`."""
    full: TextPass = model(labelled, backend, keep_hidden_states=backend.keep is not None)
    said = full.logits.detach()
    loss = full_loss(full, labelled)
    del full
    yield loss / (1 + len(sub_models))
    del loss
    backend = backend.keeping_nothing()
    for sub_model in sub_models:
        student: TextPass = model(labelled, backend, sub_model)
        yield agreement_loss(student.logits, said, sub_model_loss) / (1 + len(sub_models))
