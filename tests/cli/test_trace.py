"""`dtbert trace`: what it prints, writes and refuses."""

import json
import sys
from pathlib import Path

import pytest

from dtbert.model import LengthSchedule
from dtbert.qa import QuestionAnswerer
from tests.cli.conftest import Run

CONTEXT = "Ada wrote the letter in Paris, and Zoe wrote it in London by 1843."
SCHEDULE = LengthSchedule.ratios([0.6, 0.3], scorer="received", keep_question=True)
DROPS = ("--schedule", "0.6,0.3", "--scorer", "received", "--keep-question")


@pytest.fixture
def one(model_folder: Path) -> tuple[object, ...]:
    return ("trace", "--model", model_folder, "--question", "Who wrote it?", "--context", CONTEXT)


@pytest.fixture
def questions_file(tmp_path: Path) -> Path:
    answers = {"Who wrote the letter?": "Ada", "Where?": "London", "When?": "1843"}
    qas = [
        {"id": str(number), "question": question, "answers": [{"text": text, "answer_start": CONTEXT.index(text)}]}
        for number, (question, text) in enumerate(answers.items())
    ]
    file = tmp_path / "q.json"
    file.write_text(json.dumps({"data": [{"title": "t", "paragraphs": [{"context": CONTEXT, "qas": qas}]}]}))
    return file


def test_one_question_is_marked_and_counted(run: Run, one: tuple[object, ...], model_folder: Path) -> None:
    status, out, err = run(*one, *DROPS)
    trace = QuestionAnswerer.load(model_folder).trace("Who wrote it?", CONTEXT, schedule=SCHEDULE)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "0.6 0.3 received +question"
    assert lines[1].startswith(f"answer     {trace.answer.text} (score ")
    assert "\x1b" not in out
    layers = trace.windows[0].layers
    assert [line.split()[:3] for line in lines[-3:-1]] == [
        [str(number), str(layer.entered), str(len(layer.kept))] for number, layer in enumerate(layers, start=1)
    ]
    assert all("4 of 4" in line for line in lines[-3:-1])
    assert lines[-1] == f"{trace.work:.2f} of the full model's work on this text"
    assert "{1 " in out


def test_a_terminal_shows_dimmed_words_unless_it_wants_no_colors(
    run: Run, one: tuple[object, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    # What steers a terminal comes from nowhere but the marks.
    hostile = (*one[:-1], f"{CONTEXT} \x1b[31m.")
    out = run(*hostile, *DROPS).out
    assert "\x1b[2m" in out
    assert "\x1b[31m" not in out
    assert "₁" in out
    for name, value in (("NO_COLOR", "1"), ("TERM", "dumb")):
        with monkeypatch.context() as context:
            context.setenv(name, value)
            assert "\x1b" not in run(*hostile, *DROPS).out


def test_schedules_and_scorers_are_traced_side_by_side(run: Run, one: tuple[object, ...], tmp_path: Path) -> None:
    page = tmp_path / "trace.html"
    given = ("--schedule", "0.6,0.3", "1,0.5", "--scorer", "cls", "random", "--json", "--html", page)
    status, out, err = run(*one, *given)
    assert (status, err) == (0, "")
    traces = json.loads(out)["traces"]
    assert [(trace["schedule"]["length_config"], trace["schedule"]["scorer"]) for trace in traces] == [
        (ratios, scorer) for ratios in ([0.6, 0.3], [1, 0.5]) for scorer in ("cls", "random")
    ]
    written = page.read_text("utf-8")
    data = written.partition('id="traces">')[2].partition("</script>")[0]
    carried = json.loads(data)
    assert [trace.pop("title") for trace in carried] == [
        "0.6 0.3 cls",
        "0.6 0.3 random",
        "1 0.5 cls",
        "1 0.5 random",
    ]
    assert carried == traces


def test_a_long_text_says_which_window_is_shown(run: Run, one: tuple[object, ...], model_folder: Path) -> None:
    answerer = QuestionAnswerer.load(model_folder, window=24, stride=4)
    trace = answerer.trace("Who wrote it?", CONTEXT * 4, schedule=SCHEDULE)
    out = run(*one[:-1], CONTEXT * 4, *DROPS, "--window", 24, "--stride", 4).out
    window = trace.windows[trace.answer_window]
    number = f"{trace.answer_window + 1} of {len(trace.windows)}"
    assert f"\nwindow     {number}, characters {window.start} to {window.end}\n" in out


def test_summary_of_a_file(run: Run, model_folder: Path, questions_file: Path) -> None:
    asked = (
        "trace",
        questions_file,
        "--summary",
        "--model",
        model_folder,
        "--schedule",
        "0.6,0.3",
        "1,1",
        "--scorer",
        "received",
        "--limit",
        2,
    )
    status, out, err = run(*asked)
    assert (status, err) == (0, "")
    assert out.startswith("2 of 2 questions")
    assert [line.split("  ")[1].strip() for line in out.splitlines() if line.startswith("  ")][2:9] == [
        "answers, both ends",
        "answer",
        "sentence of the answer",
        "question",
        "punctuation",
        "other",
        "special",
    ]
    report = json.loads(run(*asked, "--json").out)
    assert (report["questions"], report["counted"]) == (2, 2)
    dropping, full = report["schedules"]
    assert full["answers_left"] == [1, 1]
    assert (full["work"], full["same_answer"]) == (1, 1)
    assert dropping["work"] < 1
    assert dropping["schedule"] == LengthSchedule.ratios([0.6, 0.3], scorer="received").to_dict()
    assert set(dropping["classes"]["question"]) == {"tokens", "left"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --question and --context (or --file, --text), or FILE and --summary"),
        (("q.json",), "give either"),
        (("q.json", "--summary", "--html", "x.html"), "--html is for one question"),
        (("--question", "Who?", "--text", "Ada.", "--summary"), "--summary and --limit are for a FILE"),
        (("--question", "Who?", "--text", "Ada.", "--scorer", "cls"), "it needs --schedule"),
        (("--question", "Who?", "--text", "Ada.", "--budget", "0.5", "nine"), "such as 0.7, got 'nine'"),
        (("--question", "Who?", "--text", "Ada.", "--schedule", "1,1,1"), "3 entries, the model 2 layers"),
        (("--question", "Who?", "--text", "Ada."), "no schedules.json to choose a schedule from"),
        (("--question", "Who?", "--text", "Ada.", "--html", "/no/such/x.html"), "--html /no/such/x.html"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, model_folder: Path, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run("trace", *arguments, "--model", model_folder)
    assert (status, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
