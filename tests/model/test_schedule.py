"""LengthSchedule: lengths, MACs, JSON, and what it refuses."""

import csv
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtbert.model import BertConfig, LengthSchedule, OwnScorer, register_scorer

MINILM = BertConfig(hidden_size=384, intermediate_size=1536)
RATIOS = st.lists(st.floats(0.001, 1), min_size=1, max_size=8).map(lambda x: sorted(x, reverse=True))
EACH = st.booleans() | st.lists(st.booleans(), min_size=8, max_size=8)

# length_config and MACs of a length-adaptive MiniLMv2 (6 x 384, N = 384), from the public tutorials of
# intel/intel-extension-for-transformers.
PUBLISHED = [
    ((308, 247, 198, 159, 128, 103), 2484739968),
    ((269, 253, 252, 202, 104, 34), 2485456896),
    ((300, 243, 214, 197, 129, 36), 2492206848),
    ((284, 262, 248, 200, 95, 36), 2510150400),
    ((315, 251, 242, 159, 142, 33), 2546934912),
    ((303, 268, 256, 182, 118, 29), 2581745280),
    ((346, 284, 275, 166, 107, 24), 2695914240),
    ((365, 280, 273, 176, 112, 46), 2782709760),
    ((375, 331, 283, 213, 127, 18), 3015100416),
    ((374, 331, 283, 230, 126, 51), 3085609344),
    ((377, 361, 345, 245, 132, 38), 3329854464),
    ((383, 363, 360, 242, 134, 42), 3385542144),
    ((383, 380, 376, 358, 202, 123), 3955011456),
]


@pytest.mark.parametrize(("length_config", "macs"), PUBLISHED)
def test_published_macs_are_reproduced_to_the_unit(length_config: tuple[int, ...], macs: int) -> None:
    assert LengthSchedule.absolute(length_config).macs(MINILM, 384).published == macs


def test_published_rows_are_those_of_the_data_file(shared_data: Path) -> None:
    with (shared_data / "la-minilmv2-pareto.tsv").open() as file:
        rows = list(csv.DictReader(file, delimiter="\t"))
    assert [(tuple(map(int, row["length_config"].split(","))), int(row["macs"])) for row in rows] == PUBLISHED


def test_macs_without_dropping_are_the_plain_models() -> None:
    macs = LengthSchedule.absolute([384] * 6).macs(BertConfig(), 384)
    assert macs.published == macs.executed == 17_670_832_896
    base = LengthSchedule.absolute([384] * 12).macs(BertConfig(num_hidden_layers=12), 384)
    assert abs(base.published - 35_340_779_904) <= 384


@pytest.mark.parametrize(
    ("scorer", "score", "context_queries"),
    [
        ("received", 0, 100),
        ("received_max", 0, 100),
        ("value_norm", 100 * 8, 100),
        ("cls", 100 * 8, 40),
        ("from_question", 12 * 100 * 8, 40),
        ("answer", 2 * 100 * 8, 40),
        ("overlap", 0, 40),
        ("answer_overlap", 2 * 100 * 8, 40),
        ("answer_overlap_3", 2 * 100 * 8, 40),
        ("random", 0, 40),
    ],
)
def test_executed_macs_count_what_is_computed(scorer: str, score: int, context_queries: int) -> None:
    config = BertConfig(hidden_size=8, num_attention_heads=2, intermediate_size=16, num_hidden_layers=1)
    d, f = 8, 16
    macs = LengthSchedule.absolute([40], scorer=scorer).macs(config, 100, question_length=12)
    head_and_embeddings = d * 100 + 2 * d * 100 + 2 * 100
    products = 3 * 100 * d * d + 40 * d * d + 2 * 40 * d * f
    norms = d * (100 + 40)
    assert macs.executed == products + 2 * context_queries * 100 * d + norms + score + head_and_embeddings
    assert macs.published == 4 * 100 * d * d + 2 * 100 * 100 * d + 2 * 40 * d * f + norms + head_and_embeddings


@given(RATIOS, st.integers(1, 5000))
def test_lengths_never_grow_nor_fall_below_one(ratios: list[float], length: int) -> None:
    lengths = LengthSchedule.ratios(ratios).lengths(length)
    assert all(1 <= after <= before for before, after in zip((length, *lengths), lengths, strict=False))


