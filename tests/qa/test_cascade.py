"""The cascade: what a calibration promises, its file, and the answers that are given again."""

import json
import logging
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtbert.model import LengthSchedule, PackedBatch, Policy, SpanLogits
from dtbert.qa import CalibratedCascade, Cascade, CascadeStage, QuestionAnswerer, read_cascade, write_cascade
from dtbert.qa.cascade import cascade_of, most_disagreeing
from dtbert.weights import convert, resolve_source, weights_sha256
from tests.qa.conftest import LETTER, QUESTION

FIRST = LengthSchedule.ratios([0.5, 0.2], scorer="cls")
SECOND = LengthSchedule.ratios([0.9, 0.6], scorer="cls", keep_question=True)
PAIRS = [(f"{QUESTION} {'and where ' * (row % 5)}", LETTER * (1 + 7 * (row % 3))) for row in range(12)]
STAGES = st.builds(
    lambda schedule, work, pairs: CascadeStage(schedule, work, *map(tuple, np.sort(np.array(pairs).T)[:, ::-1])),
    st.sampled_from([FIRST, SECOND]),
    st.floats(0.01, 1),
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30),
)


def calibrated(*stages: CascadeStage, count: int = 100) -> CalibratedCascade:
    return CalibratedCascade(stages, "held-out.json", count, "1" * 64, "float32", "0" * 64, "0.1.0")


def unsure_to(certainty: float) -> CalibratedCascade:
    """One by which every agreement below 0.9 gives answers again that are so sure at most."""
    return calibrated(CascadeStage(FIRST, 0.4, (certainty,) * 100, (0.2,) * 100))


@given(st.integers(1, 60), st.integers(1, 99), st.integers(1, 50))
def test_most_disagreeing_is_clopper_and_pearsons(count: int, percent: int, thousandths: int) -> None:
    agreement, alpha = Fraction(percent, 100), Fraction(thousandths, 1000)
    found = most_disagreeing(count, float(agreement), float(alpha))

    def at_most(k: int) -> Fraction:
        ways = (math.comb(count, one) * (1 - agreement) ** one * agreement ** (count - one) for one in range(k + 1))
        return sum(ways, Fraction(0))

    hair = Fraction(1, 10**9)
    assert at_most(found) <= alpha + hair
    assert found == count or at_most(found + 1) > alpha - hair


def test_most_disagreeing_at_the_ends() -> None:
    assert most_disagreeing(10**5, 1, 0.05) == -1
    # Of 148 questions that all agree 0.02 may still differ with a probability of 0.0503, of 149 with 0.0493.
    assert [most_disagreeing(count, 0.98, 0.05) for count in (148, 149)] == [-1, 0]


@given(st.lists(STAGES, min_size=1, max_size=4), st.floats(0.2, 1))
def test_least_work_that_keeps_the_promise_is_chosen(stages: list[CascadeStage], agreement: float) -> None:
    found = calibrated(*stages).within(agreement)
    most = most_disagreeing(100, agreement, 0.05 / len(stages))
    works = [1.0]
    for stage in stages if most >= 0 else ():
        differing = np.array(stage.certainties)
        works += [stage.macs_fraction] * (len(differing) <= most)
        works += [
            stage.macs_fraction + again
            for certainty, again in zip(stage.certainties, stage.again, strict=True)
            if (differing > certainty).sum() <= most
        ]
    # A tie is given again as a whole: its work is that of the first of its rows.
    assert min(works) <= found.work <= 1
    if found.schedule is None:
        assert found.work == 1
    else:
        (of, *_) = [one for one in stages if one.at(most, agreement) == found]
        assert sum(found.is_unsure(one) for one in of.certainties) >= len(of.certainties) - most


def test_promise_fails_as_seldom_as_it_says() -> None:
    """Many calibrations on a population whose agreement at each threshold is known."""
    generator, broken, repeats, count = np.random.default_rng(0), 0, 400, 300
    for _ in range(repeats):
        certainties = generator.random(count)
        # The less sure, the likelier another answer; of two stages alike, the better by chance is taken.
        stages = []
        for _ in range(2):
            differing = np.sort(certainties[generator.random(count) < (1 - certainties) ** 2])[::-1]
            again = [float((certainties <= one).mean()) for one in differing]
            stages.append(CascadeStage(FIRST, 0.3, tuple(map(float, differing)), tuple(again)))
        found = calibrated(*stages, count=count).within(0.9)
        assert found.schedule is not None
        # Of all answers those that are sure and differ: the integral of (1 - u)^2 from the threshold to 1.
        broken += (1 - found.unsure_to) ** 3 / 3 > 0.1
    assert broken / repeats < 0.05
    assert broken > 0, "so careful that it never fails, it would promise too little"


