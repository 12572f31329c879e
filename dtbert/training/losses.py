"""What training minimises: the place of the answer, and what a teacher shows; each a scalar, summed over windows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.model import Packing, SpanLogits
from dtbert.training.backend import AttentionPieces
from dtbert.training.options import SubModelLoss
from dtbert.training.places import places_of

# exp of it is 0 in float32.
_LOG_ZERO = -1e4


def by_window(values: Tensor, packing: Packing) -> Tensor:
    """Packed logits ``[T, ...]`` as ``[W, S, ...]`` in float32 or wider, -inf past each window's end."""
    return places_of(packing).pad(_wide(values), -torch.inf)


def span_loss(logits: SpanLogits, packing: Packing, starts: Tensor, ends: Tensor) -> Tensor:
    """Cross-entropy of the answer's first and last token, their mean.

    Args:
        logits, packing: of the W windows, packed, ``[T]`` each.
        starts, ends: int64 ``[W]``, counted from the window's first token.
    """
    log_probabilities = by_window(torch.stack(logits, 1), packing).log_softmax(1)
    return F.nll_loss(log_probabilities, torch.stack([starts, ends], 1), reduction="sum") / 2


def distillation_loss(
    student: SpanLogits,
    teacher: SpanLogits,
    packing: Packing,
    kind: SubModelLoss = "cross_entropy",
    temperature: float = 1.0,
) -> Tensor:
    """How far the student's distributions over tokens are from the teacher's, start and end in the mean.

    Args:
        student, teacher, packing: packed logits, ``[T]`` each; no gradient goes to the teacher. The student's may be
            ``[T, L]``: each column learns.
        kind: ``"cross_entropy"``: soft cross-entropy of teacher against student, which has the gradient of
            KL(teacher || student) (Hinton et al. 2015; the intent of Kim and Cho 2021). ``"kl"``: KL(student ||
            teacher), as the public code of Length-Adaptive Transformer computes it; docs/results.md
            compares the two.
        temperature: divides both logits; the loss is not scaled back by its square.
    """
    # Padding has probability 0 and log-probability -inf: their product must be 0.
    own_log, other_log = (
        (by_window(torch.stack(logits, 1), packing) / temperature).log_softmax(1).clamp_min(_LOG_ZERO)
        for logits in (student, SpanLogits(*(values.detach() for values in teacher)))
    )
    if own_log.ndim > other_log.ndim:
        other_log = other_log[..., None]
    terms = own_log.exp() * (own_log - other_log) if kind == "kl" else -other_log.exp() * own_log
    return terms.sum() / 2


def hidden_state_loss(student: Sequence[Tensor], teacher: Sequence[Tensor], packing: Packing) -> Tensor:
    """Squared error of hidden states ``[T, H]``: the mean over each window's tokens and H, summed over the pairs.

    The first of the student's is compared with the first of the teacher's, and so on (Jiao et al. 2020, equations 8
    and 9).
    """
    lengths = packing.cu_seqlens.diff()
    of_tokens = lengths.repeat_interleave(lengths, output_size=packing.num_tokens)
    errors = [
        ((_wide(own) - _wide(other)).square().mean(1) / of_tokens).sum()
        for own, other in zip(student, teacher, strict=True)
    ]
    return torch.stack(errors).sum()


def attention_loss(student: Sequence[AttentionPieces], teacher: Sequence[AttentionPieces], packing: Packing) -> Tensor:
    """Squared error of attention: the mean over each window's heads, queries and keys, summed over the pairs of layers.

    The first layer of the student's is compared with the first of the teacher's, and so on (Jiao et al. 2020, equation
    7); where they differ in the number of heads, the means over their heads.
    """
    pairs = packing.cu_seqlens.diff().square()  # of a query and a key
    errors = []
    for own_layer, other_layer in zip(student, teacher, strict=True):
        sums = []
        for own, other in zip(own_layer, other_layer, strict=True):
            if own.shape[1] != other.shape[1]:
                own, other = own.mean(1, keepdim=True), other.mean(1, keepdim=True)
            sums.append((_wide(own) - _wide(other)).square().mean(1).sum((1, 2)))
        errors.append((torch.cat(sums) / pairs).sum())
    return torch.stack(errors).sum()


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
