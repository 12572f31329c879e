"""`dtbert train`: a whole run, and everything that can be wrong with its input."""

import json
from pathlib import Path
from typing import Any

import pytest

from dtbert import LengthSchedule
from tests.cli.conftest import WORDS, Run
from tests.training.conftest import write_model

SMALL = ("--window", 24, "--stride", 2, "--batch-tokens", 64, "--epochs", 1)


def write(file: Path, *questions: dict[str, Any]) -> Path:
    paragraphs = [{"context": one.pop("context"), "qas": [one]} for one in questions]
    file.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": paragraphs}]}), "utf-8")
    return file


def question(
    identifier: str, context: str = "ada wrote the letter in paris .", answer: str = "ada", at: int = 0
) -> Any:
    answers = [{"text": answer, "answer_start": at}]
    return {"id": identifier, "question": "who wrote it ?", "context": context, "answers": answers}


# Where the answer stands only once, its place is certain, whatever the file says.
TWICE = "ada wrote the letter to ada ."


@pytest.fixture
def train(tmp_path: Path) -> Path:
    return write(tmp_path / "train.json", *(question(f"t{index}") for index in range(8)))


@pytest.fixture
def dev(tmp_path: Path) -> Path:
    return write(tmp_path / "dev.json", question("d0"), question("d1", "said zoe .", "zoe", 5))


