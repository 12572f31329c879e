"""The training loop: it learns, it resumes, and it stops where it must."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtbert.evaluation import SquadQuestion, evaluate
from dtbert.model import LengthSchedule
from dtbert.qa import QuestionAnswerer, load_tokenizer
from dtbert.training import Distillation, LengthDrop, TrainingOptions
from dtbert.training.backend import TrainingBackend
from dtbert.training.checkpoint import RunFolder
from dtbert.training.data import TrainingSet
from dtbert.training.distillation import Teacher
from dtbert.training.loop import Trainer, TrainingError, _label_loss
from dtbert.training.step import SpanModel, losses_of_step
from dtbert.weights import load_model, load_trainable
from tests.training.conftest import TrainTiny, write_model

DROPPING = LengthSchedule.ratios([0.6, 0.3])


def exact_match(folder: Path, questions: list[SquadQuestion], schedule: LengthSchedule | None = None) -> float:
    answerer = QuestionAnswerer.load(folder, window=40, stride=8)
    answers = answerer.answer_many(((one.question, one.context) for one in questions), schedule=schedule)
    return evaluate(
        questions, {one.id: answer.text for one, answer in zip(questions, answers, strict=True)}
    ).exact_match


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


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


@pytest.fixture
def make_trainer(model_folder: Path, questions: list[SquadQuestion], tmp_path: Path) -> Callable[..., Trainer]:
    """Makes a trainer that has not started."""

    def make(name: str = "run", *, teacher: Path | None = None, evaluate: Any = None, **options: Any) -> Trainer:
        model, tokenizer = load_trainable(model_folder), load_tokenizer(model_folder)
        chosen = TrainingOptions(**{"batch_tokens": 256, "epochs": 2.0, "save_every": 2, **options})
        data = TrainingSet.from_questions(questions, tokenizer, model.config, window=40, stride=8)
        folder = RunFolder(tmp_path / name, chosen.to_dict())
        shown = None
        if teacher is not None:
            assert chosen.distillation is not None
            shown = Teacher(load_model(teacher, backend="reference"), chosen.distillation, model.config)
        return Trainer(model, data, chosen, folder, model_folder, evaluate, shown)

    return make


def test_steps_have_the_planned_learning_rate_and_clipped_gradients(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(learning_rate=1e-3, warmup=0.3, max_grad_norm=1e-3)
    rates, norms = [], []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [one.grad for group in optimizer.param_groups for one in group["params"]]
        rates.append([group["lr"] for group in optimizer.param_groups])
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    trainer._optimizer.register_step_pre_hook(look)
    trainer.run()
    planned = [trainer.options.learning_rate_at(step, trainer.num_steps) for step in range(trainer.num_steps)]
    assert rates == [[rate, rate] for rate in planned]
    assert 0 < planned[0] < 5e-4 < 8e-4 < max(planned) <= 1e-3
    assert planned[-1] < 3e-4
    # Without clipping they would be some thousand times that.
    assert norms == [pytest.approx(1e-3, rel=1e-3)] * trainer.num_steps


@pytest.mark.parametrize("where", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_used(train_tiny: TrainTiny, tmp_path: Path, where: str) -> None:
    for name, chance in (("without", 0.0), ("with", 0.3)):
        train_tiny(name, epochs=0.2, **{where: chance})
    without, dropped = (metrics(tmp_path / name)[0]["loss"] for name in ("without", "with"))
    assert dropped != pytest.approx(without, rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"length_drop": LengthDrop(2, (0.3, 0.5), 0.4, ("received", "answer+question"), answer_loss=0.5)},
        {"distillation": Distillation("intermediate"), "teacher": True},
    ],
    ids=["length drop", "teacher with a projection"],
)
def test_resumed_run_ends_as_an_unbroken_one(
    make_trainer: Callable[..., Trainer], tmp_path: Path, options: dict[str, Any]
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
    assert ("projection.weight" in whole) == ("teacher" in options)
    without_time = [[{**one, "seconds": 0} for one in metrics(tmp_path / name)] for name in ("whole", "broken")]
    assert without_time[0] == without_time[1]
    assert [one["step"] for one in without_time[0]] == list(range(1, again.num_steps + 1))


def test_run_that_has_ended_does_nothing_when_started_again(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    assert make_trainer(epochs=1.0).run()
    before = {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()}
    assert not make_trainer(epochs=1.0).run()
    assert {file: file.read_bytes() for file in (tmp_path / "run").rglob("*") if file.is_file()} == before


def test_folder_of_another_run_is_refused(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    first = make_trainer()
    with pytest.raises(OSError, match="another process trains in"):
        make_trainer()
    del first
    with pytest.raises(ValueError, match=r"holds another run .seed was 0, is 1.: name another folder"):
        make_trainer(seed=1)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not a training run's"):
        make_trainer("other")
    assert sorted(file.name for file in (tmp_path / "other").iterdir()) == ["thesis.txt"]


def test_damaged_checkpoint_is_named(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    make_trainer().run()
    state = tmp_path / "run" / "checkpoint.pt"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"checkpoint.pt is damaged .*: remove it to start the run again"):
        make_trainer()


@pytest.mark.parametrize("failing", ["torch.save", "dtbert.weights.save.save_file"])
def test_full_disk_is_an_error_and_the_old_files_stay(
    make_trainer: Callable[..., Trainer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    with pytest.raises(KeyboardInterrupt):
        make_trainer(evaluate=lambda: {"main": 1.0, "f1": 1.0}, eval_every=2).run(stop_after(2))
    folder = tmp_path / "run"
    before = [(folder / name).read_bytes() for name in ("checkpoint.pt", "best/model.safetensors")]

    def write_some(_: object, file: Path, *__: object) -> None:
        file.write_bytes(b"some")
        raise RuntimeError("[enforce fail] file write failed\nframe #0: ...")

    # Where the checkpoint fails, no better model is written before it.
    better = 1.0 if failing == "torch.save" else 2.0
    with monkeypatch.context() as patch:
        patch.setattr(failing, write_some)
        with pytest.raises(OSError, match=r"cannot write .* file write failed; what was saved before is still there"):
            make_trainer(evaluate=lambda: {"main": better, "f1": 1.0}, eval_every=2).run()
    assert [(folder / name).read_bytes() for name in ("checkpoint.pt", "best/model.safetensors")] == before
    assert not list(folder.rglob("*.partial"))
    assert make_trainer(evaluate=lambda: {"main": 2.0, "f1": 2.0}, eval_every=2).run()


def test_nan_stops_with_step_and_questions_and_the_checkpoint_stays(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    options = {"learning_rate": 1e30, "warmup": 0.0, "save_every": 1}
    trainer = make_trainer(**options)
    with pytest.raises(
        TrainingError, match=r"step 2: the loss is .*lower learning rate. Questions: q\d+, q\d+"
    ) as stop:
        trainer.run()
    named = str(stop.value).rpartition("Questions: ")[2].split(", ")
    second = trainer.data.batches(256, 0, 0)[1]
    assert set(named) == {trainer.data.ids[trainer.data.parts[index].row] for index in second}
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 1
    assert len(metrics(tmp_path / "run")) == 1


def test_best_is_the_first_model_of_the_highest_value(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
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
    make_trainer: Callable[..., Trainer], tmp_path: Path, epochs: float, evaluated: list[int]
) -> None:
    make_trainer(evaluate=lambda: {"main": 1.0, "f1": 1.0}, epochs=epochs).run()
    assert [record["step"] for record in metrics(tmp_path / "run") if "f1" in record] == evaluated


def test_learning_rate_rises_then_falls_to_zero_after_the_end() -> None:
    options = TrainingOptions(learning_rate=1.0, warmup=0.25)
    rates = [options.learning_rate_at(step, 40) for step in range(41)]
    assert max(rates) == rates[10] == 1
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] > 0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[40] == 0
    assert rates[25] == pytest.approx(0.5)


def test_decay_is_for_matrices_alone(make_trainer: Callable[..., Trainer]) -> None:
    trainer = make_trainer(weight_decay=0.5)
    decayed = {id(one) for group in trainer._optimizer.param_groups if group["weight_decay"] for one in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        assert (id(parameter) in decayed) == (not name.endswith("bias") and "norm" not in name), name


def test_every_option_of_a_run_is_checked() -> None:
    for name, value in [
        ("epochs", 0.0), ("batch_tokens", 0), ("learning_rate", -1.0), ("learning_rate", math.nan), ("warmup", 1.0),
        ("hidden_dropout", 1.0), ("attention_dropout", -0.1), ("weight_decay", math.nan), ("max_grad_norm", 0.0),
        ("save_every", 0), ("eval_every", -1), ("seed", -1), ("epochs", math.inf),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} must be .*, not {value}"):
            TrainingOptions(**{name: value})
    for name, value in [("temperature", 0.0), ("hard_label_weight", -1.0)]:
        with pytest.raises(ValueError, match=f"^{name} must be .*, not {value}"):
            Distillation(**{name: value})


def test_window_that_does_not_fit_a_step_is_refused(make_trainer: Callable[..., Trainer]) -> None:
    with pytest.raises(ValueError, match="a window has 22 tokens, a step 16: give larger batches"):
        make_trainer(batch_tokens=16)


def test_full_pass_never_leaves_out_a_layer_and_sub_models_do(
    make_trainer: Callable[..., Trainer], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    forward = SpanModel.forward

    def watch(self: SpanModel, labelled: Any, backend: Any, sub_model: Any = None, **options: Any) -> Any:
        seen.append(None if sub_model is None else len(sub_model.skip_layers))
        return forward(self, labelled, backend, sub_model, **options)

    monkeypatch.setattr(SpanModel, "forward", watch)
    make_trainer(length_drop=LengthDrop(1, 0.2, 0.7)).run()
    assert seen[0::3] == [None] * 8
    assert sum(seen[1::3]) > 0
    assert seen[2::3] == [0] * 8


def test_bf16_trains_float32_weights_like_float32(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "learning_rate": 1e-3}
    for name, bf16 in (("wide", False), ("narrow", True)):
        make_trainer(name, **options, bf16=bf16).run()
    wide, narrow = ([record["loss"] for record in metrics(tmp_path / name)] for name in ("wide", "narrow"))
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=0.02)
    assert {value.dtype for value in weights(tmp_path / "narrow").values()} == {torch.float32}


def test_intermediate_distillation_comes_nearer_to_the_teacher_and_leaves_the_head(
    make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    teacher = write_model(tmp_path / "teacher", seed=5, num_hidden_layers=4, num_attention_heads=4)
    options = {"epochs": 20.0, "learning_rate": 3e-3, "batch_tokens": 2048}
    trainer = make_trainer(teacher=teacher, distillation=Distillation("intermediate", attention="scores"), **options)
    head = trainer.model.span.weight.clone()
    trainer.run()
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]
    assert torch.equal(trainer.model.span.weight, head)


def test_prediction_distillation_brings_the_teachers_answers(
    train_tiny: TrainTiny, make_trainer: Callable[..., Trainer], tmp_path: Path
) -> None:
    often = {"epochs": 25.0, "learning_rate": 1e-2, "batch_tokens": 2048}
    train_tiny("teacher", **often)
    options = {
        **often,
        "epochs": 40.0,
        "distillation": Distillation(temperature=2.0),
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
    }
    trainer = make_trainer(teacher=tmp_path / "teacher" / "last", **options)
    labelled = trainer.data.collate(range(50), torch.device("cpu"))
    assert trainer._teacher is not None
    shown = trainer._teacher.show(labelled).logits
    trainer.run()
    with torch.no_grad():
        said = SpanModel(trainer.model)(labelled, TrainingBackend()).logits
    seqlens = list(labelled.batch.packing.seqlens)
    agreeing = [a.argmax() == b.argmax() for x, y in zip(said, shown, strict=True)
                for a, b in zip(x.split(seqlens), y.split(seqlens), strict=True)]  # fmt: skip
    assert sum(agreeing) / len(agreeing) > 0.9


@pytest.mark.parametrize("kind", ["intermediate", "prediction"])
def test_distillation_gradient_is_that_of_the_formula(
    make_trainer: Callable[..., Trainer], tmp_path: Path, kind: Any
) -> None:
    """In float64, with a teacher of other width, depth and heads, against a formula that goes window by window."""
    wider = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    teacher = write_model(tmp_path / "teacher", seed=5, **wider)
    trainer = make_trainer(teacher=teacher, distillation=Distillation(kind, 2.0, hard_label_weight=0.25))
    span_model, shown = trainer._span_model.double(), trainer._teacher
    assert shown is not None
    shown._model.double()
    labelled = trainer.data.collate([0, 3, 5], torch.device("cpu"))
    backend = TrainingBackend(keep=shown.distillation.keep)
    keep = {"keep_hidden_states": kind == "intermediate"}
    shown.loss(span_model(labelled, backend, **keep), labelled).backward()
    got = {name: value.grad for name, value in span_model.named_parameters()}
    span_model.zero_grad()

    total = torch.zeros((), dtype=torch.float64)
    for index in (0, 3, 5):
        one = trainer.data.collate([index], torch.device("cpu"))
        student_backend, teacher_backend = (TrainingBackend(keep="probabilities") for _ in range(2))
        student = span_model(one, student_backend, keep_hidden_states=True)
        with torch.no_grad():
            other = shown._model(one, teacher_backend, keep_hidden_states=True)
        for values, wanted, label in zip(student.logits, other.logits, (one.starts, one.ends), strict=True):
            log = values - values.exp().sum().log()
            total = total - 0.25 * log[label[0]] / 2
            if kind == "prediction":
                p = (wanted / 2).exp() / (wanted / 2).exp().sum()
                total = total - (p * ((values / 2) - (values / 2).exp().sum().log())).sum() / 2
        if kind == "intermediate":
            for layer in range(3):
                total = total + ((student.hidden_states[layer] - other.hidden_states[2 * layer]) ** 2).mean()
            for layer in (1, 2):
                own, theirs = student_backend.kept[layer - 1][0][0], teacher_backend.kept[2 * layer - 1][0][0]
                total = total + ((own.mean(0) - theirs.mean(0)) ** 2).mean()
    total.backward()
    for name, value in span_model.named_parameters():
        torch.testing.assert_close(
            got[name], value.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradient_of_the_answer_loss_is_that_of_the_formula(make_trainer: Callable[..., Trainer]) -> None:
    """In float64: what the head makes of the embeddings and of the first layer, against the full model's answer."""
    trainer = make_trainer(length_drop=LengthDrop(0, answer_loss=0.25))
    span_model = trainer._span_model.double()
    indices, head = (0, 3, 5), trainer.model.span
    labelled = trainer.data.collate(indices, torch.device("cpu"))
    # Always the cross-entropy, whatever the sub-models learn by.
    next(losses_of_step(span_model, labelled, TrainingBackend(), [], _label_loss, "kl", answer_loss=0.25)).backward()
    got = {name: value.grad for name, value in span_model.named_parameters()}
    span_model.zero_grad()

    total = torch.zeros((), dtype=torch.float64)
    for index in indices:
        one = trainer.data.collate([index], torch.device("cpu"))
        full = span_model(one, TrainingBackend(), keep_hidden_states=True)
        for column, (values, label) in enumerate(zip(full.logits, (one.starts, one.ends), strict=True)):
            total = total - values.log_softmax(0)[label[0]] / 2
            for states in full.hidden_states[:2]:
                said = states @ head.weight[column] + head.bias[column]
                total = total - 0.25 * (values.detach().softmax(0) * said.log_softmax(0)).sum() / 4
    total.backward()
    for name, value in span_model.named_parameters():
        torch.testing.assert_close(got[name], value.grad, rtol=1e-9, atol=1e-12)


def test_teacher_with_fewer_layers_is_refused(make_trainer: Callable[..., Trainer], tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", num_hidden_layers=1)
    with pytest.raises(ValueError, match="the teacher has 1 layers, the student 2: it needs at least as many"):
        make_trainer(teacher=teacher, distillation=Distillation())
