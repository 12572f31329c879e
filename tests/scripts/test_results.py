"""The script that measures the results page, on a tiny model: what it records, and of which model."""

import importlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import dtbert
from dtbert.evaluation import read_squad
from dtbert.model import LengthSchedule, Macs
from dtbert.qa import MeasuredSchedule, QuestionAnswerer, ScheduleFront, load_tokenizer, read_schedules, write_schedules
from dtbert.weights import resolve_source, save_model, weights_sha256
from tests.qa.conftest import make_model

ROOT = Path(__file__).resolve().parents[2]
SCHEDULE = LengthSchedule.ratios([0.6, 0.3], scorer="answer", keep_question=True)
CONTEXT = "The letter was written by Ada Lovelace in London, in 1843, and answered from Paris in the spring."
Results = Callable[..., list[dict[str, Any]]]


def save_with_front(folder: Path) -> Path:
    """A model whose schedules.json offers one schedule at half of its work."""
    save_model(make_model(), folder)
    load_tokenizer(resolve_source(None)).save(str(folder / "tokenizer.json"))

    def entry(schedule: LengthSchedule | None, fraction: float, f1: float) -> MeasuredSchedule:
        return MeasuredSchedule(schedule, fraction, Macs(1, 1), f1, f1, (f1, f1))

    front = ScheduleFront(
        (entry(SCHEDULE, 0.5, 70),),
        entry(None, 1, 80),
        "q.json",
        4,
        "0" * 64,
        weights_sha256(folder),
        dtbert.__version__,
    )
    write_schedules(folder / "schedules.json", front)
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_with_front(tmp_path / "model")


