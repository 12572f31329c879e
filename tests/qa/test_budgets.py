"""Budgets: the file of schedules, the choice among them, and the answerer that makes it."""

import hashlib
import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dtbert.evaluation import PreparedQuestions, SquadQuestion
from dtbert.model import BertForQuestionAnswering, LengthSchedule, Macs, OwnScorer, Threshold
from dtbert.qa import Latency, MeasuredSchedule, QuestionAnswerer, ScheduleFront, read_schedules, write_schedules
from dtbert.weights import load_encoder, load_model, save_model
from tests.qa.conftest import make_model

QUESTION, CONTEXT = "Who wrote the letter?", "The letter was written by Ada Lovelace in London, in 1843. " * 12
HALF = LengthSchedule.ratios([0.6, 0.3], scorer="cls", keep_question=True)


def entry(schedule: LengthSchedule | None, fraction: float, f1: float) -> MeasuredSchedule:
    return MeasuredSchedule(schedule, fraction, Macs(round(1e6 * fraction), round(9e5 * fraction)), f1, f1, (f1, f1))


def front(*entries: MeasuredSchedule, full_f1: float = 80.0, sha256: str = "0" * 64) -> ScheduleFront:
    return ScheduleFront(entries, entry(None, 1.0, full_f1), "held-out.json", 10, "1" * 64, sha256, "0.1.0")


FRONT = front(entry(LengthSchedule.ratios([0.3, 0.1]), 0.21234, 50.0), entry(HALF, 0.5, 70.0))

RATIOS = st.lists(st.floats(0.01, 1), min_size=2, max_size=2).map(lambda ratios: sorted(ratios, reverse=True))
SCHEDULES = st.one_of(
    st.builds(LengthSchedule.ratios, RATIOS, scorer=st.sampled_from(["cls", ["received", "answer"]])),
    st.builds(
        LengthSchedule.absolute,
        st.lists(st.integers(1, 384), min_size=2, max_size=2).map(lambda lengths: sorted(lengths, reverse=True)),
        keep_cls=st.booleans(),
    ),
)
POLICIES = SCHEDULES | st.builds(Threshold, st.lists(st.floats(0, 0.9), min_size=2, max_size=2), scorer=st.just("cls"))
PERCENT = st.floats(0, 100)
SECONDS = st.floats(1e-6, 1e3)
LATENCIES = st.builds(Latency, SECONDS, SECONDS, st.text(), st.just("float32"), st.integers(1, 64))
ENTRIES = st.builds(
    MeasuredSchedule,
    POLICIES,
    st.floats(1e-6, 1),
    st.builds(Macs, st.integers(0, 10**13), st.integers(0, 10**13)),
    PERCENT,
    PERCENT,
    st.tuples(PERCENT, PERCENT),
    st.none() | LATENCIES,
)
FRONTS = st.builds(
    ScheduleFront,
    st.lists(ENTRIES, max_size=6).map(tuple),
    ENTRIES.map(lambda entry: replace(entry, schedule=None, macs_fraction=1.0)),
    st.text(),
    st.integers(1, 10**6),
    st.text(),
    st.text(),
    st.text(),
    st.dictionaries(st.text(), st.integers() | st.lists(st.text())),
)


@given(FRONTS)
def test_front_survives_json(front: ScheduleFront) -> None:
    text = front.to_json()
    assert ScheduleFront.from_json(text) == front
    assert ScheduleFront.from_json(text).to_json() == text
    assert len(json.loads(text)["schedules"]) == len(front.schedules)


@given(FRONTS, st.floats(0, 1, exclude_min=True, exclude_max=True))
def test_choice_is_the_best_that_the_budget_allows(front: ScheduleFront, budget: float) -> None:
    affordable = [entry for entry in front.schedules if entry.macs_fraction <= budget]
    if not affordable:
        with pytest.raises(ValueError, match=f"budget {budget} .* below"):
            front.within(budget)
        return
    chosen = front.within(budget)
    assert chosen in affordable
    assert chosen.f1 == max(entry.f1 for entry in affordable)
    assert all(chosen.macs_fraction <= entry.macs_fraction for entry in affordable if entry.f1 == chosen.f1)


@given(FRONTS, st.floats(0, 1, exclude_min=True))
def test_static_choice_is_the_best_of_the_static_where_there_are_such(front: ScheduleFront, budget: float) -> None:
    static = [one for one in front.schedules if isinstance(one.schedule, LengthSchedule)]
    alone = replace(front, schedules=tuple(static or front.schedules))
    for one in (alone, front):
        if any(entry.macs_fraction <= budget for entry in (*alone.schedules, front.full_model)):
            assert one.within(budget, static=True) == alone.within(budget)
        else:
            with pytest.raises(ValueError, match="below the cheapest schedule"):
                one.within(budget, static=True)
    assert {front.within(entry.macs_fraction) for entry in front.schedules} <= {*front.choices(), front.full_model}
    assert {*front.schedules} - {*front.choices()} <= {*static}