def test_train_makes_models_that_the_other_commands_read(
    run: Run, model_folder: Path, train: Path, dev: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    command = ("train", "--model", model_folder, "--train", train, "--dev", dev, "--out", out, *SMALL,
               "--length-drop", "--num-sandwich", 0, "--scorers", "cls+question",
               "--eval-schedule", "0.8,0.5")  # fmt: skip
    first = run(*command)
    assert first.status == 0, first.err
    assert "trained 2 steps; models in" in first.out
    assert "f1 0.8 0.5 cls +question" in first.out
    assert "step 2: f1 " in first.err
    again = run(*command, "--json")
    assert again.status == 0
    record = json.loads(again.out)
    assert record == json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    assert record["step"] == 2
    assert record["main"] == pytest.approx((record["f1"] + record["f1 0.8 0.5 cls +question"]) / 2)
    evaluated = run("evaluate", dev, "--model", out / "best", "--json")
    assert json.loads(evaluated.out)["f1"] == pytest.approx(record["f1"])
    # The model drops by what it learnt by.
    dropping = json.loads(run("evaluate", dev, "--model", out / "best", "--json", "--schedule", "0.8,0.5").out)
    assert (dropping["schedule"]["scorer"], dropping["schedule"]["keep_question"]) == ("cls", True)
    assert dropping["f1"] == pytest.approx(record["f1 0.8 0.5 cls +question"])
    other = run(*command, "--seed", 1)
    assert other.status == 2
    assert "seed was 0, is 1" in other.err


def test_train_starts_from_the_shipped_model_where_none_is_named(
    run: Run, train: Path, dev: Path, tmp_path: Path
) -> None:
    done = run("train", "--train", train, "--dev", dev, "--out", tmp_path / "run", "--eval-schedule", "1,0.5")
    assert (done.status, done.err) == (
        2,
        "dtbert: error: the schedule has 2 entries, the model 6 layers: they must match\n",
    )


def test_train_starts_from_a_bare_encoder(run: Run, train: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = write_model(tmp_path / "bare", words=WORDS.split())
    tensors = load_file(source / "model.safetensors")
    save_file(
        {name: value for name, value in tensors.items() if "qa_outputs" not in name}, source / "model.safetensors"
    )
    done = run("train", "--model", source, "--train", train, "--out", tmp_path / "run", *SMALL)
    assert done.status == 0, done.err
    assert "qa_outputs.weight" in load_file(tmp_path / "run" / "last" / "model.safetensors")


def test_train_lists_answers_out_of_place_and_strict_stops(run: Run, model_folder: Path, tmp_path: Path) -> None:
    file = write(
        tmp_path / "train.json", question("good"), *(question(f"bad{index}", TWICE, at=3) for index in range(22))
    )
    command = ("train", "--model", model_folder, "--train", file, *SMALL)
    lenient = run(*command, "--out", tmp_path / "run")
    assert lenient.status == 0
    assert "dtbert: 22 questions are left out" in lenient.err
    assert "dtbert:   bad0: the context does not have 'ada'" in lenient.err
    assert "dtbert:   and 2 more" in lenient.err
    strict = run(*command, "--out", tmp_path / "strict", "--strict")
    assert strict.status == 2
    assert "22 questions cannot be trained on, such as bad0: " in strict.err
    assert not (tmp_path / "strict").exists()


def test_train_reads_all_its_files_even_one_whose_answers_are_all_out_of_place(
    run: Run, model_folder: Path, train: Path, dev: Path, tmp_path: Path
) -> None:
    bad = write(tmp_path / "bad.json", question("bad", TWICE, at=3))
    command = ("train", "--model", model_folder, "--out", tmp_path / "run", *SMALL)
    refused = run(*command, "--train", bad)
    assert refused.status == 2
    assert "none of 1 questions can be trained on: bad: " in refused.err
    done = run(*command, "--train", bad, "--train", train, "--dev", dev)
    assert done.status == 0, done.err
    assert "dtbert: 1 questions are left out" in done.err
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text("utf-8").splitlines()[0])
    assert first["tokens"] > 40


def test_train_measures_dev_by_texts_wherever_they_stand(
    run: Run, model_folder: Path, train: Path, tmp_path: Path
) -> None:
    dev = write(tmp_path / "dev.json", question("d0"), question("elsewhere", at=3))
    command = ("train", "--model", model_folder, "--train", train, "--dev", dev, *SMALL)
    done = run(*command, "--out", tmp_path / "run", "--strict")
    assert done.status == 0, done.err
    assert "questions" not in done.err


def test_train_goes_on_only_from_the_same_weights_and_schedules(
    run: Run, train: Path, dev: Path, tmp_path: Path
) -> None:
    model, schedule = write_model(tmp_path / "model", words=WORDS), tmp_path / "schedule.json"
    schedule.write_text(LengthSchedule.ratios([0.8, 0.5]).to_json())
    command = ("train", "--model", model, "--train", train, "--dev", dev, "--eval-schedule", schedule,
               "--out", tmp_path / "run", *SMALL)  # fmt: skip
    assert run(*command).status == 0
    assert "nothing to do" in run(*command).out
    schedule.write_text(LengthSchedule.ratios([0.8, 0.4]).to_json())
    assert "(eval_schedule was" in run(*command).err
    schedule.write_text(LengthSchedule.ratios([0.8, 0.5]).to_json())
    other = write_model(tmp_path / "other", seed=1, words=WORDS)
    (other / "model.safetensors").replace(model / "model.safetensors")
    assert "(model_sha256 was" in run(*command).err


def test_train_counts_dev_questions_that_cannot_be_read_as_wrong(
    run: Run, model_folder: Path, train: Path, tmp_path: Path
) -> None:
    dev = write(tmp_path / "dev.json", question("d0"), {**question("d1"), "question": " "})
    done = run("train", "--model", model_folder, "--train", train, "--dev", dev, "--out", tmp_path / "run", *SMALL)
    assert done.status == 0, done.err
    assert "dtbert: 1 questions of --dev count as wrong" in done.err
    assert "d1: the question is blank" in done.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "'data', found a list"),
        ('{"data": []}', "no questions"),
        ("no JSON", "not JSON"),
    ],
)
def test_train_refuses_files_that_are_not_squad(
    run: Run, model_folder: Path, tmp_path: Path, content: str, message: str
) -> None:
    file = tmp_path / "train.json"
    file.write_text(content)
    done = run("train", "--model", model_folder, "--train", file, "--out", tmp_path / "run")
    assert (done.status, done.out) == (2, "")
    assert done.err.startswith(f"dtbert: error: {file}")
    assert message in done.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--num-sandwich", 3), "--num-sandwich needs --length-drop"),
        (("--scorers", "cls"), "--scorers needs --length-drop"),
        (("--length-drop", "--scorers", "best"), "unknown scorer 'best'"),
        (("--length-drop", "--ratio-bound", 1), "ratio_bound must be above 0 and below 1, not 1.0"),
        (("--length-drop", "--ratio-bound", "much"), "--ratio-bound must be a number"),
        (("--length-drop", "--ratio-bound", "0.1,0.2,0.3"), "3 ratio_bounds for 2 layers"),
        (("--length-drop", "--answer-loss", "inf"), "answer_loss must be at least 0, not inf"),
        (("--answer-loss", 1), "--answer-loss needs --length-drop"),
        (("--distill", "prediction"), "--distill needs --teacher"),
        (("--teacher", "x", "--match-attention", "scores"), "--match-attention has no part in --distill prediction"),
        (("--teacher", "x", "--distill", "intermediate", "--temperature", 2), "--temperature has no part in"),
        (("--teacher", "x", "--temperature", 0), "temperature must be above 0, not 0.0"),
        (("--eval-every", 5), "--eval-every needs --dev"),
        (("--eval-schedule", "1,1"), "--eval-schedule needs --dev"),
        (("--dev", "x", "--eval-schedule", "half"), "--eval-schedule 'half'"),
        (("--learning-rate", 0), "learning_rate must be above 0, not 0.0"),
        (("--epochs", "nan"), "epochs must be above 0, not nan"),
        (("--save-every", 0), "argument --save-every: expected a whole number of at least 1, got '0'"),
        (("--window", 4), "at least 5 tokens, not 4"),
        (("--window", 600), "a window of 600 tokens is longer than the model's 512"),
        (("--batch-tokens", 8), "14 tokens, a step 8"),
        (("--device", "cuda:99"), "device 'cuda:99'"),
        (("--model", "/nowhere/to/be/found"), "/nowhere/to/be/found"),
    ],
)
def test_train_refuses_options_before_it_starts(
    run: Run, model_folder: Path, train: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    done = run("train", "--model", model_folder, "--train", train, "--out", tmp_path / "run", *options)
    assert (done.status, done.out) == (2, "")
    assert message in done.err
    # Nothing is left behind that another try would have to be named after.
    assert not (tmp_path / "run").exists()


def test_train_refuses_questions_that_are_held_out_or_given_twice(
    run: Run, model_folder: Path, train: Path, tmp_path: Path
) -> None:
    command = ("train", "--model", model_folder, "--out", tmp_path / "run", "--train", train)
    held_out = run(*command, "--dev", train)
    assert "8 questions are in --train and in --dev, such as 't0'" in held_out.err
    twice = run(*command, train)
    assert "the question 't0' is in a file before it" in twice.err
    assert (held_out.status, twice.status) == (2, 2)


def test_train_refuses_a_schedule_of_another_depth(
    run: Run, model_folder: Path, train: Path, dev: Path, tmp_path: Path
) -> None:
    done = run("train", "--model", model_folder, "--train", train, "--dev", dev, "--out", tmp_path / "run",
               "--eval-schedule", "1,1,0.5")  # fmt: skip
    assert done.status == 2
    assert "3 entries, the model 2 layers" in done.err


def test_train_refuses_a_teacher_with_another_vocabulary_or_fewer_positions(
    run: Run, model_folder: Path, train: Path, tmp_path: Path
) -> None:
    words = WORDS.split()
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    other = write_model(tmp_path / "other", words=words)
    command = ("train", "--model", model_folder, "--train", train, "--out", tmp_path / "run", "--teacher", other)
    done = run(*command)
    assert done.status == 2
    assert "the teacher's vocabulary" in done.err
    (other / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    short = run(*command)
    assert short.status == 2
    assert "64 positions, a window 384 tokens" in short.err
    assert run(*command, *SMALL).status == 0