@given(st.lists(STAGES, max_size=4), st.text(), st.integers(30, 10**6))
def test_cascade_survives_json(stages: list[CascadeStage], name: str, count: int) -> None:
    cascade = replace(calibrated(*stages, count=count), questions_file=name)
    assert CalibratedCascade.from_json(cascade.to_json()) == cascade
    assert json.loads(cascade.to_json())["questions"]["count"] == count


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "format is 2, this dtbert reads 1"),
        ({"stages": None}, "stages: expected a list, found null"),
        ({"more": 1}, r"unknown \['more'\]"),
        ({"stages.certainties": [0.1, 0.2]}, r"stages\[0\]: certainties must be from 0 to 1, the highest first"),
        ({"stages.again": [0.2]}, r"stages\[0\]: 2 certainties, and 1 in again"),
        ({"stages.macs_fraction": 0}, r"stages\[0\]: macs_fraction must be above 0"),
        ({"stages.schedule": {"kind": "none"}}, r"stages\[0\].schedule: kind must be one of"),
        ({"questions": {"file": "f", "count": 1, "ids_sha256": ""}}, "2 certainties of 1 questions"),
    ],
)
def test_cascade_file_that_is_wrong_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = tmp_path / "cascade.json"
    write_cascade(file, calibrated(CascadeStage(FIRST, 0.4, (0.5, 0.25), (0.3, 0.1))))
    document = json.loads(file.read_text())
    for name, value in change.items():
        place, _, field = name.rpartition(".")
        (document[place][0] if place else document)[field] = value
    file.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=rf"cascade\.json: .*{message}.*--calibrate-cascade"):
        read_cascade(file)