@pytest.mark.parametrize("static", [False, True])
def test_full_model_is_the_choice_at_a_budget_of_one_alone(static: bool) -> None:
    for one in (FRONT, front(entry(HALF, 0.5, 81.0)), front(entry(Threshold((0.02, 0.03)), 0.5, 81.0))):
        assert one.within(1, static) == one.full_model
        assert one.within(0.99, static).macs_fraction == 0.5


def test_budget_below_the_cheapest_names_what_is_enough() -> None:
    with pytest.raises(ValueError, match=r"budget 0\.2 .* 0\.2124 .*F1 50\.0"):
        FRONT.within(0.2)
    assert FRONT.within(0.2124).f1 == 50


@given(st.integers(1, 10**6))
def test_least_budget_suffices_and_is_the_least_of_four_digits(millionths: int) -> None:
    one = entry(HALF, millionths / 1e6, 70.0)
    assert one.least_budget == round(one.least_budget, 4)
    assert one.least_budget - 1e-4 < one.macs_fraction <= one.least_budget
    assert one.least_budget == 1 or front(one).within(one.least_budget).schedule == HALF


@pytest.mark.parametrize("budget", [0, -0.5, 1.01, 50, math.nan, math.inf])
def test_budget_out_of_range_is_refused(budget: float) -> None:
    with pytest.raises(ValueError, match=rf"budget must be above 0 and at most 1, .*not {budget}$"):
        FRONT.within(budget)


@pytest.mark.parametrize("budget", ["0.5", True, None])
def test_budget_that_is_no_number_is_refused(budget: Any) -> None:
    with pytest.raises(TypeError, match=f"budget .* number.* not {budget!r}"):
        FRONT.within(budget)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("format",), 2, "format is 2, .* 1"),
        (("schedules",), {}, "schedules: .* list, found an object"),
        (("schedules",), ..., r"missing \['schedules'\]"),
        (("more",), 1, r"unknown \['more'\]"),
        (("model_sha256",), 5, "model_sha256: .* text, found 5"),
        (("questions", "count"), "ten", r'questions\.count: .* whole number, found "ten"'),
        (("questions", "file"), ..., r"questions: .* missing \['file'\]"),
        (("full_model", "f1"), None, r"full_model\.f1: .* found null"),
        (("full_model", "f1"), math.nan, r"full_model\.f1: .* found NaN"),
        (("full_model", "f1"), 10**400, r"full_model\.f1: .* found 1000"),
        (("full_model", "schedule"), HALF.to_dict(), "full_model has a schedule"),
        (("schedules", 1, "schedule"), None, "an entry has no schedule"),
        (("schedules", 1, "macs_fraction"), 1.5, r"schedules\[1\]: macs_fraction .* 1, not 1\.5"),
        (("schedules", 1, "f1"), 101, r"schedules\[1\]: f1"),
        (("schedules", 1, "f1_interval"), [1], r"schedules\[1\]\.f1_interval: .* two numbers"),
        (("schedules", 1, "macs", "executed"), 1.5, r"schedules\[1\]\.macs\.executed: .* found 1\.5"),
        (("schedules", 1, "latency"), {"seconds": 1}, r"schedules\[1\]\.latency: .* seconds"),
        (("schedules", 1, "schedule", "scorer"), "luck", r"schedules\[1\]\.schedule: unknown scorer 'luck'"),
        (("schedules", 1, "schedule", "length_config"), [0.3, 0.6], r"grows from 0.3 to 0.6"),
        (("schedules", 1, "schedule", "keep_cls"), 1, r"schedules\[1\]\.schedule: keep_cls"),
    ],
)
def test_wrong_field_is_named(place: tuple[str | int, ...], value: Any, message: str, tmp_path: Path) -> None:
    document = json.loads(FRONT.to_json())
    parent: Any = document
    for step in place[:-1]:
        parent = parent[step]
    if value is ...:
        del parent[place[-1]]
    else:
        parent[place[-1]] = value
    path = tmp_path / "schedules.json"
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=message) as caught:
        read_schedules(path)
    assert str(caught.value).startswith(str(path))
    assert "`dtbert search`" in str(caught.value)


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"5", b"\xff\xfe", b'{"format": 1}', b"[" * 100_000])
def test_damaged_file_is_an_error_that_names_it(raw: bytes, tmp_path: Path) -> None:
    path = tmp_path / "schedules.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"schedules\.json: .*`dtbert search`"):
        read_schedules(path)


@pytest.fixture(scope="module")
def budgeted(make_answerer: Callable[..., QuestionAnswerer]) -> QuestionAnswerer:
    return make_answerer(front=FRONT)


