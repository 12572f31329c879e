"""Where a text speaks of what is asked: known from the words alone, before any layer has read them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels.packing import Packing, TokenIds

# Tokens at which a word of the question is no longer near.
OVERLAP_REACH = 32

# Sums are of whole numbers, so that a token's value does not depend on what else is in the batch.
OVERLAP_UNIT = 2**20
# Ids and positions are below it.
_APART = 2**32


def question_overlap(ids: TokenIds, packing: Packing) -> Tensor:
    """`Backend.question_overlap` in plain torch."""
    input_ids, token_type_ids, positions = ids
    in_question = token_type_ids == 0
    # Rows that lie in no sequence stand behind all that do, as if they were one more.
    rows = torch.arange(positions.shape[0], dtype=torch.int32, device=positions.device)
    sequence = torch.searchsorted(packing.cu_seqlens[1:], rows, right=True)
    words = sequence * _APART + input_ids
    neighbours = in_question[1:] & in_question[:-1] & (sequence[1:] == sequence[:-1])
    asks = F.pad(neighbours, (1, 0)) & F.pad(neighbours, (0, 1))  # all of the question but its ends
    share = OVERLAP_UNIT // _count(words, ~in_question).clamp(min=1)
    share = share.where(~in_question & (_count(words, asks) > 0), 0)

    # A place at distance x counts (reach - |x|) / reach: two sums, of the shares and of the shares times their places.
    total, moment = _sums(share), _sums(share * positions)
    places = sequence * _APART + positions  # ascending, each sequence out of the others' reach
    here = torch.arange(1, positions.shape[0] + 1, device=positions.device)
    left = torch.searchsorted(places, places - OVERLAP_REACH, right=True)
    right = torch.searchsorted(places, places + OVERLAP_REACH)
    before = (OVERLAP_REACH - positions) * (total[here] - total[left]) + moment[here] - moment[left]
    after = (OVERLAP_REACH + positions) * (total[right] - total[here]) - moment[right] + moment[here]
    return (before + after).float() / (OVERLAP_REACH * OVERLAP_UNIT)


def _count(words: Tensor, where: Tensor) -> Tensor:
    """How often each word is among the words at the places ``where``, int64 ``[T]``."""
    among = words.where(where, -1).sort().values
    return torch.searchsorted(among, words, right=True) - torch.searchsorted(among, words)


def _sums(values: Tensor) -> Tensor:
    """Sums of the first 0, 1, ... T values, ``[T + 1]``."""
    return torch.cat([values.new_zeros(1), values.cumsum(0)])
