"""Thresholds learnt by gradient: the soft model becomes the hard one, thresholds move, and the hard model drops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.model import BertForQuestionAnswering, PackedBatch, Threshold
from dtbert.model.scorers import BUILT_IN_SCORERS
from dtbert.training.learnt_thresholds import SoftPass, ThresholdLearning, learn_thresholds, soft_work
from tests.peer import make_config, make_dtbert, make_peer

MODEL = make_dtbert(make_peer(make_config(layers=3, heads=3, head_size=8)), backend="reference")


def window(length: int, seed: int) -> PackedBatch:
    ids = torch.randint(0, 120, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return PackedBatch.from_lists([ids], [[int(i >= length // 3) for i in range(length)]])


def work_of(model: BertForQuestionAnswering, windows: list[PackedBatch], policy: Threshold) -> float:
    """The tokens that leave the layers, over all."""
    kept = [layer.lengths[0] for one in windows for layer in model.forward_packed(one, policy, output_kept=True).kept]
    return sum(kept) / (3 * sum(one.packing.num_tokens for one in windows))


@settings(max_examples=20)
@given(
    st.integers(2, 30),
    st.lists(st.sampled_from([1e-4, 0.01, 0.03, 0.06, 0.2]), min_size=3, max_size=3),
    st.sampled_from([name for name in BUILT_IN_SCORERS if name != "random"]),
    st.booleans() | st.lists(st.booleans(), min_size=3, max_size=3),
    st.integers(0, 99),
)
def test_soft_model_without_temperature_is_the_hard_one(
    length: int, thresholds: list[float], scorer: str, keep_question: bool | list[bool], seed: int
) -> None:
    batch = window(length, seed)
    policy = Threshold(thresholds, scorer=scorer, keep_question=keep_question, keep_cls=True)
    soft = SoftPass(MODEL, batch, policy, torch.tensor(thresholds).log(), 1e-6)
    start, end, kept = MODEL.forward_packed(batch, policy, output_kept=True)
    for left, layer in zip(soft.left, kept, strict=True):
        assert (left > 0.5).tolist() == layer.mask.tolist()
    torch.testing.assert_close(soft.logits.start_logits, start, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(soft.logits.end_logits, end, atol=1e-4, rtol=1e-4)


def test_thresholds_move_and_the_hard_model_drops_the_more_the_dearer_work_is() -> None:
    windows, start = [window(24, seed) for seed in range(6)], Threshold([0, 0, 0], keep_question=True)
    before = [parameter.clone() for parameter in MODEL.parameters()]
    gentle, harsh = (
        learn_thresholds(MODEL, windows, start, ThresholdLearning(weight, steps=15, windows=3, learning_rate=0.2))
        for weight in (0.01, 30.0)
    )
    assert gentle.keep_question
    assert all(low < high for low, high in zip(gentle.thresholds, harsh.thresholds, strict=True))
    # A third is the question, which stays.
    assert 0.33 < work_of(MODEL, windows, harsh) < work_of(MODEL, windows, gentle) - 0.2
    assert all(torch.equal(now, then) for now, then in zip(MODEL.parameters(), before, strict=True))


def test_soft_work_of_whole_tokens_is_one() -> None:
    assert soft_work([torch.ones(9)] * 3, MODEL.config) == pytest.approx(1)
    assert soft_work([torch.full((9,), 0.5)] * 3, MODEL.config) < 0.6


@pytest.mark.parametrize(
    ("start", "windows", "message"),
    [
        (Threshold([0, 0]), 1, "2 entries, the model 3 layers"),
        (Threshold([0, 0, 0], accumulate=True), 1, "a layer's own"),
        (Threshold([0, 0, 0], skip_layers=[1]), 1, "no layer left out"),
        (Threshold([0, 0, 0]), 0, "no windows"),
    ],
)
def test_what_cannot_learn_is_refused(start: Threshold, windows: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        learn_thresholds(MODEL, [window(9, 0)] * windows, start, ThresholdLearning(1.0))
    with pytest.raises(ValueError, match="steps must be above 0, not 0"):
        ThresholdLearning(1.0, steps=0)