def test_ratios_round_up_to_whole_tokens() -> None:
    assert LengthSchedule.ratios([1, 0.5, 0.07]).lengths(100) == (100, 50, 7)
    assert LengthSchedule.ratios([1, 0.5, 0.07]).lengths(3) == (3, 2, 1)


def test_absolute_lengths_keep_all_of_a_shorter_sequence() -> None:
    assert LengthSchedule.absolute([269, 104, 34]).lengths(120) == (120, 104, 34)


@given(RATIOS, st.sampled_from(["received", "cls"]), st.booleans(), EACH)
def test_json_round_trips(ratios: list[float], scorer: str, keep_cls: bool, keep_question: bool | list[bool]) -> None:
    keep_question = keep_question if isinstance(keep_question, bool) else keep_question[: len(ratios)]
    options = {"keep_cls": keep_cls, "keep_question": keep_question}
    for schedule in (
        LengthSchedule.ratios(ratios, scorer=scorer, **options),
        LengthSchedule.ratios(ratios, scorer=[scorer] * len(ratios), **options),
        LengthSchedule.absolute([int(1 + 500 * ratio) for ratio in ratios], scorer=scorer, **options),
    ):
        assert LengthSchedule.from_json(schedule.to_json()) == schedule
        assert hash(LengthSchedule.from_json(schedule.to_json())) == hash(schedule)


@pytest.mark.parametrize(
    ("lengths", "message"),
    [
        ([], "empty"),
        ([0], "holds 0"),
        ([-3], "holds -3"),
        ([10, 11], "grows from 10 to 11 at layer 1"),
        ([1.5], "holds 1.5"),
        ([True], "holds True"),
        ([float("nan")], "holds nan"),
        ("384", "lengths .* list"),
        (384, "lengths .* list"),
    ],
)
def test_absolute_refuses_bad_lengths(lengths: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthSchedule.absolute(lengths)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("ratios", "message"),
    [
        ([0.0], "holds 0.0"),
        ([1.01], "holds 1.01"),
        ([-0.5], "holds -0.5"),
        ([0.5, 0.6], "grows from 0.5 to 0.6"),
        ([float("nan")], "holds nan"),
        ([float("inf")], "holds inf"),
        (["half"], "holds 'half'"),
        ([None], "holds None"),
    ],
)
def test_ratios_refuses_bad_ratios(ratios: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthSchedule.ratios(ratios)


def test_schedule_refuses_unknown_and_miscounted_scorers() -> None:
    with pytest.raises(ValueError, match=r"'loudest'.*received"):
        LengthSchedule.ratios([1], scorer="loudest")
    with pytest.raises(ValueError, match="2 scorers for 3 layers"):
        LengthSchedule.ratios([1, 1, 1], scorer=["cls", "cls"])
    with pytest.raises(TypeError, match="keep_cls"):
        LengthSchedule.ratios([1], keep_cls=1)  # type: ignore[arg-type]


def test_the_question_is_kept_in_all_layers_or_in_some() -> None:
    some = LengthSchedule.ratios([1, 0.5, 0.2], keep_question=[True, True, False])
    assert some.keeps_question == some.keep_question == (True, True, False)
    assert LengthSchedule.ratios([1, 0.5], keep_question=[True, True]) == LengthSchedule.ratios(
        [1, 0.5], keep_question=True
    )
    assert LengthSchedule.ratios([1, 0.5]).keeps_question == (False, False)
    assert some.resolve(OwnScorer("answer", True)).keeps_question == (True, True, False)


@pytest.mark.parametrize("given", [1, None, "yes", [1, 0, 0], [True, None, False]])
def test_what_does_not_say_where_the_question_is_kept_is_refused(given: object) -> None:
    with pytest.raises(TypeError, match=r"keep_question must (be|hold) True or False"):
        LengthSchedule.ratios([1, 0.5, 0.2], keep_question=given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="2 entries of keep_question for 3 layers"):
        LengthSchedule.ratios([1, 0.5, 0.2], keep_question=[True, False])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "list"),
        ("{}", "kind"),
        ('{"kind": "ratios"}', "length_config"),
        ('{"kind": "x", "length_config": [1]}', "'x'"),
    ],
)
def test_from_json_refuses_what_is_not_a_schedule(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthSchedule.from_json(text)


@given(RATIOS, st.booleans(), st.booleans(), st.booleans())
def test_schedule_without_a_scorer_takes_the_models_own(
    ratios: list[float], keep_cls: bool, keep_question: bool, own_keeps: bool
) -> None:
    schedule = LengthSchedule.ratios(ratios, keep_cls=keep_cls, keep_question=keep_question)
    assert LengthSchedule.from_json(schedule.to_json()) == schedule
    named = LengthSchedule.ratios(ratios, scorer="cls", keep_cls=keep_cls, keep_question=keep_question or own_keeps)
    found = schedule.resolve(OwnScorer("cls", own_keeps))
    assert (found, hash(found)) == (named, hash(named))
    assert schedule.scorer is None
    assert named.resolve(OwnScorer("answer", True)) is named
    assert schedule.resolve(OwnScorer()).scorer == "received"


def test_own_scorer_of_a_config_is_counted_and_survives_json() -> None:
    config = BertConfig(scorer="cls", keep_question=True)
    ratios = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4]
    counts = LengthSchedule.ratios(ratios, scorer="cls").macs(config, 100)
    assert LengthSchedule.ratios(ratios).macs(config, 100) == counts
    assert counts != LengthSchedule.ratios(ratios).macs(BertConfig(), 100)
    assert BertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "scorer" not in BertConfig().to_dict()
    per_layer = BertConfig(scorer=("cls",) * 6)
    assert BertConfig.from_dict(json.loads(json.dumps(per_layer.to_dict()))).own_scorer == OwnScorer(("cls",) * 6)
    with pytest.raises(ValueError, match=r"scorer must be a name .* not 7"):
        BertConfig(scorer=7)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown scorer 'mine:late': .* --scorer MODULE:FUNCTION"):
        LengthSchedule.ratios(ratios).resolve(OwnScorer("mine:late"))


