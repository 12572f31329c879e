"""Learning from a teacher: what the student takes over, and the gradient against formulas written out."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtbert.evaluation import SquadQuestion
from dtbert.qa import QuestionAnswerer
from dtbert.training import Distillation
from dtbert.training.backend import TrainingBackend
from dtbert.training.distillation import Teacher
from dtbert.training.step import SpanModel
from dtbert.weights import load_model
from tests.training.conftest import MakeTrainer, TrainTiny, metrics, write_model


def test_intermediate_distillation_comes_nearer_to_the_teacher_and_leaves_the_head(
    make_trainer: MakeTrainer, tmp_path: Path
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
    train_tiny: TrainTiny, questions: list[SquadQuestion], tmp_path: Path
) -> None:
    often = {"epochs": 25.0, "learning_rate": 1e-2, "batch_tokens": 2048}
    train_tiny("teacher", **often)
    teacher = tmp_path / "teacher" / "last"
    train_tiny("student", **{**often, "epochs": 40.0}, teacher=teacher, distillation=Distillation(temperature=2.0))
    pairs = [(one.question, one.context) for one in questions]
    shown, said = (
        [answer.text for answer in QuestionAnswerer.load(folder, window=40, stride=8).answer_many(pairs)]
        for folder in (teacher, tmp_path / "student" / "last")
    )
    assert sum(one == other for one, other in zip(shown, said, strict=True)) >= 45


@pytest.mark.parametrize("kind", ["intermediate", "prediction"])
def test_distillation_gradient_is_that_of_the_formula(make_trainer: MakeTrainer, tmp_path: Path, kind: Any) -> None:
    """In float64, with a teacher of other width, depth and heads, against a formula that goes window by window."""
    wider = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    teacher = load_model(write_model(tmp_path / "teacher", seed=5, **wider), backend="reference").double()
    trainer = make_trainer()
    shown = Teacher(teacher, Distillation(kind, 2.0, hard_label_weight=0.25), trainer.model.config)
    span_model = SpanModel(trainer.model, nn.Linear(32, 48) if kind == "intermediate" else None).double()
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
            other = SpanModel(teacher)(one, teacher_backend, keep_hidden_states=True)
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


def test_teacher_with_fewer_layers_is_refused(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    teacher = write_model(tmp_path / "teacher", num_hidden_layers=1)
    with pytest.raises(ValueError, match="teacher has 1 layers, the student 2"):
        make_trainer(teacher=teacher, distillation=Distillation())
