"""What training minimises: the answer's place, and a teacher's opinion of it."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from dtbert.model import Packing
from dtbert.model.question_answering import SpanLogits

DistillationLoss = Literal["cross_entropy", "kl"]


def by_window(values: Tensor, packing: Packing) -> Tensor:
    """Packed logits ``[T]`` as float32 ``[W, S]``, -inf past each window's end."""
    pieces = values.float().split(list(packing.seqlens))
    return pad_sequence(list(pieces), batch_first=True, padding_value=-torch.inf)


def span_loss(logits: SpanLogits, packing: Packing, starts: Tensor, ends: Tensor) -> Tensor:
    """Cross-entropy of the answer's first and last token, their mean, summed over the windows.

    Args:
        logits: packed, ``[T]`` each.
        packing: of the W windows.
        starts, ends: int64 ``[W]``, counted from the window's first token.

    Returns:
        A float32 scalar.
    """
    losses = [
        F.cross_entropy(by_window(values, packing), target, reduction="sum")
        for values, target in zip(logits, (starts, ends), strict=True)
    ]
    return (losses[0] + losses[1]) / 2


def distillation_loss(
    student: SpanLogits,
    teacher: SpanLogits,
    packing: Packing,
    kind: DistillationLoss = "cross_entropy",
    temperature: float = 1.0,
) -> Tensor:
    """How far the student's distributions over tokens are from the teacher's, start and end in the mean, summed.

    Args:
        student, teacher: packed logits, ``[T]`` each; no gradient goes to the teacher.
        packing: of the windows.
        kind: ``"cross_entropy"``: soft cross-entropy of teacher against student, which has the gradient of
            KL(teacher || student) (Hinton et al. 2015; the intent of Kim and Cho 2021). ``"kl"``: KL(student ||
            teacher), as the public code of Length-Adaptive Transformer computes it.
        temperature: divides both logits.

    Returns:
        A float32 scalar.
    """
    total = torch.zeros((), device=student.start_logits.device)
    for own, other in zip(student, teacher, strict=True):
        own_log = (by_window(own, packing) / temperature).log_softmax(1)
        other_log = (by_window(other.detach(), packing) / temperature).log_softmax(1)
        # Padding has probability 0 and log-probability -inf: their product must be 0.
        own_log, other_log = own_log.clamp_min(_LOG_ZERO), other_log.clamp_min(_LOG_ZERO)
        if kind == "kl":
            total = total + (own_log.exp() * (own_log - other_log)).sum()
        else:
            total = total - (other_log.exp() * own_log).sum()
    return total / 2


# exp of it is 0 in float32.
_LOG_ZERO = -1e4
