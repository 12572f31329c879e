"""`--task` of `evaluate`, `train` and `search`: labelled texts in place of questions."""

import json
import shutil
from pathlib import Path

import pytest

from dtbert import LengthSchedule, TextClassifier, Threshold
from dtbert.cli.tasks import TASK_HELP
from dtbert.evaluation import TASKS, PreparedTexts, measure_texts, read_task, task_named
from dtbert.qa import read_schedules
from tests.cli.conftest import Run
from tests.text.conftest import write_classifier
from tests.training.test_texts import made_up

SMALL = ("--batch-tokens", 128, "--epochs", 1)


def write_tsv(path: Path, count: int, seed: int = 0) -> Path:
    rows = [f"{one.text}\t{one.label:.0f}\n" for one in made_up(count, seed).examples]
    path.write_text("sentence\tlabel\n" + "".join(rows), "utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A classifier `model`, the files `train.tsv` and `dev.tsv`."""
    there = tmp_path_factory.mktemp("tasks")
    write_classifier(there / "model", ("NEGATIVE", "POSITIVE"))
    write_classifier(there / "three")
    write_classifier(there / "teacher", ("positive", "negative"), num_hidden_layers=4)
    write_tsv(there / "train.tsv", 24)
    write_tsv(there / "dev.tsv", 12, seed=1)
    return there


@pytest.fixture(autouse=True)
def _in_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)


EVALUATE = ("evaluate", "dev.tsv", "--task", "sst2", "--model", "model")


def test_evaluate_reports_what_the_classifier_gets_right_at_what_cost(run: Run, tmp_path: Path) -> None:
    saved = tmp_path / "labels.json"
    options = ("--schedule", "0.6,0.4", "--scorer", "cls", "--json", "--predictions", saved)
    status, out, err = run(*EVALUATE, *options)
    assert (status, err) == (0, "")
    report = json.loads(out)
    schedule = LengthSchedule.ratios([0.6, 0.4], scorer="cls")
    data = read_task("dev.tsv", task_named("sst2"))
    found = measure_texts(PreparedTexts(TextClassifier.load("model"), data), schedule)
    assert found.cost is not None
    assert (report["texts"], report["accuracy"], report["score"]) == (12, *[found.scores["accuracy"]] * 2)
    assert report["schedule"] == schedule.to_dict()
    assert report["macs_per_text"]["executed"] == round(found.cost.executed)
    assert report["ratio_to_own_length"]["executed"] < 0.9
    assert json.loads(saved.read_text("utf-8")) == {
        str(one.line): label for one, label in zip(data.examples, found.predictions, strict=True)
    }


def test_evaluate_takes_what_the_text_decides(run: Run) -> None:
    threshold = '{"kind": "threshold", "thresholds": [0.02, 0.05]}'
    status, out, err = run(*EVALUATE, "--schedule", threshold, "--scorer", "cls")
    assert (status, err) == (0, "")
    assert "schedule: shares from 0.02 0.05 cls" in out
    assert "  95% up to" in out
    report = json.loads(run(*EVALUATE, "--schedule", threshold, "--scorer", "cls", "--json").out)
    macs = report["macs_per_text"]
    assert macs["executed"] < macs["executed_p95"] <= macs["own_length"] * 2
    assert macs["executed"] < macs["own_length"]


