"""`dtbert search`, and what `--budget` of the other commands makes of its schedules."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from dtbert.evaluation import Score, read_squad
from dtbert.model import LengthSchedule, Threshold
from dtbert.qa import QuestionAnswerer, read_schedules
from dtbert.training import learnt_thresholds
from dtbert.training.learnt_thresholds import ThresholdLearning
from tests.cli.conftest import Run
from tests.training.conftest import write_model, write_questions

pytest.importorskip("optuna", reason="the search needs the extra: pip install 'dtbert[search]'")
CONTEXT = "Ada wrote it in London in 1843, and Zoe said it in Paris."


@pytest.fixture
def folder(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with questions and a model whose folder may be written to."""
    shutil.copytree(model_folder, tmp_path / "model")
    articles = []
    for article in range(3):
        questions = []
        for number, (word, text) in enumerate([("who", "Ada"), ("where", "London"), ("when", "1843")]):
            answers = [{"text": text, "answer_start": CONTEXT.index(text)}]
            questions.append({"id": f"{article}-{number}", "question": f"{word} wrote it?", "answers": answers})
        paragraph = {"context": CONTEXT + " the" * article, "qas": questions}
        articles.append({"title": f"t{article}", "paragraphs": [paragraph]})
    (tmp_path / "squad.json").write_text(json.dumps({"data": articles}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


SEARCH = ("search", "squad.json", "--model", "model", "--out", "model/schedules.json", "--trials", 4, "--rungs", "4")


def test_search_then_answer_within_a_budget(run: Run, folder: Path) -> None:
    start = LengthSchedule.ratios([0.8, 0.3], scorer="cls")
    options = ("--scorers", "cls,answer", "--start", start.to_json(), "--budget-range", "0.2,0.97")
    status, out, err = run(*SEARCH, *options, "--plot", "front.png")
    # Three constant ratios of two scorers, with the question kept and without, of which some cost too much; one start.
    first, draws = re.findall(r"dtbert: (\d+) schedules come first, .* then tpe draws (.*)\n", err)[0]
    assert (status, 4 < int(first) <= 13, draws) == (0, True, "none, for --trials is 4")
    assert out.startswith("trials      4: ")
    assert "everything" in out
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    front = read_schedules("model/schedules.json")
    assert (front.questions_file, front.num_questions) == ("squad.json", 9)
    answerer = QuestionAnswerer.load("model")
    assert answerer.front == front
    cheapest = front.schedules[0]
    assert cheapest.schedule is not None
    assert 0.2 <= cheapest.macs_fraction < 1
    # What the file says is what the other commands find.
    report = json.loads(run("evaluate", "squad.json", "--model", "model", "--budget", 0.97, "--json").out)
    chosen = front.within(0.97)
    assert report["budget"] == 0.97
    assert report["schedule"] == (chosen.schedule.to_dict() if chosen.schedule else None)
    assert report["f1"] == pytest.approx(chosen.f1, abs=1e-3)
    assert report["exact_match"] == pytest.approx(chosen.exact_match, abs=1e-3)
    assert report["ratio_to_own_length"]["executed"] == pytest.approx(chosen.macs_fraction, abs=1e-4)
    assert report["macs_per_question"] == report["macs_per_question"] | chosen.macs._asdict()
    budget = f"{cheapest.macs_fraction + 1e-6:.6f}"
    question = ("--question", "who wrote it?", "--context", CONTEXT, "--model", "model", "--json")
    answer = json.loads(run("answer", *question, "--budget", budget).out)
    assert answer == json.loads(run("answer", *question, "--schedule", cheapest.schedule.to_json()).out)
    assert "budget 0.97 chose: " in run("evaluate", "squad.json", "--model", "model", "--budget", 0.97).out


def test_same_command_goes_on_and_json_says_what_was_done(run: Run, folder: Path) -> None:
    run(*SEARCH, "--scorers", "cls")
    more = ("--scorers", "cls", "--trials", 6, "--sampler", "nsga2", "--json")
    report = json.loads(run(*SEARCH, *more).out)
    assert report["trials"]["finished"] == 6
    assert report["trials"]["all_questions"] + report["trials"]["ended_early"] == 6
    assert 6 * 4 <= report["questions_answered"] <= report["questions_without_rungs"] == 6 * 9
    assert report["out"] == "model/schedules.json"
    assert report["front"] == json.loads((folder / "model/schedules.json").read_text())
    again = json.loads(run(*SEARCH, *more).out)
    assert again == report


def test_search_says_what_comes_first_unless_quiet_or_done(run: Run, folder: Path) -> None:
    options = ("--scorers", "cls", "--keep-question", "no", "--trials", 5)
    err = run(*SEARCH, *options).err
    assert err == "dtbert: 3 schedules come first, constant ratios and those of --start; then tpe draws 2\n"
    assert run(*SEARCH, *options).err == ""
    assert run(*SEARCH, *options, "--study", "quiet", "--quiet").err == ""


@pytest.mark.parametrize("ending", ["pdf", "SVG"])
def test_search_draws_in_the_format_that_the_ending_names(run: Run, folder: Path, ending: str) -> None:
    assert run(*SEARCH, "--scorers", "cls", "--plot", f"front.{ending}").status == 0
    beginning = (folder / f"front.{ending}").read_bytes()[:60]
    assert beginning.startswith({"pdf": b"%PDF-", "SVG": b"<?xml"}[ending])


def test_the_question_may_be_kept_in_the_first_layers_alone(run: Run, folder: Path) -> None:
    options = ("--scorers", "cls", "--keep-question", "1,yes", "--trials", 9)
    assert run(*SEARCH, *options).status == 0
    front = json.loads((folder / "model/schedules.json").read_text())
    assert front["settings"]["keep_question"] == "1,yes"
    kept = [(entry["schedule"]["keep_question"], entry["schedule"]["keep_cls"]) for entry in front["schedules"]]
    assert set(map(str, kept)) <= {"([True, False], True)", "(True, False)"}
    assert run("answer", "--model", "model", "--budget", 0.9, "--question", "Who?", "--text", "Ada.").status == 0


@pytest.mark.parametrize(
    ("given", "message"), [("most", "expected yes, no, both"), ("2", "2 of 2 layers; expected 1 to 1"), ("0", "0 of 2")]
)
def test_search_refuses_to_keep_the_question_elsewhere(run: Run, folder: Path, given: str, message: str) -> None:
    status, _, err = run(*SEARCH, "--scorers", "cls", "--keep-question", given)
    assert status == 2
    assert message in err


def test_front_of_other_settings_is_not_replaced(run: Run, folder: Path) -> None:
    assert run(*SEARCH, "--scorers", "cls").status == 0
    out = folder / "model/schedules.json"
    before = out.read_bytes()

    def refused(*options: object) -> str:
        status, _, err = run(*SEARCH, "--scorers", "cls", *options)
        assert (status, out.read_bytes()) == (2, before)
        return err

    said = "--out model/schedules.json holds schedules that were searched with other settings ({}): name another"
    assert said.format("keep_question, scorers") in refused("--scorers", "cls,answer", "--keep-question", "yes")
    assert said.format("the questions") in refused("--limit", 5)
    assert said.format("device, objective, threads") in refused("--objective", "latency")
    # One that does not tell the settings is compared by its weights and questions.
    fields = json.loads(before)
    del fields["settings"]
    out.write_text(json.dumps(fields))
    assert run(*SEARCH, "--scorers", "cls,answer").status == 0
    fields["model_sha256"] = "0" * 64
    before = json.dumps(fields).encode()
    out.write_bytes(before)
    assert said.format("the model's weights") in refused()
    # What the message advises works.
    out.unlink()
    assert run(*SEARCH, "--scorers", "cls").status == 0


def test_study_is_of_one_model_set_of_questions_and_options(run: Run, folder: Path) -> None:
    def study(*options: object) -> str:
        (folder / "model/schedules.json").unlink(missing_ok=True)
        given = (*SEARCH, "--scorers", "cls", "--trials", 1, *options, "--json")
        return str(json.loads(run(*given).out)["study"])

    shutil.copytree("model", "other")
    weights = load_file("other/model.safetensors")
    save_file({name: tensor * 0.5 for name, tensor in weights.items()}, "other/model.safetensors")
    first = study()
    assert study("--seed", 5, "--sampler", "nsga2", "--margin", 3) == first
    latency = ("--objective", "latency", "--limit", 4)
    others = [
        study("--model", "other"),
        study("--limit", 5),
        study("--scorers", "answer"),
        study("--keep-question", "yes"),
        study(*latency),
        study(*latency, "--threads", 2),
    ]
    assert len({first, *others}) == 7


def test_what_the_text_decides_is_searched_and_used_as_a_schedule_is(run: Run, folder: Path) -> None:
    start = Threshold([0, 0.005], scorer="cls")
    options = ("--policy", "threshold", "--scorers", "cls", "--keep-question", "no", "--start", start.to_json())
    status, out, err = run(*SEARCH, *options, "--trials", 2, "--rungs", "none", "--budget-range", "0.2,0.99")
    assert (status, "4 schedules come first" in err) == (0, True)
    assert "shares from " in out
    (entry, *_) = read_schedules("model/schedules.json").schedules
    assert isinstance(entry.schedule, Threshold)
    report = json.loads(run("evaluate", "squad.json", "--model", "model", "--budget", 0.99, "--json").out)
    chosen = QuestionAnswerer.load("model").within_budget(0.99)
    assert report["ratio_to_own_length"]["executed"] == pytest.approx(chosen.macs_fraction, abs=1e-4)
    assert report["macs_per_question"]["executed"] <= report["macs_per_question"]["executed_p95"]


def test_kinds_share_a_front_of_which_each_command_takes_what_it_can(run: Run, folder: Path) -> None:
    starts = LengthSchedule.ratios([0.8, 0.3], scorer="cls"), Threshold([0, 0.005], scorer="cls")
    given = [word for one in starts for word in ("--start", one.to_json())]
    options = ("--scorers", "cls", "--keep-question", "no", "--rungs", "none", "--trials", 9, "--json")
    search = (*SEARCH, *options, "--budget-range", "0.2,0.99")
    report = json.loads(run(*search, "--policy", "threshold,lengths", *given).out)
    assert report["trials"]["all_questions"] == 9
    front = read_schedules("model/schedules.json")
    assert {type(entry.schedule) for entry in front.schedules} >= {LengthSchedule}
    again = json.loads(run(*search, "--policy", "lengths, threshold", "--start", "model/schedules.json").out)
    assert again == report
    # One of each, of which the text decides the better one.
    whole, better = ({**entry.to_dict(), "f1_interval": [0, 100]} for entry in front.schedules[:1] * 2)
    whole |= {"schedule": starts[0].to_dict(), "macs_fraction": 0.6, "f1": 50.0}
    better |= {"schedule": starts[1].to_dict(), "macs_fraction": 0.5, "f1": 60.0}
    fields = {**json.loads(front.to_json()), "schedules": [better, whole]}
    fields["full_model"] |= {"f1": 70.0, "f1_interval": [60, 80]}
    Path("model/schedules.json").write_text(json.dumps(fields))
    chosen = json.loads(run("evaluate", "squad.json", "--model", "model", "--budget", 0.7, "--json").out)
    assert chosen["schedule"] == starts[1].to_dict()
    assert run("export", "x.onnx", "--model", "model", "--budget", 0.7).status == 0
    assert json.loads(Path("x.onnx.json").read_text())["schedule"] == starts[0].to_dict()


def test_learnt_thresholds_are_tried_first_and_learnt_once(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[ThresholdLearning] = []
    options = ("--policy", "threshold", "--scorers", "cls", "--keep-question", "no", "--budget-range", "0,1")
    learns = (*SEARCH, *options, "--trials", 1, "--learn", "0.5", "--json")
    learn = learnt_thresholds.learn_thresholds

    def learn_little(*given: Any) -> Threshold:
        made.append(given[3])
        return learn(*given[:3], replace(given[3], steps=2))

    monkeypatch.setattr(learnt_thresholds, "learn_thresholds", learn_little)
    report = json.loads(run(*learns).out)
    (entry,) = report["front"]["schedules"]
    assert entry["schedule"]["kind"] == "threshold"
    assert [one.work_weight for one in made] == [0.5]
    assert json.loads(run(*learns).out) == report
    assert len(made) == 1
    status, _, err = run(*SEARCH, "--learn", "1")
    assert (status, "--learn says how thresholds are learnt: it needs --policy threshold" in err) == (2, True)


@pytest.mark.parametrize("where", ["full_model", "trial"])
def test_interrupted_search_says_how_to_go_on(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from dtbert.search import QuestionEvaluator

    scores = QuestionEvaluator.scores

    def interrupted(self: QuestionEvaluator, schedule: LengthSchedule | None, begin: int, end: int) -> list[Score]:
        if where == "full_model" or schedule is not None:
            raise KeyboardInterrupt
        return scores(self, schedule, begin, end)

    monkeypatch.setattr(QuestionEvaluator, "scores", interrupted)
    status, out, err = run(*SEARCH, "--scorers", "cls")
    assert (status, out) == (130, "")
    after = {"full_model": "", "trial": " after 0 trials"}[where]
    assert err.splitlines()[-1] == f"dtbert: interrupted{after}; the same command goes on from there"
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert run(*SEARCH, "--scorers", "cls").status == 0


def test_damaged_schedules_do_not_stop_the_search_that_makes_them_anew(run: Run, folder: Path) -> None:
    Path("model/schedules.json").write_text("{")
    question = ("answer", "--model", "model", "--question", "who wrote it?", "--context", CONTEXT)
    assert run(*question).status == 2
    assert run(*SEARCH, "--scorers", "cls").status == 0
    assert run(*question, "--budget", 1).status == 0


def test_train_then_search_then_answer_within_a_budget(run: Run, folder: Path) -> None:
    write_model(folder / "start", max_position_embeddings=384)
    questions = read_squad(write_questions(folder / "asked.json", 16))
    train = ("train", "--model", "start", "--train", "asked.json", "--out", "run", "--threads", 1, "--quiet")
    dropping = ("--length-drop", "--scorers", "cls", "--ratio-bound", "0.5")
    assert run(*train, *dropping, "--epochs", 35, "--learning-rate", 1e-2, "--batch-tokens", 2048).status == 0
    search = ("search", "asked.json", "--model", "run/last", "--out", "run/last/schedules.json", "--scorers", "cls")
    assert run(*search, "--trials", 8, "--budget-range", "0.5,0.9").status == 0
    chosen = read_schedules("run/last/schedules.json").within(0.9)
    assert chosen.schedule is not None
    assert chosen.f1 > 90
    right = 0
    for one in questions:
        asked = ("--question", one.question, "--context", one.context, "--budget", 0.9, "--json")
        right += json.loads(run("answer", "--model", "run/last", *asked).out)["answer"] == one.answers[0].text
    assert 100 * right / len(questions) == chosen.exact_match


def test_latency_can_be_the_objective(run: Run, folder: Path) -> None:
    done = run(*SEARCH, "--objective", "latency", "--limit", 4, "--threads", 1, "--trials", 2)
    assert done.status == 0
    header, *rows = done.out.split("\n\n")[1].splitlines()
    assert header.split()[:3] == ["MACs", "time", "F1"]
    assert rows[-1].split()[:2] == ["1.0000", "1.000"]
    for entry in read_schedules("model/schedules.json").schedules:
        assert entry.latency is not None
        assert entry.latency.seconds > 0
        assert (entry.latency.device, entry.latency.dtype, entry.latency.threads) == ("cpu", "float32", 1)


def test_batch_answers_within_a_budget(run: Run, folder: Path) -> None:
    run(*SEARCH, "--scorers", "cls")
    Path("in.jsonl").write_text(json.dumps({"question": "who wrote it?", "context": CONTEXT}) + "\n")
    many = ("answer", "--model", "model", "--input", "in.jsonl", "--output", "out.jsonl", "--budget", 0.95)
    assert run(*many).status == 0
    chosen = read_schedules("model/schedules.json").within(0.95).schedule
    expected = QuestionAnswerer.load("model")("who wrote it?", CONTEXT, schedule=chosen)
    assert json.loads(Path("out.jsonl").read_text())["answer"] == expected.text
    settings = json.loads(Path("out.jsonl.settings.json").read_text())
    assert settings["schedule"] == (None if chosen is None else chosen.to_dict())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--out", "no/such.json"), "--out no/such.json: there is no folder no"),
        (("--plot", "no/such.png"), "--plot no/such.png: there is no folder no"),
        (("--out", "model"), "--out model is a folder"),
        (("--out", "squad.json"), "--out squad.json is the input itself"),
        (("--out", "letter.txt"), "--out letter.txt: the ending must be .json"),
        (("--out", "model/config.json"), "--out model/config.json is a file of the model"),
        (("--out", "other.json"), "--out other.json is there already and holds no schedules"),
        (("--plot", "front.xyz"), "--plot front.xyz: the ending must be one of .png, .pdf"),
        (("--published", "points.json", "--plot", "f.png", "--out", "points.json"), "points.json is the input itself"),
        (("--start", "half"), "--start 'half'"),
        (("--published", "points.tsv"), "it needs --plot"),
        (("--scorers", "luck"), "unknown scorer 'luck'"),
        (("--budget-range", "0.9"), "0.2,0.9, got '0.9'"),
        (("--budget-range", "0.9,0.2"), "argument --budget-range: "),
        (("--rungs", "400,100"), "not [400, 100]"),
        (("--policy", "length"), "expected some of lengths, threshold, top-p, each once, got 'length'"),
        (("--policy", "threshold,threshold"), "each once, got 'threshold,threshold'"),
        (("--policy", "lengths,top-p", "--sampler", "nsga2"), "of several policies search with tpe"),
        (("--start", Threshold([0, 0.005], scorer="cls").to_json()), "a Threshold is no LengthSchedule, "),
        (("--rungs", "many"), "got 'many'"),
        (("--seed", "-1"), "--seed must be 0 or more, not -1"),
        (("--published", "nothing.tsv", "--plot", "front.png"), "nothing.tsv"),
        (("--margin", "-1"), "margin must"),
        (("--start", "100,50"), "absolute"),
        (("--start", "0.8,0.3", "--scorers", "cls,answer"), "'received' is not among cls, answer"),
        (("--start", "nothing.json"), "nothing.json"),
        (("--storage", "somewhere"), "somewhere"),
    ],
)
def test_search_says_what_is_wrong_in_one_line(
    run: Run, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    Path("points.json").touch()
    Path("other.json").write_text("[1]")
    status, out, err = run(*SEARCH, *arguments)
    assert (status, out) == (2, "")
    *notes, error = err.splitlines()
    assert message in error
    assert all(note.startswith("dtbert: the schedule names no scorer: ") for note in notes)
    assert not (folder / "model/schedules.json").exists()
    assert read_squad("squad.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "0.5"), "no schedules.json"),
        (("--budget", "1.5"), "budget must be above 0 and at most 1"),
        (("--budget", "half"), "such as 0.7, got 'half'"),
        (("--budget", "0.5", "--schedule", "1,0.5"), "--schedule and --budget"),
        (("--budget", "0.5", "--scorer", "cls"), "it needs --schedule"),
    ],
)
def test_budget_says_what_is_wrong_in_one_line(
    run: Run, folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    for command in (("evaluate", "squad.json"), ("answer", "--question", "who?", "--context", "the letter")):
        status, out, err = run(*command, "--model", "model", *arguments)
        assert (status, out) == (2, "")
        assert message in err
        assert err.count("\n") == 1


@pytest.mark.parametrize("missing", ["optuna", "matplotlib"])
def test_missing_extra_is_named(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    import sys

    import dtbert.search

    # What is imported anew here goes again, from the package, too: other tests mean the modules of before.
    monkeypatch.setattr(dtbert, "search", dtbert.search)
    for name in [name for name in sys.modules if name.split(".")[0] == missing or name.startswith("dtbert.search")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    status, _, err = run(*SEARCH, "--plot", "front.png")
    assert status == 2
    assert f"{missing}" in err
    assert "pip install 'dtbert[search]'" in err
    assert err.count("\n") == 1
