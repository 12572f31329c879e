"""`dtbert classify`: one text or pair, files of them, pipes, and what it refuses."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest

from dtbert import LengthSchedule, TextClassifier
from tests.cli.conftest import Run
from tests.cli.questions import read
from tests.text.conftest import LABELS, write_classifier

TEXT, PAIR = "bo ba di do", "fe fi bo"
ROWS: list[dict[str, Any]] = [
    {"id": "a", "text": TEXT, "pair": PAIR, "more": 1},
    {"text": "di do, ba fe"},
    {"id": 2, "text": " "},
    {"text": "bo", "pair": None},
    {"text": "bo", "pair": 3},
    {"text": "bo " * 90},
]
ERRORS = {
    3: "the text is blank: give it at least one word",
    5: "pair: expected a text, found 3",
    6: "the text has 92 tokens with its special ones, the model reads 64 at most: shorten or split it; nothing is cut "
    "off in silence",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classify") / "model")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), "utf-8")


@pytest.mark.parametrize("pair", [None, PAIR], ids=["text", "pair"])
def test_one_text_is_labelled_as_the_classifier_does(run: Run, model: Path, pair: str | None) -> None:
    command = ("classify", "--model", model, "--text", TEXT, *(() if pair is None else ("--pair", pair)))
    found = TextClassifier.load(model)(TEXT, pair)
    assert run(*command) == (0, f"{found.score:<8.3g}  {found.label}\n", "")
    assert json.loads(run(*command, "--json").out) == {
        "label": found.label,
        "score": pytest.approx(found.score, rel=1e-5),
    }
    # More than there are is all of them, best first.
    labels = json.loads(run(*command, "--json", "--top", 9).out)["labels"]
    assert {one["label"]: one["score"] for one in labels} == pytest.approx(found.scores, rel=1e-5)
    assert [one["score"] for one in labels] == sorted((one["score"] for one in labels), reverse=True)
    assert [line.split()[1] for line in run(*command, "--top", 2).out.splitlines()] == [
        one["label"] for one in labels[:2]
    ]


def test_a_number_is_printed_as_one(run: Run, tmp_path: Path) -> None:
    folder = write_classifier(tmp_path / "number", ("similarity",))
    number = TextClassifier.load(folder)(TEXT, PAIR).score
    out = run("classify", "--model", folder, "--text", TEXT, "--pair", PAIR).out
    assert out == f"{number:<8.3g}  similarity\n"


def test_labels_of_a_file_are_those_of_its_texts_and_bad_lines_are_named(run: Run, model: Path) -> None:
    command = ("classify", "--model", model, "--input", "texts.jsonl", "--output", "labels.jsonl")
    status, out, err = run(*command)
    classifier = TextClassifier.load(model)
    want = {1: classifier(TEXT, PAIR), 2: classifier(ROWS[1]["text"]), 4: classifier("bo")}
    lines = read(Path("labels.jsonl"))
    assert (status, out, [line["line"] for line in lines]) == (1, "", [1, 2, 3, 4, 5, 6])
    for number, found in want.items():
        one = lines[number - 1]
        assert (one["label"], one["score"]) == (found.label, pytest.approx(found.score, rel=1e-4))
    assert {line["line"]: line["error"] for line in lines if "error" in line} == ERRORS
    assert [line.get("id") for line in lines] == ["a", None, 2, None, None, None]
    assert err.splitlines() == [
        *(f"dtbert: texts.jsonl, line {number}: {error}" for number, error in ERRORS.items()),
        'dtbert: 3 of 6 lines failed: see "error" in labels.jsonl',
    ]
    # It goes on from any line, with nothing but the same run.
    complete = Path("labels.jsonl").read_bytes()
    Path("labels.jsonl").write_bytes(complete[: complete.index(b'"line": 4')])
    assert "going on after 3 of 6 lines" in run(*command).err
    assert Path("labels.jsonl").read_bytes() == complete
    assert "was made from other settings (top)" in run(*command, "--top", 2).err
    assert "was made from other settings (schedule)" in run(*command, "--schedule", "0.5,0.5").err


def test_tables_and_pipes_give_the_labels_of_lines(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"id": row.get("id", ""), "text": row["text"], "pair": row.get("pair") or ""} for row in ROWS[:2]]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, ["pair", "id", "text"])
    writer.writeheader()
    writer.writerows(rows)
    Path("texts.csv.gz").write_bytes(gzip.compress(table.getvalue().encode()))
    command = ("classify", "--model", model, "--quiet", "--top", 2)
    assert run(*command, "--input", "texts.csv.gz", "--output", "labels.jsonl").status == 0
    by_table = read(Path("labels.jsonl"))
    piped = "".join(json.dumps(row) + "\n" for row in ROWS[:2])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(piped.encode())))
    status, out, err = run(*command, "--input", "-", "--output", "-")
    assert (status, err) == (0, "")
    by_pipe = [json.loads(line) for line in out.splitlines()]
    # An empty cell is a text without a pair, and without an id.
    assert [one["labels"] for one in by_table] == [one["labels"] for one in by_pipe]
    assert {one["label"] for one in by_pipe[0]["labels"]} < set(LABELS)


def test_a_column_of_texts_alone_loses_nothing_at_a_comma(run: Run, model: Path) -> None:
    Path("texts.csv").write_text('text\n"di do, ba fe"\ndi do, ba fe\n')
    Path("texts.tsv").write_text("text\ndi do, ba fe\n")
    command = ("classify", "--model", model, "--quiet", "--json")
    assert run(*command, "--input", "texts.csv", "--output", "csv.jsonl").status == 1
    assert run(*command, "--input", "texts.tsv", "--output", "tsv.jsonl").status == 0
    (quoted, plain), (tabbed,) = read(Path("csv.jsonl")), read(Path("tsv.jsonl"))
    assert quoted == tabbed
    assert plain["error"].startswith("the row has 2 cells, the first line 1: put quotes around")


def test_schedules_drop_tokens_and_the_models_own_scorer_is_told(run: Run, model: Path) -> None:
    command = ("classify", "--model", model, "--text", TEXT, "--json", "--schedule", "0.5,0.3")
    found = TextClassifier.load(model)(TEXT, schedule=LengthSchedule.ratios([0.5, 0.3], scorer="cls"))
    assert json.loads(run(*command, "--scorer", "cls").out)["score"] == pytest.approx(found.score, rel=1e-5)
    assert "the model's own chooses, received" in run(*command).err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give either --text (and --pair), or --input and --output"),
        (("--pair", "bo"), "give either --text"),
        (("--text", "bo", "--input", "texts.jsonl"), "give either --text"),
        (("--input", "texts.jsonl"), "give either --text"),
        (("--text", ""), "the text is empty"),
        (("--text", "bo", "--pair", ""), "the pair is empty"),
        (("--text", "bo", "--budget", "0.5"), "this model has no schedules.json"),
        (("--text", "bo", "--budget", "0.5", "--schedule", "1,1"), "exclude each other"),
        (("--text", "bo", "--schedule", "1,1,1"), "3 entries, the model 2 layers"),
        (("--text", "bo", "--schedule", "0.5,0.5", "--scorer", "answer"), "reads the span head"),
        (("--input", "none.jsonl", "--output", "out"), "--input none.jsonl must be a file: there is none"),
        (("--input", "texts.jsonl", "--output", "texts.jsonl"), "is the input itself"),
    ],
)
def test_what_makes_no_sense_is_one_line(run: Run, model: Path, arguments: tuple[str, ...], message: str) -> None:
    status, out, err = run("classify", "--model", model, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("dtbert: error: ")
    assert message in err


def test_a_model_that_labels_nothing_is_refused_with_what_does(run: Run, model_folder: Path) -> None:
    assert "the model inside dtbert answers questions: name a classifier" in run("classify", "--text", "bo").err
    assert "the classifier is missing" in run("classify", "--model", model_folder, "--text", "ada").err


def test_a_file_without_texts_says_what_it_has(run: Run, model: Path) -> None:
    for name, content, message in (
        ("a.csv", "sentence,label\nbo,1\n", "a.csv has no column text: its first line has sentence, label"),
        ("b", "bo ba di\n", "b is no file of texts: it begins with 'bo ba di'; expected JSON objects"),
    ):
        Path(name).write_text(content)
        err = run("classify", "--model", model, "--input", name, "--output", "out").err
        assert err.startswith(f"dtbert: error: {message}")
    Path("c.jsonl").write_text('{"sentence": "bo"}\n[1]\n')
    run("classify", "--model", model, "--input", "c.jsonl", "--output", "out")
    assert [one["error"] for one in read(Path("out"))] == [
        "text: missing; the object has sentence",
        'expected a JSON object with "text"',
    ]
