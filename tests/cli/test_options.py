"""Schedules and models as the options give them."""

import argparse
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dtbert.cli.options import (
    add_model_options,
    add_schedule_options,
    add_window_options,
    describe_schedule,
    known_scorers,
    load_answerer,
    load_for_schedule,
    other_windows,
    parse_schedule,
    schedule_of,
)
from dtbert.kernels import SCORE_COSTS
from dtbert.model import LengthSchedule, OwnScorer, is_logarithmic
from dtbert.model.scorers import ScoredTokens, scorer_named


def parse(*arguments: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_model_options(parser)
    add_schedule_options(parser, budget=True)
    add_window_options(parser)
    return parser.parse_args([str(argument) for argument in arguments])


@pytest.mark.parametrize(
    ("spec", "schedule"),
    [
        ("269,253,252,202,104,34", LengthSchedule.absolute([269, 253, 252, 202, 104, 34])),
        ("1,1,0.9,0.6,0.4,0.2", LengthSchedule.ratios([1, 1, 0.9, 0.6, 0.4, 0.2])),
        ("1,1,1,1,1,1", LengthSchedule.ratios([1] * 6)),
        ("1", LengthSchedule.ratios([1])),
        ("384, 1, 1", LengthSchedule.absolute([384, 1, 1])),
        ("1.0,1.0,5e-1", LengthSchedule.ratios([1, 1, 0.5])),
        ("2,1", LengthSchedule.absolute([2, 1])),
        ('{"kind": "absolute", "length_config": [1, 1]}', LengthSchedule.absolute([1, 1])),
        ("(269, 253, 252, 202, 104, 34)", LengthSchedule.absolute([269, 253, 252, 202, 104, 34])),
        ("[1, 0.5]", LengthSchedule.ratios([1, 0.5])),
    ],
)
def test_schedule_spec_means(spec: str, schedule: LengthSchedule) -> None:
    assert parse_schedule(spec) == schedule


@pytest.mark.parametrize("content", ["(100, 50)\n", "[100, 50]", "100,50\n", "(100, 50)\t12\t80.5\t0\tNone\n"])
def test_schedule_file_may_hold_a_list_or_a_table_of_one(tmp_path: Path, content: str) -> None:
    path = tmp_path / "schedule"
    path.write_text(content)
    assert parse_schedule(str(path)) == LengthSchedule.absolute([100, 50])


def test_table_of_many_schedules_is_not_one(tmp_path: Path) -> None:
    path = tmp_path / "store.tsv"
    path.write_text("length_config\tmacs\tf1\n100,50\t12\t80.5\n90,50\t11\t80.1\n")
    with pytest.raises(ValueError, match=r"store\.tsv: this is a table of 2 schedules"):
        parse_schedule(str(path))


def test_schedule_spec_may_be_a_file(tmp_path: Path) -> None:
    schedule = LengthSchedule.ratios([1, 0.5], scorer=("cls", "answer"), keep_cls=True)
    path = tmp_path / "schedule.json"
    path.write_text(schedule.to_json())
    assert parse_schedule(str(path)) == schedule


def test_different_schedules_have_different_descriptions() -> None:
    schedules = [
        LengthSchedule.ratios([1, 1]),
        LengthSchedule.absolute([1, 1]),
        LengthSchedule.ratios([1, 0.1234567]),
        LengthSchedule.ratios([1, 0.1234568]),
        LengthSchedule.ratios([1, 0.1234568], keep_question=True),
    ]
    assert describe_schedule(schedules[0]) == "1 1 (the model's own)"
    assert describe_schedule(schedules[0].resolve(OwnScorer("cls", True))) == "1 1 cls +question"
    assert describe_schedule(LengthSchedule.absolute([1, 1], scorer=["cls", "answer"])) == "1 1 tokens cls,answer"
    some = LengthSchedule.ratios([1, 0.5, 0.5], scorer="cls", keep_question=[True, True, False])
    assert describe_schedule(some) == "1 0.5 0.5 cls +question in layers 0 1"
    assert len({describe_schedule(one) for one in schedules}) == len(schedules)


def test_schedule_options_override_the_files() -> None:
    spec = LengthSchedule.ratios([1, 0.5], keep_cls=True).to_json()
    changed = schedule_of(parse("--schedule", spec, "--scorer", "cls, answer", "--keep-question"))
    assert changed == LengthSchedule.ratios([1, 0.5], scorer=("cls", "answer"), keep_cls=True, keep_question=True)
    assert schedule_of(parse("--schedule", "1,0.5", "--scorer", "cls")) == LengthSchedule.ratios([1, 0.5], scorer="cls")
    assert schedule_of(parse()) is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "1,,1"], "--schedule '1,,1': ''"),
        (["--schedule", "1e,1"], "--schedule .*'1e'"),
        (["--schedule", "1.5,1"], "--schedule '1.5,1': .*1.5: .* ratio"),
        (["--schedule", "384,0.5"], "384.0: .* ratio"),
        (["--schedule", "5,0"], "--schedule '5,0': .*0: .* whole number of tokens, at least 1"),
        (["--schedule", "-5,-6"], "--schedule '-5,-6': .*-5.*: .* ratio"),
        (["--schedule", "1,2,3"], "grows from 1 to 2"),
        (["--schedule", "nan,1"], "--schedule 'nan,1'"),
        (["--schedule", ""], "--schedule '': ''"),
        (["--schedule", "nothing.json"], "--schedule 'nothing.json'"),
        (["--schedule", "{"], "--schedule: .* JSON"),
        (["--schedule", '{"kind": "ratios"}'], "missing .'length_config'"),
        (["--schedule", "1,0.5", "--scorer", "luck"], "unknown scorer 'luck'"),
        (["--schedule", "1,0.5", "--scorer", "cls,cls,cls"], "3 scorers for 2 layers"),
        (["--scorer", "cls"], "--scorer .* needs --schedule"),
        (["--keep-question"], "--keep-question .* needs --schedule"),
    ],
)
def test_wrong_schedule_options_are_refused(arguments: list[str], message: str) -> None:
    # A joined form, for values that begin with a dash.
    joined = [f"{arguments[0]}={arguments[1]}", *arguments[2:]] if len(arguments) > 1 else arguments
    with pytest.raises((ValueError, OSError), match=message):
        schedule_of(parse(*joined))