def test_unsure_answers_alone_are_the_full_models(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    plain = make_answerer()
    full, first = (list(plain.answer_many(PAIRS, schedule=schedule)) for schedule in (None, FIRST))
    # With overlap an answer's score is of its span alone.
    certainties = [one.score for one in plain.answer_many(PAIRS, schedule=FIRST, overlap=True)]
    assert sum(one != other for one, other in zip(full, first, strict=True)) >= 4
    middle = sorted(certainties)[5]
    answerer = make_answerer(cascade=unsure_to(middle), batch_tokens=400)
    expected = [one if sure > middle else other for one, other, sure in zip(first, full, certainties, strict=True)]
    assert expected not in (full, first)
    auto: dict[str, Any] = {"budget": "auto", "agreement": 0.8}
    found = list(answerer.answer_many(PAIRS, **auto))
    assert [one.text for one in found] == [one.text for one in expected]
    assert [one.score for one in found] == pytest.approx([one.score for one in expected], rel=1e-4)
    # Alone, in company, and beside what cannot be read.
    assert [answerer(*pair, **auto).text for pair in PAIRS] == [one.text for one in found]
    assert [answerer.top(*pair, 1, **auto)[0].text for pair in PAIRS[:3]] == [one.text for one in found[:3]]
    mixed = list(answerer.answer_many([PAIRS[0], ("", LETTER), *PAIRS[1:]], errors="yield", **auto))
    assert [type(one).__name__ for one in mixed] == ["Answer", "ValueError", *["Answer"] * 11]
    cascaded = answerer.answer_cascade(answerer.prepare(PAIRS), answerer.within_agreement(0.8))
    assert cascaded.again == [row for row, sure in enumerate(certainties) if sure <= middle]
    assert cascaded.certainties == pytest.approx(certainties, rel=1e-4)


def test_second_pass_reads_the_unsure_alone_and_together(
    make_answerer: Callable[..., QuestionAnswerer], monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer = make_answerer()
    prepared = answerer.prepare(PAIRS)
    certainties = answerer.answer_cascade(prepared, Cascade(FIRST, -1.0, 0.8, 0.4)).certainties
    cascade = Cascade(FIRST, sorted(certainties)[5], 0.8, 0.4)
    forward, passes = answerer.model.forward_packed, list[tuple[bool, tuple[int, ...]]]()

    def watched(batch: PackedBatch, schedule: Policy | None = None) -> SpanLogits:
        passes.append((schedule is None, batch.packing.seqlens))
        return forward(batch, schedule)

    monkeypatch.setattr(answerer.model, "forward_packed", watched)
    again = answerer.answer_cascade(prepared, cascade).again
    assert len(again) == 6
    expected = sorted(length for length, _ in prepared.rows(again).window_lengths())
    in_full = [lengths for is_full, lengths in passes if is_full]
    assert sorted(length for lengths in in_full for length in lengths) == expected
    assert all(sum(lengths) <= answerer.batch_tokens for lengths in in_full)
    assert len(in_full) < len(expected)
    passes.clear()
    assert answerer.answer_cascade(prepared, Cascade(None, 0.0, 1, 1.0)).again == []
    assert all(is_full for is_full, _ in passes)


def test_what_cannot_be_promised_is_said(
    make_answerer: Callable[..., QuestionAnswerer], caplog: pytest.LogCaptureFixture
) -> None:
    answerer = make_answerer(cascade=replace(unsure_to(0.5), num_questions=123))
    with caplog.at_level(logging.WARNING, "dtbert"):
        found = list(answerer.answer_many(PAIRS[:3], budget="auto", agreement=0.999))
        assert answerer(*PAIRS[0], budget="auto", agreement=0.999) == answerer(*PAIRS[0])
    assert [one.text for one in found] == [answerer(*pair).text for pair in PAIRS[:3]]
    assert caplog.messages == [
        "no cascade promises an agreement of 0.999 for less work than the full model, by 123 questions: that answers "
        "alone"
    ]
    assert calibrated().within(0.5) == Cascade(None, 0.0, 0.5, 1.0)


@pytest.mark.parametrize(
    ("asking", "error", "message"),
    [
        ({"agreement": 0.9}, ValueError, "agreement is what budget='auto' promises"),
        ({"budget": 0.5, "agreement": 0.9}, ValueError, "agreement is what budget='auto' promises"),
        ({"budget": "auto", "agreement": 0}, ValueError, "above 0 and at most 1, not 0"),
        ({"budget": "auto", "agreement": 98}, ValueError, "above 0 and at most 1, not 98"),
        ({"budget": "auto", "agreement": math.nan}, ValueError, "above 0 and at most 1, not nan"),
        ({"budget": "auto", "agreement": "high"}, TypeError, "agreement must be a number.*'high'"),
        ({"budget": "auto", "schedule": FIRST}, ValueError, "schedule and budget exclude each other"),
        ({"budget": "auto", "top_k": 2}, ValueError, "without top_k, overlap and no_answer"),
        ({"budget": "auto", "overlap": True}, ValueError, "without top_k, overlap and no_answer"),
        ({"budget": "auto", "no_answer": True}, ValueError, "without top_k, overlap and no_answer"),
        ({"budget": "much"}, TypeError, "budget must be a number.*or 'auto', not 'much'"),
    ],
)
def test_what_auto_does_not_go_with_is_refused(
    make_answerer: Callable[..., QuestionAnswerer], asking: dict[str, Any], error: type[Exception], message: str
) -> None:
    answerer = make_answerer(cascade=unsure_to(0.5))
    for call in (lambda: answerer(QUESTION, LETTER, **asking), lambda: answerer.answer_many([], **asking)):
        with pytest.raises(error, match=message):
            call()


def test_auto_is_of_one_text_and_needs_the_file(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    answerer = make_answerer(cascade=unsure_to(0.5))
    with pytest.raises(ValueError, match="of one text, not of many: give a number instead"):
        answerer.answer_documents(QUESTION, [LETTER], budget="auto")
    with pytest.raises(ValueError, match="a trace is of one schedule"):
        answerer.trace(QUESTION, LETTER, budget="auto")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no cascade\.json to choose by.*--calibrate-cascade"):
        make_answerer()(QUESTION, LETTER, budget="auto")
    with pytest.raises(ValueError, match="3 entries, the model 2 layers"):
        make_answerer(cascade=calibrated(CascadeStage(LengthSchedule.ratios([1, 1, 1]), 0.4, (), ())))


def test_cascade_beside_a_model_is_its_own_and_goes_along(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shipped = read_cascade(resolve_source(None) / "cascade.json")
    assert shipped.model_sha256 == weights_sha256(resolve_source(None))
    folder = tmp_path / "model"
    shutil.copytree(resolve_source(None), folder)
    with caplog.at_level(logging.WARNING, "dtbert"):
        assert cascade_of(folder, 6) == shipped
        converted = cascade_of(convert(folder, tmp_path / "converted"), 6)
        assert converted is not None
        assert converted.stages == shipped.stages
    assert caplog.messages == []
    write_cascade(folder / "cascade.json", replace(shipped, model_sha256="0" * 64))
    assert QuestionAnswerer.load(folder).cascade == replace(shipped, model_sha256="0" * 64)
    assert "cascade.json was calibrated with other weights" in caplog.text
    write_cascade(folder / "cascade.json", unsure_to(0.5))
    with pytest.raises(ValueError, match=r"cascade\.json: .*2 entries, the model 6 layers.*--calibrate-cascade"):
        cascade_of(folder, 6)
    (folder / "cascade.json").unlink()
    assert cascade_of(folder, 6) is None
