"""What the models tell on request of the tokens that each layer kept."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.model import BertEncoder, LayerKept, LengthSchedule, PackedBatch, SpanLogits
from dtbert.model.scorers import BUILT_IN_SCORERS
from tests.peer import make_config, make_dtbert, make_peer

MODEL = make_dtbert(make_peer(make_config(layers=4, heads=3, head_size=8)))

SEQLENS = st.lists(st.integers(1, 40), min_size=1, max_size=4)
SCHEDULES = st.builds(
    lambda ratios, scorer, keep_cls, keep_question: LengthSchedule.ratios(
        sorted(ratios, reverse=True), scorer=scorer, keep_cls=keep_cls, keep_question=keep_question
    ),
    st.lists(st.floats(0.02, 1), min_size=4, max_size=4),
    st.sampled_from(BUILT_IN_SCORERS),
    st.booleans(),
    st.booleans() | st.lists(st.booleans(), min_size=4, max_size=4),
)


def padded_batch(seqlens: list[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, a mask with padding wherever it likes to be, and segments."""
    generator = torch.Generator().manual_seed(seed)
    shape = len(seqlens), max(seqlens) + 2
    mask = torch.zeros(shape, dtype=torch.int64)
    for row, length in enumerate(seqlens):
        mask[row, torch.randperm(shape[1], generator=generator)[:length]] = 1
    ids = torch.randint(0, 120, shape, generator=generator)
    return ids, mask, (mask.cumsum(1) > torch.tensor(seqlens)[:, None] // 3).long()


@settings(max_examples=25)
@given(SEQLENS, SCHEDULES, st.integers(0, 2**16))
def test_kept_are_the_most_significant_of_those_that_entered(
    seqlens: list[int], schedule: LengthSchedule, seed: int
) -> None:
    ids, mask, segments = padded_batch(seqlens, seed)
    out = MODEL(ids, mask, segments, schedule, output_kept=True)
    plain = MODEL(ids, mask, segments, schedule)
    assert type(plain) is SpanLogits
    # Only who scores in parts may round otherwise; this backend does not.
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(out[:2], plain, strict=True))
    assert len(out.kept) == 4
    entered = mask.bool()
    for layer, (kept, significance, lengths) in enumerate(out.kept):
        assert list(lengths) == kept.sum(1).tolist()
        counts = [schedule.lengths(length)[layer] for length in seqlens]
        assert kept.sum(1).tolist() == counts
        assert (kept <= entered).all()
        if significance is None:
            assert torch.equal(kept, entered)
        else:
            assert torch.equal(significance.isnan(), ~entered)
            for row, count in enumerate(counts):
                columns = entered[row].nonzero().squeeze(1).tolist()
                by_significance = sorted(columns, key=lambda at: (-significance[row, at].item(), at))
                assert kept[row].nonzero().squeeze(1).tolist() == sorted(by_significance[:count])
                stays = [
                    at
                    for number, at in enumerate(columns)
                    if (schedule.keep_cls and number == 0)
                    or (schedule.keeps_question[layer] and segments[row, at] == 0)
                ]
                assert [at for at in columns if significance[row, at] == torch.inf] == stays
        entered = kept


def equal(left: LayerKept, right: LayerKept) -> bool:
    scores = (left.significance is None) == (right.significance is None)
    if left.significance is not None and right.significance is not None:
        scores = torch.equal(left.significance.nan_to_num(-1), right.significance.nan_to_num(-1))
    return torch.equal(left.mask, right.mask) and scores and left.lengths == right.lengths


def test_packed_batches_and_bare_encoders_tell_the_same() -> None:
    ids, schedule = torch.randint(0, 120, (1, 30)), LengthSchedule.ratios([0.8, 0.8, 0.5, 0.2], scorer="value_norm")
    padded = MODEL(ids, schedule=schedule, output_kept=True).kept
    packed = MODEL.forward_packed(PackedBatch.from_lists(ids.tolist()), schedule, output_kept=True).kept
    encoder = BertEncoder(MODEL.config).eval().requires_grad_(False)
    encoder.encoder.load_state_dict(MODEL.encoder.state_dict())
    bare = encoder(ids, schedule=schedule, output_kept=True).kept
    assert [one.significance is None for one in padded] == [False, True, False, False]
    for of_batch, of_packed, of_encoder in zip(padded, packed, bare, strict=True):
        scores = None if of_packed.significance is None else of_packed.significance[None]
        assert equal(of_batch, LayerKept(of_packed.mask[None], scores, of_packed.lengths))
        assert torch.equal(of_batch.mask, of_encoder.mask)
    assert encoder(ids, schedule=schedule).kept == ()
    nothing_dropped = MODEL(ids, output_kept=True).kept
    assert all(one.mask.all() and one.significance is None for one in nothing_dropped)


@pytest.mark.parametrize("scorer", BUILT_IN_SCORERS)
def test_significance_is_the_scorers(scorer: str) -> None:
    ids, segments = torch.randint(0, 120, (2, 25)), (torch.arange(25) >= 8).long().expand(2, 25)
    schedule = LengthSchedule.ratios([0.6, 0.6, 0.3, 0.3], scorer=scorer)
    exact = make_dtbert(make_peer(make_config(layers=4, heads=3, head_size=8)), backend="reference").double()
    got, want = (model(ids, None, segments, schedule, output_kept=True).kept for model in (MODEL, exact))
    for layer in (0, 2):
        mine, theirs = got[layer].significance, want[layer].significance
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), theirs.double(), atol=1e-4, rtol=1e-4, equal_nan=True)
