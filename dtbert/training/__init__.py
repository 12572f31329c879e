"""Training: a span head on any BERT, LengthDrop for dropped tokens, distillation from a teacher; resumable.

Here are the options, which load nothing heavy; everything else is imported from its own module.
"""

from dtbert.training.options import Distillation, LengthDrop, TrainingOptions

__all__ = ["Distillation", "LengthDrop", "TrainingOptions"]