@pytest.fixture
def questions(tmp_path: Path) -> str:
    asked = [("who", "Ada Lovelace"), ("where", "London"), ("when", "1843"), ("from where", "Paris")]
    qas = [
        {"id": str(number), "question": f"{word}?", "answers": [{"text": text, "answer_start": CONTEXT.index(text)}]}
        for number, (word, text) in enumerate(asked)
    ]
    (tmp_path / "q.json").write_text(
        json.dumps({"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]})
    )
    return f"squad={tmp_path / 'q.json'}"


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Results:
    """Runs the script; gives the rows of its file."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("results")
    out = tmp_path / "results.json"

    def run(what: str, *arguments: object) -> list[dict[str, Any]]:
        given = [what, *map(str, arguments)] if what == "show" else [what, str(arguments[0]), str(out)]
        given += [] if what == "show" else map(str, arguments[1:])
        monkeypatch.setattr("sys.argv", ["results.py", *given])
        script.main()
        rows: list[dict[str, Any]] = json.loads(out.read_text())
        return rows

    return run


def test_rows_are_what_evaluate_finds(results: Results, model: Path, questions: str) -> None:
    full, half = results("measure", model, questions, "--budgets", 1, 0.5)
    assert (full["schedule"], half["schedule"]) == (None, SCHEDULE.to_dict())
    assert half["model_sha256"] == weights_sha256(model)
    assert (half["dtype"], half["threads"], half["count"]) == ("float32", 1, 4)
    asked = read_squad(questions.partition("=")[2])
    answerer = QuestionAnswerer.load(model)
    for row, schedule in ((full, None), (half, SCHEDULE)):
        texts = {one.id: answerer(one.question, one.context, schedule=schedule).text for one in asked}
        scores = dtbert.evaluation.evaluate(asked, texts)
        assert (row["f1"], row["exact_match"]) == (round(scores.f1, 3), round(scores.exact_match, 3))
        assert row["f1_interval"][0] <= row["f1"] <= row["f1_interval"][1]
    assert full["executed"] == 1 > half["executed"]


def test_rows_that_are_there_are_not_measured_again_unless_the_weights_are_others(
    results: Results, model: Path, questions: str, tmp_path: Path
) -> None:
    given = (questions, "--budgets", 1, 0.5)
    before = results("measure", model, *given)
    assert results("measure", model, *given) == before  # the questions a second would differ
    other = tmp_path / "other"
    shutil.copytree(model, other)
    changed = make_model(initializer_range=0.1)
    save_model(changed, tmp_path / "changed")
    shutil.copy(tmp_path / "changed/model.safetensors", other / "model.safetensors")
    plot = ("show", tmp_path / "results.json", "--plot", tmp_path / "results.png")
    results("measure", other, questions, "--schedule", "1,1")
    results(*plot)  # what was measured with a schedule of its own is no point of the plot
    after = results("measure", other, *given)
    assert after[:2] == before
    assert [row["model_sha256"] for row in after[2:]] == [weights_sha256(other)] * 3 != [weights_sha256(model)] * 3
    assert len(results("measure", other, *given, "--threads", 2)) == 7
    with pytest.raises(SystemExit, match="rows of several models"):
        results(*plot)


def test_rows_without_an_interval_have_the_widest_that_their_f1_allows(results: Results) -> None:
    interval = importlib.import_module("results_report").interval
    assert interval({"f1": 84.0, "count": 1000, "f1_interval": [82.0, 86.0]}) == (82.0, 86.0)
    right = np.repeat([100.0, 0.0], [84, 16])  # nothing with this mean is spread more
    half = 1.96 * right.std() / 1000**0.5
    assert interval({"f1": 84.0, "count": 1000}) == pytest.approx((84 - half, 84 + half))
    assert interval({"f1": 99.0, "count": 2})[1] == 100


def test_no_answer_tells_how_margins_separate(
    results: Results, model: Path, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match=r"no-answer needs questions with and without an answer"):
        results("no-answer", model, questions)
    document = json.loads((tmp_path / "q.json").read_text())
    others = [
        {"id": f"{number}-elsewhere", "question": word, "answers": [], "is_impossible": True}
        for number, word in enumerate(("who wrote?", "what letter?", "Paris?"))
    ]
    document["data"][0]["paragraphs"].append({"context": "The weather was fine, she said.", "qas": others})
    (tmp_path / "both.json").write_text(json.dumps(document))
    results("no-answer", model, f"squad={tmp_path / 'both.json'}")
    (row,) = results("show", tmp_path / "results.json")
    assert "\nno-answer\n| model | questions | count | budget | auroc | " in capsys.readouterr().out
    asked = read_squad(tmp_path / "both.json")
    answerer = QuestionAnswerer.load(model)
    answers = {one.id: answerer(one.question, one.context) for one in asked}
    own, other = ([answers[one.id].margin for one in asked if one.is_impossible == none] for none in (False, True))
    assert row["auroc"] == pytest.approx(np.mean([(a > b) + 0.5 * (a == b) for a in own for b in other]), abs=1e-4)
    texts = {key: one.text for key, one in answers.items()}
    best = dtbert.evaluation.best_threshold(asked, texts, {key: one.margin for key, one in answers.items()})
    assert row["threshold_best"] == pytest.approx(best.threshold, abs=1e-3)
    for threshold, f1 in ((best.threshold, row["f1_best"]), (0, row["f1_at_0"]), (answerer.threshold, row["f1_own"])):
        given = {key: one.text if one.margin >= threshold else "" for key, one in answers.items()}
        assert dtbert.evaluation.evaluate(asked, given).f1 == pytest.approx(f1, abs=1e-3)
    always = dtbert.evaluation.evaluate(asked, texts).has_answer
    assert always is not None
    assert row["f1_of_answerable"] == pytest.approx(always.f1, abs=1e-3)
    assert row["kept_at_best"] == np.mean([margin >= best.threshold for margin in own])
    assert row["left_out_at_best"] == np.mean([margin < best.threshold for margin in other])


def test_times_are_against_the_full_model_and_replace_earlier_ones(
    results: Results, model: Path, questions: str
) -> None:
    before = results("time", model, questions, "--budgets", 0.5)
    assert [row["budget"] for row in before] == [1.0, 0.5]
    assert (before[0]["time"], before[0]["time_per_macs_saved"]) == (1, None)
    half = before[1]
    saved = (1 - half["time"]) / (1 - half["executed"])
    assert half["time_per_macs_saved"] == pytest.approx(saved, abs=0.02)
    after = results("time", model, questions, "--budgets", 0.5)
    assert [row["budget"] for row in after] == [1.0, 0.5]
    assert after != before


def test_new_schedules_of_the_same_weights_take_the_place_of_the_old(
    results: Results, model: Path, questions: str, tmp_path: Path
) -> None:
    before = [results(what, model, questions, "--budgets", 0.5) for what in ("measure", "time", "baseline")][-1]
    front = read_schedules(model / "schedules.json")
    new = LengthSchedule.ratios([0.5, 0.2], scorer="answer", keep_question=True)
    write_schedules(model / "schedules.json", replace(front, schedules=(replace(front.schedules[0], schedule=new),)))
    after = [results(what, model, questions, "--budgets", 0.5) for what in ("measure", "time", "baseline")][-1]
    assert sorted(row["what"] for row in after) == sorted(row["what"] for row in before)
    assert [row["schedule"] for row in after if row["what"] in ("measure", "searched")] == [new.to_dict()] * 2
    (tmp_path / "results.json").write_text('[{"what": "measure"}]')
    with pytest.raises(SystemExit, match=r"results\.json .*model_sha256.* new file"):
        results("show", tmp_path / "results.json")


def test_schedules_may_be_given_instead_of_budgets(results: Results, model: Path, questions: str) -> None:
    (model / "schedules.json").unlink()
    spec = LengthSchedule.ratios([1, 0.3], scorer="overlap", keep_question=True)
    measured = results("measure", model, questions, "--schedule", spec.to_json(), "--schedule", "1,1")
    assert measured[0]["schedule"] == spec.to_dict()
    assert [(row["budget"], row["schedule"]["length_config"]) for row in measured] == [(None, [1, 0.3]), (None, [1, 1])]
    assert measured[0]["executed"] < measured[1]["executed"] == 1


def test_all_kinds_of_rows_are_shown(
    results: Results, model: Path, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for what in ("measure", "baseline", "scorers", "time"):
        rows = results(what, model, questions, "--budgets", 0.5)
    assert [row["what"] for row in rows].count("scorers") == 8
    searched, constant = (row for row in rows if row["what"] in ("searched", "constant"))
    assert constant["executed"] == pytest.approx(searched["executed"], abs=0.05)
    capsys.readouterr()
    results("show", tmp_path / "results.json", "--plot", tmp_path / "results.png")
    shown = capsys.readouterr().out
    for what in ("measure", "searched", "constant", "scorers", "time"):
        assert f"\n{what}\n| model | " in shown
    assert f"| {weights_sha256(model)[:8]} | squad | 4 | 0.5 |" in shown
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")


def test_bad_input_is_said_in_one_line(results: Results, model: Path, questions: str) -> None:
    with pytest.raises(SystemExit, match=r"budget 0\.2 is below"):
        results("measure", model, questions, "--budgets", 0.2)
    with pytest.raises(SystemExit, match=r"results.py: .*nothing\.json"):
        results("measure", model, "squad=nothing.json")
    (model / "schedules.json").unlink()
    with pytest.raises(SystemExit, match=r"no schedules\.json.* `dtbert search`"):
        results("measure", model, questions)
