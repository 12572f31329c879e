"""The training loop: it learns, it resumes, and it stops where it must."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dtbert.evaluation import SquadQuestion, evaluate
from dtbert.model import LengthSchedule
from dtbert.qa import QuestionAnswerer
from dtbert.training import Distillation, LengthDrop
from dtbert.training.loop import TrainingError
from dtbert.weights import load_trainable
from tests.full_disk import largest_file
from tests.training.conftest import MakeTrainer, TrainTiny, metrics, weights, write_model

DROPPING = LengthSchedule.ratios([0.6, 0.3])


def exact_match(folder: Path, questions: list[SquadQuestion], schedule: LengthSchedule | None = None) -> float:
    answerer = QuestionAnswerer.load(folder, window=40, stride=8)
    answers = answerer.answer_many(((one.question, one.context) for one in questions), schedule=schedule)
    return evaluate(
        questions, {one.id: answer.text for one, answer in zip(questions, answers, strict=True)}
    ).exact_match


def test_training_overfits_fifty_questions_and_length_drop_keeps_them_where_tokens_are_dropped(
    train_tiny: TrainTiny, questions: list[SquadQuestion], tmp_path: Path
) -> None:
    often = {"epochs": 35.0, "learning_rate": 1e-2, "batch_tokens": 2048, "save_every": 1000}
    train_tiny("plain", **often)
    losses = [record["loss"] for record in metrics(tmp_path / "plain")]
    assert losses[0] > 2
    assert losses[-1] < 0.05
    assert exact_match(tmp_path / "plain" / "last", questions) == 100
    train_tiny("dropping", **often, length_drop=LengthDrop(0, 0.5))
    assert exact_match(tmp_path / "dropping" / "last", questions) == 100
    plain, dropping = (exact_match(tmp_path / name / "last", questions, DROPPING) for name in ("plain", "dropping"))
    assert dropping > plain + 20


def stop_after(steps: int) -> Callable[[dict[str, Any]], None]:
    def report(record: dict[str, Any]) -> None:
        if record["step"] == steps:
            raise KeyboardInterrupt

    return report


@pytest.mark.parametrize(
    "options",
    [
        {"length_drop": LengthDrop(2, (0.3, 0.5), 0.4, ("received", "answer+question"), answer_loss=0.5)},
        {"distillation": Distillation("intermediate"), "teacher": True},
        {
            "distillation": Distillation(hard_label_weight=1.0),
            "teacher": True,
            "length_drop": LengthDrop(1, 0.3, answer_loss=0.5),
        },
    ],
    ids=["length drop", "teacher with a projection", "length drop with a teacher"],
)
def test_resumed_run_ends_as_an_unbroken_one(
    make_trainer: MakeTrainer, tmp_path: Path, options: dict[str, Any]
) -> None:
    if options.pop("teacher", False):
        options["teacher"] = write_model(tmp_path / "teacher", hidden_size=48, num_hidden_layers=4)
    options["batch_tokens"] = 512
    make_trainer("whole", **options).run()
    with pytest.raises(KeyboardInterrupt):
        # Between two checkpoints: step 3 is taken again.
        make_trainer("broken", **options).run(stop_after(3))
    assert len(metrics(tmp_path / "broken")) == 3
    (tmp_path / "broken" / "metrics.jsonl").open("a").write('{"step": 4, "lo')
    again = make_trainer("broken", **options)
    assert again.step == 2
    assert again.run()
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert [name for name in whole if not torch.equal(whole[name], broken[name])] == []
    intermediate = options.get("distillation") == Distillation("intermediate")
    assert ("projection.weight" in whole) == intermediate
    without_time = [[{**one, "seconds": 0} for one in metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert without_time[0] == without_time[1]
    assert [one["step"] for one in without_time[0]] == list(range(1, again.num_steps + 1))


def test_run_that_has_ended_does_nothing_when_started_again(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    assert make_trainer(epochs=1.0).run()
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert not make_trainer(epochs=1.0).run()
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_folder_of_another_run_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    first = make_trainer()
    with pytest.raises(OSError, match="another process"):
        make_trainer()
    del first
    with pytest.raises(ValueError, match="seed was 0, is 1"):
        make_trainer(seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"other .*name a new or empty folder"):
        make_trainer("other")
    assert sorted(file.name for file in (tmp_path / "other").iterdir()) == ["thesis.txt"]


def test_lock_that_is_a_link_is_not_followed(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (tmp_path / "precious").write_text("precious")
    (folder / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(FileExistsError, match=r"\.lock is a link: remove it"):
        make_trainer(folder)
    assert (tmp_path / "precious").read_text() == "precious"


def test_damaged_checkpoint_is_named(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    make_trainer().run()
    state = tmp_path / "run" / "checkpoint.pt"
    whole = state.read_bytes()
    for damaged in (whole[:1000], pickle.dumps(Path("code of its own"), 2), b"Not found"):
        state.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"checkpoint\.pt is damaged .*remove it") as caught:
            make_trainer()
        assert "weights_only" not in str(caught.value)


@pytest.mark.parametrize(("failing", "better"), [(r"checkpoint\.pt", 1.0), (r"best/model\.safetensors", 2.0)])
def test_full_disk_is_an_error_and_the_old_files_stay(
    make_trainer: MakeTrainer, tmp_path: Path, failing: str, better: float
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_trainer(evaluate=lambda: {"main": 1.0, "f1": 1.0}, eval_every=2).run(stop_after(2))
    folder = tmp_path / "run"
    before = [(folder / name).read_bytes() for name in ("checkpoint.pt", "best/model.safetensors")]

    # A better model is written before the checkpoint.
    with largest_file(10_000), pytest.raises(OSError, match=f"cannot write .*{failing}: .* still there"):
        make_trainer(evaluate=lambda: {"main": better, "f1": 1.0}, eval_every=2).run()
    assert [(folder / name).read_bytes() for name in ("checkpoint.pt", "best/model.safetensors")] == before
    assert not list(folder.rglob("*.partial"))
    assert make_trainer(evaluate=lambda: {"main": 2.0, "f1": 2.0}, eval_every=2).run()


def test_nan_stops_with_step_and_questions_and_the_checkpoint_stays(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    options = {"learning_rate": 1e30, "warmup": 0.0, "save_every": 1}
    trainer = make_trainer(**options)
    with pytest.raises(TrainingError, match=r"step 2: .*lower learning rate.* Questions: q\d+, q\d+") as stop:
        trainer.run()
    named = str(stop.value).rpartition("Questions: ")[2].split(", ")
    second = trainer.data.batches(256, 0, 0)[1]
    assert set(named) == {trainer.data.ids[trainer.data.parts[index].row] for index in second}
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1
    assert len(metrics(tmp_path / "run")) == 1


def test_best_is_the_first_model_of_the_highest_value(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    values, saved = iter([1.0, 3.0, 3.0, 2.0]), []

    def measure() -> dict[str, float]:
        saved.append({name: value.clone() for name, value in trainer.model.state_dict().items()})
        return {"main": next(values), "f1": 0.0}

    trainer = make_trainer(evaluate=measure, eval_every=2)
    assert trainer.num_steps == 8
    trainer.run()
    assert [record.get("main") for record in metrics(tmp_path / "run")] == [None, 1, None, 3, None, 3, None, 2]
    best = load_trainable(tmp_path / "run" / "best").state_dict()
    assert [name for name, value in best.items() if not torch.equal(value, saved[1][name])] == []


@pytest.mark.parametrize(("epochs", "evaluated"), [(0.5, [2]), (1.0, [4]), (1.6, [4, 6]), (2.0, [4, 8])])
def test_evaluation_is_at_the_end_of_each_epoch_whole_or_not(
    make_trainer: MakeTrainer, tmp_path: Path, epochs: float, evaluated: list[int]
) -> None:
    make_trainer(evaluate=lambda: {"main": 1.0, "f1": 1.0}, epochs=epochs).run()
    assert [record["step"] for record in metrics(tmp_path / "run") if "f1" in record] == evaluated