def test_schedule_takes_the_models_own_scorer_and_says_so(
    model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "scorer": "cls", "keep_question": True}))
    by_cls = LengthSchedule.ratios([1, 0.5], scorer="cls", keep_question=True)
    assert load_for_schedule(parse("--model", folder, "--schedule", "1,0.5"))[1] == by_cls
    assert capsys.readouterr().err == (
        "dtbert: the schedule names no scorer: the model's own chooses, cls, the question kept\n"
    )
    named = load_for_schedule(parse("--model", folder, "--schedule", "1,0.5", "--scorer", "answer"))[1]
    assert named == LengthSchedule.ratios([1, 0.5], scorer="answer")
    assert capsys.readouterr().err == ""


def test_scorer_of_ones_own_is_imported_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_scorers_of_options.py").write_text(
        "import torch\nlimit = 3\ndef late(view):\n    return view.position_ids\n"
    )
    Path("my_broken_scorers.py").write_text("1 / 0\n")
    name = "my_scorers_of_options:late"
    schedule = schedule_of(parse("--schedule", "1,0.5", "--scorer", f"{name},cls"))
    assert schedule == LengthSchedule.ratios([1, 0.5], scorer=(name, "cls"))
    assert known_scorers("--scorers", f"cls, {name}+question") == ["cls", f"{name}+question"]
    # A budget's schedule may have it, which is not known otherwise.
    assert schedule_of(parse("--budget", "0.5", "--scorer", name)) is None
    with pytest.raises(ValueError, match=r"--scorer .* needs --schedule"):
        schedule_of(parse("--budget", "0.5", "--scorer", "cls"))
    for given, message in (
        ("nothing_here:f", "cannot import 'nothing_here': ModuleNotFoundError: No module named 'nothing_here'"),
        ("my_scorers_of_options.py:late", "cannot import .* name a module as Python imports it, without .py"),
        ("my_broken_scorers:f", "cannot import 'my_broken_scorers': ZeroDivisionError: division by zero"),
        ("my_scorers_of_options:early", r"'my_scorers_of_options' \(.*my_scorers_of_options.py\) has no 'early'"),
        ("my_scorers_of_options:limit", "the scorer .* must be a function of a LayerView, not int"),
        (":f", "cannot import ''"),
    ):
        with pytest.raises(ValueError, match=rf"^--scorer {given}: {message}"):
            schedule_of(parse("--schedule", "1,0.5", "--scorer", given))


def test_scorer_of_ones_own_is_what_its_module_registered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("my_registered_scorers.py").write_text(
        "import dtbert\n"
        "def late(view):\n    return view.position_ids\n"
        "def sure(view):\n    return view.accumulated\n"
        "dtbert.register_scorer('my_registered_scorers:late', late, logarithmic=True, macs=5)\n"
        "dtbert.register_scorer('sure', sure, remembers=True)\n"
    )
    late, sure = "my_registered_scorers:late", "my_registered_scorers:sure"
    schedule = schedule_of(parse("--schedule", "1,0.5", "--scorer", f"{late},{sure}"))
    assert schedule is not None
    assert (is_logarithmic(late), is_logarithmic(sure), schedule.remembers) == (True, False, True)
    assert scorer_named(late).macs(ScoredTokens(10, 3, 16), SCORE_COSTS["cpu"]) == 50
    assert LengthSchedule.ratios([1, 0.5], scorer=late).remembers is False


def test_model_options_reach_the_model(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    answerer = load_answerer(parse("--model", model_folder, "--threads", 3, "--device", "cpu"))
    assert answerer.config.hidden_size == 16
    assert answerer.model.dtype == torch.float32
    assert threads == [3]


def test_window_options_reach_the_answerer_and_what_a_run_is_compared_by(model_folder: Path) -> None:
    given = parse("--model", model_folder, "--window", 200, "--stride", 20)
    answerer = load_answerer(given)
    assert (answerer.window, answerer.stride) == (200, 20)
    assert other_windows(given) == {"window": 200, "stride": 20}
    # Runs from before there were these options go on.
    assert other_windows(parse()) == {}
    with pytest.raises(ValueError, match="window of 9999 tokens"):
        load_answerer(parse("--model", model_folder, "--window", 9999))


def test_model_and_schedule_must_fit(model_folder: Path) -> None:
    with pytest.raises(ValueError, match="3 entries, the model 2 layers"):
        load_for_schedule(parse("--model", model_folder, "--schedule", "1,1,0.5"))
    with pytest.raises(ValueError, match="with --model"):
        load_answerer(parse("--revision", "main"))


def test_schedule_file_that_is_not_utf8_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_bytes(json.dumps({"kind": "ratios"}).encode("utf-16"))
    with pytest.raises(ValueError, match=r"schedule\.json"):
        parse_schedule(str(path))


def test_schedules_json_is_not_one_schedule(tmp_path: Path) -> None:
    file = tmp_path / "schedules.json"
    file.write_text(json.dumps({"dtbert": "0", "format": 1, "model_sha256": "", "schedules": []}))
    with pytest.raises(ValueError, match=r"schedules\.json: .* --budget"):
        parse_schedule(str(file))