def test_answer_with_a_budget_is_the_answer_with_its_schedule(budgeted: QuestionAnswerer) -> None:
    expected = budgeted(QUESTION, CONTEXT, schedule=HALF)
    assert expected != budgeted(QUESTION, CONTEXT)
    assert budgeted(QUESTION, CONTEXT, budget=0.6) == expected
    assert budgeted.top(QUESTION, CONTEXT, 3, budget=0.6) == budgeted.top(QUESTION, CONTEXT, 3, schedule=HALF)
    assert list(budgeted.answer_many([(QUESTION, CONTEXT)] * 2, budget=0.6)) == [expected] * 2
    assert budgeted(QUESTION, CONTEXT, budget=1) == budgeted(QUESTION, CONTEXT)
    assert budgeted.schedules == FRONT.schedules


def test_budget_lets_the_text_decide_unless_a_gpu_would_wait_for_it(
    make_answerer: Callable[..., QuestionAnswerer], monkeypatch: pytest.MonkeyPatch
) -> None:
    decides = Threshold((0.02, 0.03), scorer="cls")
    mixed = make_answerer(front=front(*FRONT.schedules, entry(decides, 0.45, 75.0)))
    alone = make_answerer(front=front(entry(decides, 0.45, 75.0)))
    assert mixed(QUESTION, CONTEXT, budget=0.6) == mixed(QUESTION, CONTEXT, schedule=decides)
    assert mixed.within_budget(0.6, static=True).schedule == HALF
    assert [one.schedule for one in mixed.schedules] == [FRONT.schedules[0].schedule, decides]
    monkeypatch.setattr(BertForQuestionAnswering, "device", torch.device("cuda"))
    assert mixed.within_budget(0.6).schedule == HALF
    assert mixed.schedules == FRONT.schedules
    assert mixed.within_budget(0.6, static=False).schedule == decides
    assert alone.within_budget(0.6).schedule == decides


def test_schedule_and_budget_exclude_each_other(budgeted: QuestionAnswerer) -> None:
    with pytest.raises(ValueError, match="schedule and budget"):
        budgeted(QUESTION, CONTEXT, schedule=HALF, budget=0.5)
    with pytest.raises(ValueError, match="schedule and budget"):
        budgeted.answer_many([], schedule=HALF, budget=0.5)


def test_model_without_schedules_says_how_to_get_them(answerer: QuestionAnswerer) -> None:
    assert answerer.schedules == ()
    with pytest.raises(ValueError, match=r"no schedules\.json .*`dtbert search`.* schedule="):
        answerer(QUESTION, CONTEXT, budget=0.5)
    with pytest.raises(ValueError, match=r"budget .* not 2"):
        answerer(QUESTION, CONTEXT, budget=2)