def test_evaluate_prints_a_table_and_names_what_it_leaves_out(run: Run, tmp_path: Path) -> None:
    status, out, err = run(*EVALUATE, "--schedule", "0.6,0.4", "--scorer", "received")
    assert (status, err) == (0, "")
    for line in ("schedule: 0.6 0.4 received", "texts ", "accuracy ", "texts/s ", "executed ", "nothing dropped "):
        assert line in out
    bad = tmp_path / "bad.tsv"
    bad.write_text(Path("dev.tsv").read_text("utf-8") + "broken\n" + "bo " * 90 + "\t1\n", "utf-8")
    status, out, err = run("evaluate", bad, *EVALUATE[2:])
    assert status == 1
    assert err == (
        f"dtbert: {bad}: lines left out: 1\ndtbert:   line 14: label: missing; the object has sentence\n"
        f"dtbert: {bad}: lines counted as wrong: 1\ndtbert:   line 15: the text has 92 tokens with its special ones, "
        "the model reads 64 at most: shorten or split it; nothing is cut off in silence\n"
    )
    assert "lines left out          1\n" in out
    assert "not readable            1   (counted as wrong)\n" in out
    assert json.loads(run(*EVALUATE, "--limit", 5, "--json").out)["texts"] == 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((*EVALUATE, "--window", 100), "--window is of questions and windows: it has no part in --task"),
        ((*EVALUATE, "--no-answer"), "--no-answer is of questions"),
        ((*EVALUATE, "--choose-threshold"), "--choose-threshold is of questions"),
        (EVALUATE[:-2], "--task needs --model"),
        (("evaluate", "dev.tsv", "--task", "sst-2", "--model", "model"), "unknown task 'sst-2': choose one of cola"),
        (("evaluate", "dev.tsv", "--task", "cola", "--model", "model"), "the labels are unacceptable, acc"),
        ((*EVALUATE, "--budget", "0.5"), "this model has no schedules.json"),
        ((*EVALUATE, "--budget", "0.5", "--schedule", "1,1"), "--schedule and --budget exclude each other"),
        ((*EVALUATE, "--schedule", "1,1,1"), "3 entries, the model 2 layers"),
        ((*EVALUATE, "--schedule", "0.5,0.5", "--scorer", "answer"), "reads the span head"),
        ((*EVALUATE, "--predictions", "dev.tsv"), "is the input itself"),
        (("search", "dev.tsv", "--task", "stsb", "--model", "model", "--out", "f.json"), "has no column 'sentence1'"),
        (("train", "--task", "sst2", "--model", "model", "--train", "train.tsv", "--out", "r", "--length-drop",
          "--answer-loss", 1), "--answer-loss is of a span head: it has no part in --task"),
        (("train", "--task", "sst2", "--model", "model", "--train", "train.tsv", "--out", "r", "--teacher", "three"),
         "--teacher three: the labels are NEGATIVE, POSITIVE, the model's negative, neutral, positive"),
        (("train", "--task", "sst2", "--model", "model", "--train", "train.tsv", "--out", "r", "--batch-tokens", 9),
         "a text has 21 tokens, a step 9: give larger batches"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_one_line(run: Run, arguments: tuple[object, ...], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert err.startswith("dtbert: error: ")
    assert err.count("\n") == 1
    assert message in err


def test_train_then_search_then_evaluate_within_a_budget(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = ("train", "--task", "sst2", "--model", "model", "--train", "train.tsv", "--dev", "dev.tsv", "--out", out,
               *SMALL, "--length-drop", "--num-sandwich", 0, "--eval-schedule", "0.6,0.4")  # fmt: skip
    first = run(*command)
    assert first.status == 0, first.err
    assert "accuracy 0.6 0.4 received" in first.out
    assert f"models in {out / 'last'} and {out / 'best'}" in first.out
    assert ": accuracy " in first.err
    record = json.loads(run(*command, "--json").out)
    assert record["main"] == pytest.approx((record["accuracy"] + record["accuracy 0.6 0.4 received"]) / 2)
    # The labels of the model that it started from, in its own spelling.
    assert TextClassifier.load(out / "best").labels == ("NEGATIVE", "POSITIVE")
    report = json.loads(run("evaluate", "dev.tsv", "--task", "sst2", "--model", out / "best", "--json").out)
    assert report["accuracy"] == pytest.approx(record["accuracy"])

    pytest.importorskip("optuna", reason="the search needs the extra: pip install 'dtbert[search]'")
    best = out / "best"
    search = ("search", "dev.tsv", "--task", "sst2", "--model", best, "--out", best / "schedules.json", "--trials", 5)
    status, shown, err = run(*search, "--rungs", "4", "--plot", tmp_path / "front.png", "--quiet")
    assert (status, err) == (0, "")
    assert "texts       " in shown
    assert "  acc.   95% interval   kept after" in shown
    front = read_schedules(best / "schedules.json")
    assert {entry.schedule.scorer for entry in front.schedules if entry.schedule} <= {"received", "cls", "value_norm"}
    budget = front.schedules[-1].least_budget
    chosen = front.within(budget)
    assert chosen.schedule is not None
    report = json.loads(run("evaluate", "dev.tsv", "--task", "sst2", "--model", best, "--budget", budget, "--json").out)
    assert report["accuracy"] == pytest.approx(chosen.f1, abs=1e-3)
    assert report["ratio_to_own_length"]["executed"] == pytest.approx(chosen.macs_fraction, abs=1e-4)
    text = "bo ba di"
    classifier = TextClassifier.load(best)
    assert classifier(text, budget=budget) == classifier(text, schedule=chosen.schedule)
    assert classifier(text, budget=1.0) == classifier(text)


@pytest.mark.parametrize("options", [("--temperature", 2), ("--distill", "intermediate")])
def test_train_with_a_teacher_goes_on_as_the_same_run(run: Run, tmp_path: Path, options: tuple[object, ...]) -> None:
    command = ("train", "--task", "sst2", "--model", "model", "--teacher", "teacher", "--train", "train.tsv",
               "--dev", "dev.tsv", "--out", tmp_path / "run", *SMALL, *options)  # fmt: skip
    first = run(*command)
    assert first.status == 0, first.err
    assert "accuracy" in first.out
    assert "nothing to do" in run(*command).out
    assert run(*command, "--hard-label-weight", 1).status == 2


def test_search_of_what_the_text_decides_then_evaluate_within_a_budget(run: Run, tmp_path: Path) -> None:
    pytest.importorskip("optuna", reason="the search needs the extra: pip install 'dtbert[search]'")
    folder = tmp_path / "model"
    shutil.copytree("model", folder)
    command = ("search", "dev.tsv", "--task", "sst2", "--model", folder, "--out", folder / "schedules.json",
               "--policy", "threshold", "--scorers", "cls", "--trials", 4, "--rungs", "none", "--quiet")  # fmt: skip
    assert run(*command, "--learn", 1).err.startswith("dtbert: error: --learn learns of the full model's answers")
    status, out, err = run(*command)
    assert (status, err) == (0, "")
    assert "shares from" in out
    front = read_schedules(folder / "schedules.json")
    assert any(isinstance(entry.schedule, Threshold) for entry in front.schedules)
    cheapest = front.schedules[0]
    evaluate = ("evaluate", "dev.tsv", "--task", "sst2", "--model", folder, "--budget", cheapest.least_budget)
    report = json.loads(run(*evaluate, "--json").out)
    assert report["schedule"] == cheapest.schedule.to_dict()
    assert report["accuracy"] == pytest.approx(cheapest.f1, abs=1e-3)
    assert report["ratio_to_own_length"]["executed"] == pytest.approx(cheapest.macs_fraction, abs=1e-4)


def test_files_of_ones_own_train_a_new_classifier(run: Run, tmp_path: Path) -> None:
    rows = [{"text": one.text, "label": "yes" if one.label else "no"} for one in made_up(16).examples]
    rows[3]["label"] = "maybe"
    for name, part in (("one", rows[:8]), ("two", rows[8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), "utf-8")
    train = (tmp_path / "one.jsonl", tmp_path / "two.jsonl")
    done = run("train", "--task", "classification", "--model", "model", "--train", *train, "--out", tmp_path / "run",
               *SMALL)  # fmt: skip
    assert done.status == 0, done.err
    last = tmp_path / "run" / "last"
    assert TextClassifier.load(last).labels == ("maybe", "no", "yes")
    report = json.loads(run("evaluate", train[1], "--task", "classification", "--model", last, "--json").out)
    assert {"accuracy", "f1"} <= report.keys()


def test_help_names_every_task() -> None:
    assert set(TASKS) <= set(TASK_HELP.replace(",", " ").replace(";", " ").split())
