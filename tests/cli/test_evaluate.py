"""`dtbert evaluate`: the metric, the costs and the speed of a model at a schedule."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dtbert.evaluation import evaluate, read_squad
from dtbert.model import LengthSchedule, Macs, TopP
from dtbert.qa import (
    MeasuredSchedule,
    QuestionAnswerer,
    ScheduleFront,
    read_cascade,
    read_threshold,
    write_schedules,
)
from dtbert.weights import weights_sha256
from tests.cli.conftest import Run

CONTEXTS = ["Ada wrote it in London in 1843.", "Zoe said it in Paris. " * 40, "the letter to Ada, " * 200]


@pytest.fixture
def questions_file(tmp_path: Path) -> Path:
    path = tmp_path / "squad.json"
    write_squad(path, [f"who wrote it {'and where ' * number}?" for number in range(12)])
    return path


def write_squad(path: Path, questions: list[str], contexts: list[str] = CONTEXTS) -> None:
    paragraphs: list[dict[str, Any]] = [{"context": context, "qas": []} for context in contexts]
    for number, question in enumerate(questions):
        paragraph = paragraphs[number % len(paragraphs)]
        answer = {"text": paragraph["context"][:3], "answer_start": 0}
        paragraph["qas"].append({"id": f"q{number}", "question": question, "answers": [answer]})
    path.write_text(json.dumps({"data": [{"title": "t", "paragraphs": paragraphs}]}))


def test_evaluate_reports_the_metric_of_the_models_answers(
    run: Run, model_folder: Path, questions_file: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "predictions.json"
    arguments = ("evaluate", questions_file, "--model", model_folder, "--schedule", "0.9,0.4", "--scorer", "cls")
    status, out, err = run(*arguments, "--json", "--predictions", saved)
    assert (status, err) == (0, "")
    report, predictions = json.loads(out), json.loads(saved.read_text("utf-8"))
    questions, answerer = read_squad(questions_file), QuestionAnswerer.load(model_folder)
    schedule = LengthSchedule.ratios([0.9, 0.4], scorer="cls")
    assert predictions == {
        question.id: answerer(question.question, question.context, schedule=schedule).text for question in questions
    }
    expected = evaluate(questions, predictions)
    assert (report["exact_match"], report["f1"]) == (expected.exact_match, expected.f1)
    assert (report["questions"], report["missing"]) == (12, [])
    assert report["schedule"] == schedule.to_dict()
    assert report["questions_per_second"] > 0


def test_evaluate_prints_a_table(run: Run, model_folder: Path, questions_file: Path) -> None:
    arguments = ("evaluate", questions_file, "--model", model_folder)
    plain, dropping = run(*arguments).out, run(*arguments, "--schedule", "0.9,0.4").out
    for line in ("questions ", "exact match ", "F1 ", "questions/s ", "nothing dropped ", "padded to 384 "):
        assert line in plain
        assert line in dropping
    assert "executed" not in plain
    assert "executed" in dropping
    assert all(len(line) <= 80 for line in dropping.splitlines())


def test_evaluate_tells_what_95_of_100_texts_take_where_they_decide(
    run: Run, model_folder: Path, questions_file: Path
) -> None:
    policy = TopP([1, 0.6], scorer="cls", floor=(0, 0.1), skip_layers=[0])
    out = run("evaluate", questions_file, "--model", model_folder, "--schedule", policy.to_json()).out
    assert out.startswith("schedule: top 1 0.6 cls skip_layers 0 floor 0 0.1\n")
    assert "\n    95% up to " in out


def test_evaluate_counts_a_question_that_is_too_long_as_wrong(run: Run, model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    write_squad(path, ["who wrote it?", "who " * 400])
    status, out, err = run("evaluate", path, "--model", model_folder, "--json")
    report = json.loads(out)
    assert status == 1
    assert report["missing"] == ["q1"]
    assert report["questions"] == 2
    assert err.startswith("dtbert: question q1 ")
    assert "400 tokens" in err
    assert "without answer" in run("evaluate", path, "--model", model_folder).out
    write_squad(path, ["who " * 400])
    alone = run("evaluate", path, "--model", model_folder)
    assert (alone.status, "MACs" in alone.out) == (1, False)


@pytest.fixture
def second_file(tmp_path: Path) -> Path:
    """A file of SQuAD 2.0's kind: every other question has no answer."""
    path = tmp_path / "squad2.json"
    write_squad(path, [f"who wrote it {'and where ' * number}?" for number in range(12)])
    document = json.loads(path.read_text())
    for paragraph in document["data"][0]["paragraphs"]:
        for question in paragraph["qas"][::2]:
            question |= {"answers": [], "is_impossible": True}
    path.write_text(json.dumps(document))
    return path