def test_schedules_for_another_depth_are_refused(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    with pytest.raises(ValueError, match="3 entries, the model 2 layers"):
        make_answerer(front=front(entry(LengthSchedule.ratios([1, 1, 0.5]), 0.9, 60)))


def test_prepared_questions_have_the_same_answers(answerer: QuestionAnswerer) -> None:
    pairs = [("Who wrote it?", CONTEXT), (QUESTION, "In Paris, Zoe said it."), ("Where?", CONTEXT * 6)]
    prepared = answerer.prepare(iter(pairs))
    assert len(prepared) == 3
    for schedule in (None, HALF):
        expected = [answerer(*pair, schedule=schedule) for pair in pairs]
        for found, wanted in (
            (answerer.answer_prepared(prepared, schedule=schedule), expected),
            (answerer.answer_prepared(prepared[1:], schedule=schedule), expected[1:]),
        ):
            assert [tuple(answer)[:3] for answer in found] == [tuple(answer)[:3] for answer in wanted]
            assert [answer.score for answer in found] == pytest.approx([answer.score for answer in wanted], rel=1e-4)
    windows = [window for pair in pairs for window in answerer.windows(*pair)]
    expected_lengths = [(len(window.input_ids), window.token_type_ids.count(0)) for window in windows]
    assert len(windows) > 3
    assert prepared.window_lengths() == expected_lengths
    assert len(answerer.prepare([])) == 0
    (part,) = answerer.prepare_many([*pairs[:2], ("", CONTEXT), pairs[2]])
    assert part.window_lengths() == expected_lengths
    *_, wrong, last = answerer.answer_prepared(part)
    assert str(wrong).startswith("the question is empty")
    assert tuple(last)[:3] == tuple(answerer(*pairs[2]))[:3]
    with pytest.raises(ValueError, match="pair 1: the question"):
        answerer.prepare([pairs[0], ("", CONTEXT)])
    with pytest.raises(ValueError, match="3 entries, the model 2 layers"):
        answerer.answer_prepared(prepared, schedule=LengthSchedule.ratios([1, 1, 1]))


@pytest.fixture
def folder(tmp_path: Path, tokenizer: Tokenizer) -> Path:
    folder = save_model(make_model(), tmp_path / "model")
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def test_loading_reads_the_schedules_beside_the_weights(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert QuestionAnswerer.load(folder).schedules == ()
    weights = folder / "model.safetensors"
    own = front(*FRONT.schedules, sha256=hashlib.sha256(weights.read_bytes()).hexdigest())
    write_schedules(folder / "schedules.json", own)
    for source in (folder, weights):
        loaded = QuestionAnswerer.load(source)
        assert loaded.front == own
        assert loaded(QUESTION, CONTEXT, budget=0.5) == loaded(QUESTION, CONTEXT, schedule=HALF)
    assert caplog.records == []


def test_schedule_without_a_scorer_takes_the_models_own(folder: Path, tokenizer: Tokenizer) -> None:
    ratios = [0.5, 0.1]
    plain = LengthSchedule.ratios(ratios)
    by = {name: LengthSchedule.ratios(ratios, scorer=name) for name in ("received", "cls", "value_norm")}
    model = make_model()
    bare = QuestionAnswerer(model, tokenizer)
    answers = {name: bare(QUESTION, CONTEXT, schedule=schedule) for name, schedule in by.items()}
    assert len(set(answers.values())) == 3
    assert bare(QUESTION, CONTEXT, schedule=plain) == answers["received"]
    model.config = replace(model.config, scorer="cls")
    of_config = QuestionAnswerer(model, tokenizer)
    assert of_config(QUESTION, CONTEXT, schedule=plain) == answers["cls"]
    entries = [entry(LengthSchedule.ratios([ratio, 0.2], scorer="value_norm"), ratio, 50.0) for ratio in (0.3, 0.6)]
    of_front = QuestionAnswerer(model, tokenizer, front=front(*entries))
    assert of_front(QUESTION, CONTEXT, schedule=plain) == answers["value_norm"]
    assert of_front.resolve(plain) == by["value_norm"]
    assert of_front.answer_prepared(of_front.prepare([(QUESTION, CONTEXT)]), schedule=plain) == [answers["value_norm"]]
    mixed = QuestionAnswerer(model, tokenizer, front=front(*entries, entry(HALF, 0.7, 70.0)))
    assert mixed.own_scorer == OwnScorer("cls")
    questions = [SquadQuestion("q", "t", QUESTION, CONTEXT, ())]
    costs = [PreparedQuestions(of_front, questions).cost(one) for one in (plain, *by.values())]
    assert costs[0] == costs[3] != costs[1]


def test_models_that_say_what_they_drop_by_do_so_without_an_answerer() -> None:
    shipped = load_model()
    assert shipped.config.own_scorer == QuestionAnswerer.load().own_scorer == OwnScorer("answer_overlap_3", True)
    ids, ratios = torch.randint(1000, 20000, (1, 60)), [0.8, 0.6, 0.4, 0.3, 0.2, 0.1]
    segments = (torch.arange(60)[None] > 9).long()
    named = LengthSchedule.ratios(ratios, scorer="answer_overlap_3", keep_question=True)
    own, same, other = (
        shipped(ids, None, segments, schedule).start_logits
        for schedule in (LengthSchedule.ratios(ratios), named, LengthSchedule.ratios(ratios, scorer="received"))
    )
    assert torch.equal(own, same)
    assert not torch.equal(own, other)
    encoder = load_encoder()
    with pytest.raises(ValueError, match="reads the span head: a bare encoder has none, name another"):
        encoder(ids, schedule=LengthSchedule.ratios(ratios))
    assert encoder(ids, schedule=LengthSchedule.ratios(ratios, scorer="cls")).last_hidden_state.shape == (1, 60, 384)


def test_schedules_of_other_weights_are_loaded_with_a_warning(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_schedules(folder / "schedules.json", FRONT)
    assert QuestionAnswerer.load(folder).schedules == FRONT.schedules
    ((_, level, message),) = caplog.record_tuples
    assert level == logging.WARNING
    assert "schedules.json" in message
    assert "other weights" in message


def test_wrong_schedules_stop_the_loading_and_are_named(folder: Path, tmp_path: Path) -> None:
    path = folder / "schedules.json"
    write_schedules(path, front(entry(LengthSchedule.ratios([1, 1, 0.5]), 0.9, 60)))
    with pytest.raises(ValueError, match=r"schedules\.json: .*3 entries, the model 2 layers"):
        QuestionAnswerer.load(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"schedules\.json: not JSON"):
        QuestionAnswerer.load(folder)
    copied = shutil.copytree(folder, tmp_path / "copy")
    (copied / "schedules.json").unlink()
    assert QuestionAnswerer.load(copied).schedules == ()
