"""Training: a span head on any BERT, LengthDrop for dropped tokens, distillation from a teacher; resumable."""

from dtbert.training.checkpoint import RunFolder
from dtbert.training.data import TrainingSet
from dtbert.training.distillation import Distillation, Teacher
from dtbert.training.evaluation import HeldOut
from dtbert.training.length_drop import LengthDrop
from dtbert.training.loop import Trainer, TrainingError
from dtbert.training.options import TrainingOptions

__all__ = [
    "Distillation",
    "HeldOut",
    "LengthDrop",
    "RunFolder",
    "Teacher",
    "Trainer",
    "TrainingError",
    "TrainingOptions",
    "TrainingSet",
]
