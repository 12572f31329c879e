"""Training: a span head on any BERT, LengthDrop for dropped tokens, distillation from a teacher; resumable."""

from dtbert.training.checkpoint import RunFolder
from dtbert.training.data import TrainingSet
from dtbert.training.length_drop import LengthDrop
from dtbert.training.loop import Trainer, TrainingError, TrainingOptions

__all__ = ["LengthDrop", "RunFolder", "Trainer", "TrainingError", "TrainingOptions", "TrainingSet"]
