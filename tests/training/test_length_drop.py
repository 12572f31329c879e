"""How sub-models are drawn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtbert.training import LengthDrop
from dtbert.training.length_drop import sub_models


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
    with pytest.raises(ValueError, match="2 ratio_bounds for 6 layers: give one, or one for each layer"):
        sub_models(LengthDrop(ratio_bound=(0.1, 0.2)), 6, 0, 0)


def test_sub_models_change_with_step_and_seed() -> None:
    drop = LengthDrop()
    drawn = [sub_models(drop, 6, seed, step)[0].schedule for seed in range(3) for step in range(3)]
    assert len({schedule.length_config for schedule in drawn}) == 9


def test_layer_dropout_leaves_out_about_its_part_of_the_layers() -> None:
    drop = LengthDrop(4, 0.2, 0.25)
    skipped = [len(one.skip_layers) for step in range(100) for one in sub_models(drop, 6, 0, step)[:-1]]
    assert sum(skipped) / (6 * len(skipped)) == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sandwich": -1}, "num_sandwich must be at least 0, not -1"),
        ({"ratio_bound": 0.0}, "ratio_bound must be above 0 and below 1, not 0.0"),
        ({"ratio_bound": float("nan")}, "ratio_bound must be above 0 and below 1, not nan"),
        ({"ratio_bound": (0.2, 1.0)}, "for each layer must be at least 0 and below 1, and one above 0"),
        ({"ratio_bound": (0.0, 0.0)}, "for each layer must be at least 0 and below 1, and one above 0"),
        ({"answer_loss": -1.0}, "answer_loss must be at least 0, not -1.0"),
        ({"layer_dropout": 1.0}, "layer_dropout must be at least 0 and below 1, not 1.0"),
        ({"scorers": ()}, "scorers is empty"),
        ({"scorers": ("best",)}, "unknown scorer 'best'"),
        ({"scorers": ("cls+answer",)}, "unknown option 'answer' of the scorer 'cls[+]answer'"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthDrop(**options)