def test_evaluate_reports_the_figures_of_squad_2(
    run: Run, model_folder: Path, second_file: Path, tmp_path: Path
) -> None:
    saved = tmp_path / "predictions.json"
    margins = [
        answer.margin
        for answer in QuestionAnswerer.load(model_folder).answer_many(
            [(one.question, one.context) for one in read_squad(second_file)]
        )
    ]
    threshold = sorted(margins)[6]
    arguments = ("evaluate", second_file, "--model", model_folder, "--threshold", threshold)
    report = json.loads(run(*arguments, "--json", "--predictions", saved).out)
    predictions = json.loads(saved.read_text("utf-8"))
    assert 0 < sum(not text for text in predictions.values()) < 12
    expected = evaluate(read_squad(second_file), predictions)
    assert (report["exact_match"], report["f1"]) == (expected.exact_match, expected.f1)
    for name, part in (("has_answer", expected.has_answer), ("no_answer", expected.no_answer)):
        assert part is not None
        assert report[name] == {"exact_match": part.exact_match, "f1": part.f1}
    assert report["threshold"] == threshold
    assert report["best_f1"]["score"] >= report["f1"]
    assert report["best_exact_match"]["score"] >= report["exact_match"]
    table = run(*arguments).out
    for line in ("with an answer ", "with none ", "at best "):
        assert f"\n  {line}" in table