def test_from_dict_names_missing_and_unknown_fields() -> None:
    with pytest.raises(ValueError, match=r"missing \['length_config'\], unknown \['lengths'\]"):
        LengthSchedule.from_dict({"kind": "ratios", "lengths": [1]})


def test_macs_refuses_another_number_of_layers() -> None:
    with pytest.raises(ValueError, match="5 entries, the model 6 layers"):
        LengthSchedule.ratios([1] * 5).macs(MINILM, 384)
    with pytest.raises(ValueError, match="sequence_length"):
        LengthSchedule.ratios([1] * 6).macs(MINILM, 0)


def test_registered_scorer_can_be_scheduled_and_built_in_names_are_kept() -> None:
    register_scorer("early", lambda view: -view.position_ids.float())
    assert LengthSchedule.ratios([1], scorer="early").scorers == ("early",)
    with pytest.raises(ValueError, match="built in"):
        register_scorer("received", lambda view: view.hidden_states[:, 0])
    with pytest.raises(ValueError, match="non-empty"):
        register_scorer(" ", lambda view: view.hidden_states[:, 0])
    with pytest.raises(TypeError, match="must be a function"):
        register_scorer("late", 3)  # type: ignore[arg-type]


def test_registered_scorer_counts_what_it_was_registered_with_where_a_layer_scores() -> None:
    ratios, config = [1, 0.8, 0.8, 0.5, 0.5, 0.2], BertConfig()

    def executed(**options: object) -> int:
        register_scorer("mine", lambda view: view.hidden_states[:, 0], **options)  # type: ignore[arg-type]
        return LengthSchedule.ratios(ratios, scorer="mine").macs(config, 100, question_length=12).executed

    nothing = executed()
    # Layers 1, 3 and 5 drop, of what enters them.
    assert executed(macs=7) - nothing == 7 * (100 + 80 + 50)
    assert executed(macs=0.5) - nothing == 115
    asks = executed(macs="from_question") - nothing
    assert asks == 12 * (100 + 80 + 50) * 768
    assert executed(macs=lambda sizes, cost: sizes.question * sizes.tokens * sizes.hidden_size) - nothing == asks
    assert executed(macs=7, remembers=True) - nothing == 7 * (100 + 100 + 80 + 80 + 50 + 50)
    for macs, error, message in (
        (-1, ValueError, "at least 0 and finite, not -1"),
        (float("nan"), ValueError, "at least 0 and finite, not nan"),
        ("asked", ValueError, "names 'asked': expected one of received"),
        (True, TypeError, "must be a number"),
        (None, TypeError, "must be a number"),
        (lambda sizes, cost: -sizes.tokens, ValueError, "at least 0 and finite, not -100"),
        (lambda sizes, cost: "many", TypeError, "must be a number"),
    ):
        with pytest.raises(error, match=rf"macs of 'mine' .*{message}"):
            executed(macs=macs)
