"""Where a text speaks of what is asked: known from the words alone, before any layer has read them."""

from torch import Tensor

from dtbert.kernels import Backend
from dtbert.model.batch import PackedBatch


def question_overlap(batch: PackedBatch) -> Tensor:
    """How many words of the question stand near each token, float32 ``[T]``: `Backend.question_overlap`."""
    return Backend().question_overlap(batch.ids, batch.packing)