def test_chosen_threshold_is_the_models_from_then_on(
    run: Run, model_folder: Path, second_file: Path, questions_file: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    status, out, err = run("evaluate", second_file, "--model", folder, "--choose-threshold", "--json")
    best = json.loads(out)["best_f1"]
    chosen = read_threshold(folder / "no_answer.json")
    assert (status, chosen.threshold, chosen.f1) == (0, best["threshold"], best["score"])
    assert (chosen.questions_file, chosen.num_questions) == ("squad2.json", 12)
    assert f"{folder / 'no_answer.json'}: threshold" in err
    assert QuestionAnswerer.load(folder).threshold == best["threshold"]
    again = json.loads(run("evaluate", second_file, "--model", folder, "--json").out)
    assert (again["threshold"], again["f1"]) == (best["threshold"], pytest.approx(best["score"]))
    for file, more, message in (
        (second_file, (), "give it with --model"),
        (second_file, ("--model", "Some/model"), "give it with --model"),
        (questions_file, ("--model", folder), "needs questions with and without an answer"),
    ):
        assert message in run("evaluate", file, "--choose-threshold", *more).err
    auto = run("evaluate", second_file, "--model", folder, "--budget", "auto")
    assert "has questions without an answer: --budget auto promises spans" in auto.err
    assert "give --no-answer with it" in run("evaluate", questions_file, "--model", folder, "--threshold", 1).err


@pytest.fixture
def with_schedules(model_folder: Path, tmp_path: Path) -> Path:
    """A copy of the model, with a front."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    entries = [
        MeasuredSchedule(schedule, part, Macs(10, 10), part * 80, part * 80, (0, 100))
        for schedule, part in ((LengthSchedule.ratios([0.5, 0.2], scorer="cls"), 0.5), (None, 1.0))
    ]
    front = ScheduleFront((entries[0],), entries[1], "f", 1, "", weights_sha256(folder), "0.1.0")
    write_schedules(folder / "schedules.json", front)
    return folder


def test_calibrated_cascade_answers_from_then_on(run: Run, with_schedules: Path, tmp_path: Path) -> None:
    questions_file = tmp_path / "squad.json"
    words = ["ada", "zoe", "paris", "london", "letter", "said", "wrote"]
    contexts = [" ".join([*words[row:], "in", *words[:row], "."] * 2) for row in range(1, 7)]
    write_squad(questions_file, [f"who {'and where ' * (row % 5)}?" for row in range(24)], contexts)
    evaluate = ("evaluate", questions_file, "--model", with_schedules)
    auto = (*evaluate, "--budget", "auto", "--agreement", 0.3)
    assert "no cascade.json to choose by" in run(*auto).err
    status, out, err = run(*evaluate, "--calibrate-cascade")
    file = with_schedules / "cascade.json"
    assert (status, err) == (0, f"dtbert: {file}: of 1 schedules and 24 questions\n")
    assert out.startswith("agreement    work   first answers\n      0.9   1.000   everything\n")
    found = read_cascade(file)
    file.write_text("{")
    assert (found.num_questions, found.questions_file, found.dtype) == (24, "squad.json", "float32")
    assert json.loads(run(*evaluate, "--calibrate-cascade", "--json").out)["cascades"][0]["work"] == 1
    report = json.loads(run(*auto, "--json").out)
    chosen = QuestionAnswerer.load(with_schedules).within_agreement(0.3)
    assert chosen.schedule is not None
    assert report["schedule"] == chosen.schedule.to_dict()
    assert (report["unsure_to"], report["promised_agreement"]) == (chosen.unsure_to, 0.3)
    # On the questions of the calibration itself.
    assert report["ratio_to_own_length"]["executed"] == pytest.approx(report["expected_work"], abs=1e-3)
    assert report["agreement"] >= 0.3
    table = run(*auto).out
    assert table.startswith("budget auto chose: 0.5 0.2 cls; all again where ")
    for line in ("the full model's", "answered again ", "  executed ", "    95% up to "):
        assert f"\n{line}" in table
    asked, told = tmp_path / "asked.jsonl", tmp_path / "told.jsonl"
    asked.write_text("".join(json.dumps({"question": "who?", "context": context}) + "\n" for context in contexts[:3]))
    answer = ("answer", "--model", with_schedules, "--budget", "auto", "--agreement", 0.3)
    assert run(*answer, "--input", asked, "--output", told).status == 0
    assert json.loads(Path(f"{told}.settings.json").read_text())["unsure_to"] == chosen.unsure_to
    lines = [json.loads(line)["answer"] for line in told.read_text().splitlines()]
    one = json.loads(run(*answer, "--question", "who?", "--text", contexts[0], "--json").out)
    assert (len(lines), one["answer"]) == (3, lines[0])
    again = run(*answer[:-1], 0.9, "--input", asked, "--output", told)
    assert "made from other settings (schedule, unsure_to)" in again.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--calibrate-cascade", "--schedule", "1,0.5"), "--calibrate-cascade measures the schedules"),
        (("--agreement", 0.9), "--agreement is what --budget auto promises"),
        (("--budget", 0.5, "--agreement", 0.9), "--agreement is what --budget auto promises"),
        (("--budget", "auto", "--agreement", 2), "agreement must be above 0 and at most 1, not 2"),
        (("--budget", "auto", "--no-answer"), "--budget auto promises the best span: give it without --no-answer"),
        (("--budget", "auto", "--schedule", "1,1"), "exclude each other"),
        (("--budget", "much"), "such as 0.7, got 'much'"),
        (("--task", "sst2", "--budget", "auto"), "--budget auto is of questions: give a number with --task"),
        (("--task", "sst2", "--calibrate-cascade"), "--calibrate-cascade is of questions and windows"),
        (("--calibrate-cascade",), "has no schedules.json, of which the first answers come"),
    ],
)
def test_cascade_says_what_is_wrong_in_one_line(
    run: Run, model_folder: Path, questions_file: Path, arguments: tuple[object, ...], message: str
) -> None:
    status, out, err = run("evaluate", questions_file, "--model", model_folder, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert message in err


def test_limit_spreads_over_the_file(run: Run, model_folder: Path, questions_file: Path) -> None:
    report = json.loads(run("evaluate", questions_file, "--model", model_folder, "--limit", 5, "--json").out)
    assert report["questions"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.json",), "nothing.json: No such file or directory"),
        (("bad.json",), "bad.json: data: missing"),
        (("squad.json", "--predictions", "no/p.json"), "--predictions no/p.json: there is no folder no"),
        (("squad.json", "--predictions", "squad.json"), "--predictions squad.json is the input itself"),
        (("squad.json", "--schedule", "bad.json", "--predictions", "bad.json"), "bad.json is the input itself"),
        (("squad.json", "--schedule", '{"kind": ' + "1" * 300, "--predictions", "squad.json"), "is the input itself"),
        (("squad.json", "--predictions", "."), "--predictions . is a folder"),
        (("squad.json", "--device", "gpu"), "the device 'gpu'"),
        (("squad.json", "--schedule", "1,1,1"), "3 entries, the model 2 layers"),
    ],
)
def test_evaluate_says_what_is_wrong_in_one_line(
    run: Run,
    model_folder: Path,
    questions_file: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.chdir(questions_file.parent)
    Path("bad.json").write_text('{"x": 1}')
    status, out, err = run("evaluate", "--model", model_folder, *arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    assert sorted(path.name for path in questions_file.parent.iterdir()) == ["bad.json", "squad.json"]


@pytest.mark.parametrize("name", ["config.json", "vocab.txt", "model.safetensors"])
def test_predictions_replace_no_file_of_the_model(
    run: Run, model_folder: Path, questions_file: Path, name: str
) -> None:
    before = (model_folder / name).read_bytes()
    status, _, err = run("evaluate", questions_file, "--model", model_folder, "--predictions", model_folder / name)
    assert (status, "is a file of the model: name another file" in err) == (2, True)
    assert (model_folder / name).read_bytes() == before
