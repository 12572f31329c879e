"""`dtbert evaluate`: the metric, the costs and the speed of a model at a schedule."""

import json
from pathlib import Path
from typing import Any

import pytest

from dtbert.cli.evaluate import cost, spread
from dtbert.model import LengthSchedule
from dtbert.qa import QuestionAnswerer
from dtbert.squad import GoldAnswer, SquadQuestion, evaluate, read_squad
from tests.cli.conftest import Run

CONTEXTS = ["Ada wrote it in London in 1843.", "Zoe said it in Paris. " * 40, "the letter to Ada, " * 200]


@pytest.fixture
def questions_file(tmp_path: Path) -> Path:
    path = tmp_path / "squad.json"
    write_squad(path, [f"who wrote it {'and where ' * number}?" for number in range(12)])
    return path


def write_squad(path: Path, questions: list[str]) -> None:
    paragraphs: list[dict[str, Any]] = [{"context": context, "qas": []} for context in CONTEXTS]
    for number, question in enumerate(questions):
        paragraph = paragraphs[number % 3]
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


def test_cost_sums_over_windows_and_averages_over_questions(model_folder: Path, questions_file: Path) -> None:
    answerer, questions = QuestionAnswerer.load(model_folder), read_squad(questions_file)[::4]
    schedule, config = LengthSchedule.ratios([0.9, 0.4], scorer="from_question"), answerer.config
    everything = LengthSchedule.ratios([1, 1])
    executed = published = own = padded = windows = 0
    for question in questions:
        head = len(answerer.tokenizer.encode(question.question, add_special_tokens=False).ids) + 2
        tail = len(answerer.tokenizer.encode(question.context, add_special_tokens=False).ids)
        # Windows by hand: each has room for this many tokens of context, and begins `room - stride` after the last.
        room = answerer.window - head - 1
        begin = 0
        while True:
            length = head + min(room, tail - begin) + 1
            executed += schedule.macs(config, length, question_length=head).executed
            published += schedule.macs(config, length).published
            own += everything.macs(config, length).published
            padded += everything.macs(config, 384).published
            windows += 1
            if begin + room >= tail:
                break
            begin += room - answerer.stride
    assert windows > len(questions)
    found = cost(answerer, questions, schedule)
    assert (found.executed, found.published) == (executed / len(questions), published / len(questions))
    assert (found.own_length, found.padded) == (own / len(questions), padded / len(questions))
    assert found.windows == windows / len(questions)


def test_cost_without_a_schedule_is_the_plain_models(model_folder: Path, questions_file: Path) -> None:
    answerer, questions = QuestionAnswerer.load(model_folder), read_squad(questions_file)
    plain = cost(answerer, questions, None)
    assert plain.executed == plain.published == plain.own_length < plain.padded
    assert cost(answerer, questions, LengthSchedule.ratios([1, 1])) == plain
    assert cost(answerer, questions, LengthSchedule.ratios([0.5, 0.1])).executed < plain.own_length


def test_evaluate_counts_a_question_that_is_too_long_as_wrong(run: Run, model_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "squad.json"
    write_squad(path, ["who wrote it?", "who " * 400])
    status, out, err = run("evaluate", path, "--model", model_folder, "--json")
    report = json.loads(out)
    assert status == 1
    assert report["missing"] == ["q1"]
    assert report["questions"] == 2
    assert err.startswith("dtbert: question q1 counts as wrong: the question has 400 tokens")
    assert "without answer" in run("evaluate", path, "--model", model_folder).out
    write_squad(path, ["who " * 400])
    alone = run("evaluate", path, "--model", model_folder)
    assert (alone.status, "MACs" in alone.out) == (1, False)


def test_limit_spreads_over_the_file(run: Run, model_folder: Path, questions_file: Path) -> None:
    questions = [SquadQuestion(str(number), "", "", "", (GoldAnswer("", 0),)) for number in range(10)]
    assert [question.id for question in spread(questions, 4)] == ["0", "2", "5", "7"]
    assert spread(questions, 10) == spread(questions, 99) == spread(questions, None) == questions
    report = json.loads(run("evaluate", questions_file, "--model", model_folder, "--limit", 5, "--json").out)
    assert report["questions"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nothing.json",), "nothing.json: No such file or directory"),
        (("bad.json",), "bad.json: data: missing; the object has x"),
        (("squad.json", "--predictions", "no/p.json"), "--predictions no/p.json: there is no folder no"),
        (("squad.json", "--predictions", "squad.json"), "--predictions squad.json is the input itself"),
        (("squad.json", "--schedule", "bad.json", "--predictions", "bad.json"), "bad.json is the input itself"),
        (("squad.json", "--schedule", '{"kind": ' + "1" * 300, "--predictions", "squad.json"), "is the input itself"),
        (("squad.json", "--predictions", "."), "--predictions . is a folder: name a file"),
        (("squad.json", "--device", "gpu"), "the device 'gpu' is not there: expected cpu, cuda, cuda:1, ..."),
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
