"""The schedules that a search can reach, and their parameters."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import FixedTrial

from dtbert.model import LengthSchedule, Threshold, TopP
from dtbert.search import (
    AdaptiveSpace,
    KeepQuestion,
    SearchSpace,
    Space,
    ThresholdSpace,
    TopPSpace,
    constant_ratio,
    drops_by,
    space_of,
)

SOME = (True, True, False, False)
SPACE = SearchSpace(4, ("received", "cls"), (False, True, SOME))
CUBES = st.floats(0.05**3, 1.1)


@given(st.lists(CUBES, min_size=4, max_size=4), st.sampled_from(SPACE.scorers), st.booleans())
def test_any_parameters_give_a_schedule_that_gives_them_back(
    cubes: list[float], scorer: str, keep_question: bool
) -> None:
    parameters = {f"keep_{layer}_cubed": cube for layer, cube in enumerate(cubes)}
    parameters |= {"scorer": scorer, "keep_question": keep_question}
    schedule = SPACE.suggest(FixedTrial(parameters))
    assert schedule.kind == "ratios"
    assert (schedule.scorer, schedule.keep_question) == (scorer, keep_question)
    kept = 1.0
    for cube, ratio in zip(cubes, schedule.length_config, strict=True):
        kept *= min(1.0, cube ** (1 / 3))
        assert ratio == pytest.approx(max(kept, 0.005), abs=6e-5)


@given(
    st.lists(st.floats(0.3, 1), min_size=4, max_size=4),
    st.sampled_from(SPACE.scorers),
    st.sampled_from(SPACE.keep_question),
)
def test_any_schedule_of_the_space_can_be_a_start(
    factors: list[float], scorer: str, keep_question: KeepQuestion
) -> None:
    ratios, kept = [], 1.0
    for factor in factors:
        kept = round(kept * factor, 4)
        ratios.append(kept)
    schedule = LengthSchedule.ratios(ratios, **drops_by(scorer, keep_question))
    parameters = SPACE.parameters_of(schedule)
    assert isinstance(parameters["keep_question"], bool | str)  # what a study can hold
    assert SPACE.suggest(FixedTrial(parameters)) == schedule


def test_where_a_layer_lets_the_question_go_cls_stays() -> None:
    options = drops_by("cls", SOME)
    assert (options["keep_question"], options["keep_cls"]) == (SOME, True)
    assert not drops_by("cls", True)["keep_cls"]
    without = LengthSchedule.ratios([1, 1, 1, 0.5], scorer="cls", keep_question=SOME)
    with pytest.raises(ValueError, match="keep_cls or keep_question differs"):
        SPACE.parameters_of(without)
    other = LengthSchedule.ratios(
        [1, 1, 1, 0.5], scorer="cls", keep_question=(True, False, False, False), keep_cls=True
    )
    with pytest.raises(ValueError, match="keep_cls or keep_question differs"):
        SPACE.parameters_of(other)


def test_last_layer_may_keep_two_tokens_of_a_window() -> None:
    harshest = {f"keep_{layer}_cubed": 0.05**3 for layer in range(4)} | {"scorer": "cls", "keep_question": False}
    assert SPACE.suggest(FixedTrial(harshest)).lengths(384)[-1] == 2


def test_constant_ratio_keeps_the_same_part_in_every_layer() -> None:
    assert constant_ratio(0.5, 4, "cls", True) == LengthSchedule.ratios(
        [0.5, 0.25, 0.125, 0.0625], scorer="cls", keep_question=True
    )
    assert constant_ratio(0.1, 4).length_config[-1] == 0.005


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (LengthSchedule.ratios([1, 0.5], scorer="cls"), "2 entries, the model 4 layers"),
        (LengthSchedule.absolute([300, 200, 100, 50]), "absolute"),
        (LengthSchedule.ratios([1, 1, 1, 0.5], scorer="answer"), "'answer' .* received, cls"),
        (LengthSchedule.ratios([1, 1, 1, 0.5]), "names no scorer: .* received, cls"),
        (LengthSchedule.ratios([1, 1, 1, 0.5], scorer="cls", keep_cls=True), "keep_cls"),
        (LengthSchedule.ratios([1, 1, 1, 0.02], scorer="cls"), "layer 3 keeps 0.020"),
        (LengthSchedule.ratios([0.2, 0.04, 0.008, 0.004], scorer="cls"), "layer 3 .* 0.004 "),
    ],
)
def test_start_outside_the_space_is_refused(schedule: LengthSchedule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPACE.parameters_of(schedule)


@pytest.mark.parametrize(
    ("scorers", "keep_question", "message"),
    [
        ((), (True,), "at least one scorer"),
        (("cls",), (), "keep_question"),
        (("cls", "cls"), (True,), "named twice: cls, cls"),
        (("luck",), (True,), "unknown scorer 'luck'"),
    ],
)
def test_space_that_makes_no_sense_is_refused(
    scorers: tuple[str, ...], keep_question: tuple[bool, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        SearchSpace(2, scorers, keep_question)


SHARES = [ThresholdSpace(4, ("received", "answer_overlap")), TopPSpace(4, ("received", "answer_overlap"))]


@given(
    st.sampled_from(SHARES),
    st.lists(st.floats(0, 1.2), min_size=4, max_size=4),
    st.sampled_from(SHARES[0].scorers),
    st.booleans(),
)
def test_any_share_that_is_drawn_can_be_a_start(
    space: AdaptiveSpace, drawn: list[float], scorer: str, keep_question: bool
) -> None:
    parameters = {f"gentle_{layer}": gentle for layer, gentle in enumerate(drawn)}
    policy = space.suggest(FixedTrial(parameters | {"scorer": scorer, "keep_question": keep_question}))
    assert (policy.scorer, policy.keep_question) == (scorer, keep_question)
    assert [not policy.chooses(layer) for layer in range(4)] == [gentle > 1 for gentle in drawn]
    assert space.suggest(FixedTrial(space.parameters_of(policy))) == policy


def test_gentler_draws_keep_more_and_logarithms_reach_further() -> None:
    made, parts = (
        [space._make([gentle] * 4, **drops_by(scorer, False)) for scorer in space.scorers for gentle in (0, 1)]
        for space in SHARES
    )
    assert [policy.thresholds[0] for policy in made] == [0.03162, 1e-4, 0.3162, 1e-11]
    assert [policy.parts[0] for policy in parts] == [0.369, 0.99369, 0.369, 1 - 6.31e-10]
    assert len({*SHARES[0].constants()}) == 3 * 2 * 2


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (LengthSchedule.ratios([1, 1, 1, 0.5]), "LengthSchedule is no Threshold, .* --policy"),
        (TopP([0.5] * 4), "TopP is no Threshold"),
        (Threshold([0.5] * 4), "layer 0 has the share 0.5, the search tries 0.0001 to 0.0316, or none"),
        (Threshold([0.01] * 4, scorer="received", floor=0.1), "floor is 0.1: the search leaves it out"),
        (Threshold([0.01] * 4, scorer="received", accumulate=True), "accumulate is True"),
        (Threshold([0.01] * 4, scorer="received", skip_layers=[1]), r"skip_layers is \(1,\)"),
    ],
)
def test_what_is_not_a_share_of_the_space_is_refused(policy: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SHARES[0].parameters_of(policy)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a Threshold is no LengthSchedule, which"):
        SPACE.parameters_of(Threshold([0.01] * 4))


MIXED = space_of(("top-p", "lengths", "threshold"), 4, SPACE.scorers, (True,))


@given(st.sampled_from(MIXED.parts), st.sampled_from(SPACE.scorers), st.lists(CUBES, min_size=4, max_size=4))
def test_several_spaces_give_the_policy_of_the_one_that_is_drawn(own: Space, scorer: str, numbers: list[float]) -> None:
    drawn = "keep_{}_cubed" if own.name == "lengths" else "gentle_{}"
    parameters = {drawn.format(layer): number for layer, number in enumerate(numbers)}
    parameters |= {"scorer": scorer, "keep_question": True}
    policy = own.suggest(FixedTrial(parameters))
    named = {f"{own.name} {name}": value for name, value in parameters.items()}
    assert MIXED.suggest(FixedTrial({"policy": own.name, **named})) == policy
    for constant in own.constants():
        assert MIXED.parameters_of(constant).keys() == {"policy", *named}
        assert MIXED.suggest(FixedTrial(MIXED.parameters_of(constant))) == constant


def test_what_none_of_several_spaces_has_is_refused() -> None:
    assert space_of(("threshold",), 4, SPACE.scorers, (True,)) == ThresholdSpace(4, SPACE.scorers, (True,))
    shares = space_of(("threshold", "top-p"), 4, SPACE.scorers, (True,))
    with pytest.raises(ValueError, match="a LengthSchedule is no Threshold or TopP, which"):
        shares.parameters_of(LengthSchedule.ratios([1, 1, 1, 0.5], scorer="cls", keep_question=True))
    with pytest.raises(ValueError, match="keep_question differs"):
        MIXED.parameters_of(Threshold([0.01] * 4, scorer="cls"))
