"""How sub-models are drawn."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtbert.kernels import Left, Packing
from dtbert.training import LengthDrop
from dtbert.training.length_drop import BatchSchedule, sub_models


@given(layers=st.integers(1, 12), bound=st.floats(0.01, 0.9), step=st.integers(0, 10**6), seed=st.integers(0, 99))
def test_sub_models_drop_within_the_bound_and_the_last_is_the_smallest(
    layers: int, bound: float, step: int, seed: int
) -> None:
    drop = LengthDrop(3, bound, 0.5, ("received", "cls+question"))
    found = sub_models(drop, layers, seed, step)
    assert found == sub_models(drop, layers, seed, step)
    assert len(found) == 4
    for sub_model in found:
        before = 1.0
        for ratio in sub_model.schedule.length_config:
            assert before * (1 - bound) - 1e-9 <= ratio <= before
            before = ratio
        assert sub_model.schedule.keep_question == (sub_model.schedule.scorer == "cls")
    assert found[-1].schedule.length_config[-1] == pytest.approx((1 - bound) ** layers)
    assert not found[-1].skip_layers


@given(bounds=st.lists(st.floats(0, 0.9), min_size=1, max_size=12).filter(any), step=st.integers(0, 10**6))
def test_each_layer_drops_within_its_own_bound(bounds: list[float], step: int) -> None:
    *drawn, smallest = sub_models(LengthDrop(2, tuple(bounds)), len(bounds), 0, step)
    before = 1.0
    for bound, ratio in zip(bounds, smallest.schedule.length_config, strict=True):
        assert ratio == pytest.approx(before * (1 - bound))
        before = ratio
    for sub_model in drawn:
        before = 1.0
        for bound, ratio in zip(bounds, sub_model.schedule.length_config, strict=True):
            assert before * (1 - bound) - 1e-9 <= ratio <= before
            before = ratio


def test_bounds_for_another_number_of_layers_are_refused() -> None:
    with pytest.raises(ValueError, match="2 ratio_bounds for 6 layers"):
        sub_models(LengthDrop(ratio_bound=(0.1, 0.2)), 6, 0, 0)


def test_sub_models_change_with_step_and_seed() -> None:
    drop = LengthDrop()
    drawn = [sub_models(drop, 6, seed, step)[0].schedule for seed in range(3) for step in range(3)]
    assert len({schedule.length_config for schedule in drawn}) == 9


def test_layer_dropout_leaves_out_about_its_part_of_the_layers() -> None:
    drop = LengthDrop(4, 0.2, 0.25)
    skipped = [len(one.skip_layers) for step in range(100) for one in sub_models(drop, 6, 0, step)[:-1]]
    assert sum(skipped) / (6 * len(skipped)) == pytest.approx(0.25, abs=0.03)


@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    ratio=st.floats(0.1, 1),
    keeps=st.booleans(),
    scorer=st.sampled_from(["answer_overlap", "received"]),
    seed=st.integers(0, 2**31),
)
def test_a_batch_schedule_keeps_the_tokens_of_the_highest_shares_of_all_sequences(
    lengths: list[int], ratio: float, keeps: bool, scorer: str, seed: int
) -> None:
    (packing,) = Packing.stack([lengths], torch.device("cpu"))
    scores = torch.randn(packing.num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    scores = scores if scorer == "answer_overlap" else scores.exp()
    schedule = BatchSchedule.ratios([ratio], scorer=scorer, keep_question=keeps)
    segments = torch.cat([(torch.arange(length) >= 2).long() for length in lengths])
    left = Left(packing, segments=segments if keeps else None)
    targets = schedule.targets(packing)

    kept = targets.target(0, left, scores.float()).seqlens
    total = sum(schedule.lengths(length)[0] for length in lengths)
    assert targets.may_drop(0, packing) == (total < sum(lengths)) == (targets.last_drop == 0)
    assert sum(kept) == total
    shares = [scores[rows].softmax(0) if scorer == "answer_overlap" else scores[rows] / scores[rows].sum()
              for rows in packing.slices]  # fmt: skip
    if keeps:
        shares = [share.index_fill(0, torch.arange(min(2, len(share))), 9.0) for share in shares]
    ordered = [share.sort(descending=True).values for share in shares]
    # The first of each sequence stays anyway; beyond it no token stays of a lower share than one that goes.
    stay = [float(share[count - 1]) for share, count in zip(ordered, kept, strict=True) if count > 1]
    go = [float(share[count]) for share, count in zip(ordered, kept, strict=True) if count < len(share)]
    assert min(stay, default=10.0) >= max(go, default=0.0) - 1e-6


def test_a_batch_schedule_shares_scores_as_thresholds_do() -> None:
    (packing,) = Packing.stack([[4, 4]], torch.device("cpu"))
    targets = BatchSchedule.ratios([0.5], scorer="overlap").targets(packing)
    # Where all scores are 0 the shares are equal: of a quarter each, below the greatest two of the other sequence.
    scores = torch.tensor([0.0, 0, 0, 0, 4, 3, 2, 0])
    assert targets.target(0, Left(packing), scores).seqlens == (2, 2)
    for wrong in (-1.0, torch.nan, torch.inf):
        with pytest.raises(ValueError, match="the scores of 'overlap' in layer 0 cannot be shared out"):
            targets.target(0, Left(packing), scores.index_fill(0, torch.tensor([2]), wrong))


def test_sub_models_draw_their_policy() -> None:
    drop = LengthDrop(1, scorers=("answer+question",), policies=("threshold", "threshold", "lengths"))
    drawn = [one.schedule for step in range(200) for one in sub_models(drop, 6, 0, step)]
    of_batch = [type(schedule) is BatchSchedule for schedule in drawn]
    assert sum(of_batch) / len(of_batch) == pytest.approx(2 / 3, abs=0.1)
    assert all(schedule.keep_question and schedule.scorer == "answer" for schedule in drawn)
    drop = LengthDrop(1, scorers=("answer+question:4",), policies=("threshold", "lengths"))
    drawn = [one.schedule for one in sub_models(drop, 6, 0, 0)]
    assert all(schedule.keeps_question == (True,) * 4 + (False,) * 2 and schedule.keep_cls for schedule in drawn)
    assert all(type(one.schedule) is not BatchSchedule for one in sub_models(LengthDrop(), 6, 0, 0))
    with pytest.raises(ValueError, match=r"'answer[+]question:4' keeps the question in 4 layers, of a model with 3"):
        sub_models(drop, 3, 0, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sandwich": -1}, "num_sandwich .* 0, not -1"),
        ({"ratio_bound": 0.0}, "ratio_bound .* 0 .* 1, not 0.0"),
        ({"ratio_bound": float("nan")}, "ratio_bound .* 0 .* 1, not nan"),
        ({"ratio_bound": (0.2, 1.0)}, r"ratio_bound for each layer .* below 1, .* not \(0.2, 1.0\)"),
        ({"ratio_bound": (0.0, 0.0)}, r"ratio_bound for each layer .* one above 0, not \(0.0, 0.0\)"),
        ({"answer_loss": -1.0}, "answer_loss .* 0, not -1.0"),
        ({"layer_dropout": 1.0}, "layer_dropout .* 0 .* 1, not 1.0"),
        ({"scorers": ()}, "^scorers "),
        ({"scorers": ("best",)}, "scorer 'best'"),
        ({"scorers": ("cls+answer",)}, "'answer' .*'cls[+]answer'"),
        ({"scorers": ("cls+question:0",)}, "'question:0' .*'cls[+]question:0'"),
        ({"scorers": ("cls+question:x",)}, "'question:x' .*'cls[+]question:x'"),
        ({"policies": ()}, "^policies "),
        ({"policies": ("top_p",)}, "policies holds 'top_p': name lengths or threshold"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthDrop(**options)
