"""Learning from a teacher: what the student takes over, and the gradient against formulas written out."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtbert import TextClassifier
from dtbert.evaluation import SquadQuestion
from dtbert.qa import QuestionAnswerer, load_tokenizer
from dtbert.text import TextReader, TextTokens
from dtbert.training import Distillation, LengthDrop, TrainingOptions
from dtbert.training.backend import TrainingBackend
from dtbert.training.checkpoint import RunFolder
from dtbert.training.distillation import SpanTeacher, TextTeacher
from dtbert.training.loop import Trainer
from dtbert.training.step import SpanModel
from dtbert.training.texts import ClassifierModel, TextTrainingSet
from dtbert.weights import load_classifier, load_model, load_trainable_classifier, save_model
from tests.text.conftest import LABELS, write_classifier
from tests.training.conftest import MakeTrainer, TrainTiny, metrics, write_model
from tests.training.test_texts import made_up


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
    shown = SpanTeacher(teacher, Distillation(kind, 2.0, hard_label_weight=0.25), trainer.model.config)
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


TEXTS = [one.text for one in made_up(48).examples]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A student, and a teacher of other sizes, sure of one label or another, which it has in another order."""
    there = tmp_path_factory.mktemp("classifiers")
    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4}
    drawn = write_classifier(there / "drawn", LABELS[::-1], **sizes)
    teacher, reader = load_classifier(drawn, backend="reference"), TextClassifier.load(drawn)
    logits = reader.logits([one for one in reader.reader.read(TEXTS) if isinstance(one, TextTokens)])
    scale = 4 / logits.std(0)
    teacher.classifier.weight *= scale[:, None]
    teacher.classifier.bias.copy_((teacher.classifier.bias - logits.mean(0)) * scale)
    save_model(teacher, there / "teacher")
    shutil.copy(drawn / "vocab.txt", there / "teacher")
    return write_classifier(there / "student", initializer_range=0.1), there / "teacher"


def text_trainer(
    folder: Path, classifiers: tuple[Path, Path], distillation: Distillation, **options: Any
) -> tuple[Trainer, TextTeacher]:
    student, source = classifiers
    model = load_trainable_classifier(student, LABELS)
    reader = TextReader(load_tokenizer(student), model.config)
    data = TextTrainingSet.from_texts(made_up(48), reader, LABELS[::2])
    teacher = TextTeacher(load_classifier(source, backend="reference"), distillation, model)
    plain = {"batch_tokens": 1024, "hidden_dropout": 0.0, "attention_dropout": 0.0, "learning_rate": 3e-3}
    chosen = TrainingOptions(**{**plain, "epochs": 10.0, **options}, distillation=distillation)
    return Trainer(model, data, chosen, RunFolder(folder, chosen.to_dict()), student, None, teacher), teacher


def test_a_classifier_learns_its_teachers_labels_whatever_their_order(
    classifiers: tuple[Path, Path], tmp_path: Path
) -> None:
    often = {"epochs": 25.0, "learning_rate": 1e-2}
    trainer, _ = text_trainer(tmp_path / "run", classifiers, Distillation(temperature=2.0), **often)
    trainer.run()
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert losses[-1] < losses[0]
    shown, said = (
        [found.label for found in TextClassifier.load(folder).classify_many(TEXTS)]
        for folder in (classifiers[1], tmp_path / "run" / "last")
    )
    assert set(shown) == set(LABELS)
    assert sum(one == other for one, other in zip(shown, said, strict=True)) >= 44


def test_intermediate_distillation_of_a_classifier_leaves_its_head(
    classifiers: tuple[Path, Path], tmp_path: Path
) -> None:
    drop = LengthDrop(num_sandwich=0, ratio_bound=0.3, scorers=("cls",))
    trainer, _ = text_trainer(tmp_path / "run", classifiers, Distillation("intermediate"), length_drop=drop)
    head = [one.weight.clone() for one in (trainer.model.pooler, trainer.model.classifier)]
    trainer.run()
    losses = [record["full_loss"] for record in metrics(tmp_path / "run")]
    assert losses[-1] < 0.7 * losses[0]
    for before, part in zip(head, (trainer.model.pooler, trainer.model.classifier), strict=True):
        assert torch.equal(part.weight, before)


@pytest.mark.parametrize("kind", ["intermediate", "prediction"])
def test_distillation_gradient_of_a_classifier_is_that_of_the_formula(
    classifiers: tuple[Path, Path], tmp_path: Path, kind: Any
) -> None:
    """In float64, text by text."""
    trainer, teacher = text_trainer(tmp_path, classifiers, Distillation(kind, 2.0, hard_label_weight=0.25))
    projection = nn.Linear(32, 48) if kind == "intermediate" else None
    student, other = ClassifierModel(trainer.model, projection).double(), ClassifierModel(teacher.model.double())
    indices = [0, 3, 5]
    labelled = trainer.data.collate(indices, torch.device("cpu"))
    backend = TrainingBackend(keep=teacher.distillation.keep)
    keep = {"keep_hidden_states": kind == "intermediate"}
    teacher.loss(student(labelled, backend, **keep), labelled).backward()
    got = {name: value.grad for name, value in student.named_parameters()}
    student.zero_grad()

    total = torch.zeros((), dtype=torch.float64)
    for index in indices:
        one = trainer.data.collate([index], torch.device("cpu"))
        backends = [TrainingBackend(keep="probabilities") for _ in range(2)]
        own, theirs = (
            model(one, backend, keep_hidden_states=True)
            for model, backend in zip((student, other), backends, strict=True)
        )
        total = total - 0.25 * own.logits[0].log_softmax(0)[one.labels[0]]
        if kind == "prediction":
            p = (theirs.logits[0].flip(0) / 2).softmax(0).detach()
            total = total - (p * (own.logits[0] / 2).log_softmax(0)).sum()
            continue
        for layer in range(3):
            total = total + ((own.hidden_states[layer] - theirs.hidden_states[2 * layer].detach()) ** 2).mean()
        for layer in (1, 2):
            attention = [kept.kept[at - 1][0][0].mean(0) for kept, at in zip(backends, (layer, 2 * layer), strict=True)]
            total = total + ((attention[0] - attention[1].detach()) ** 2).mean()
    total.backward()
    for name, value in student.named_parameters():
        if value.grad is None:
            assert got[name] is None or not got[name].any(), name
            continue
        torch.testing.assert_close(
            got[name], value.grad, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_what_cannot_teach_a_classifier_is_refused(
    classifiers: tuple[Path, Path], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    student = load_trainable_classifier(classifiers[0], LABELS)
    for name, labels, message in (("two", LABELS[:2], "the labels are"), ("one", ("score",), "the labels are")):
        other = load_classifier(write_classifier(tmp_path / name, labels), backend="reference")
        with pytest.raises(ValueError, match=message):
            TextTeacher(other, Distillation(), student)
    # Of a number the name says nothing.
    number = load_trainable_classifier(classifiers[0], ("similarity",))
    assert TextTeacher(other, Distillation(), number)
    with pytest.raises(ValueError, match="temperature is of the probabilities"):
        TextTeacher(other, Distillation(temperature=2.0), number)
    _, teacher = text_trainer(tmp_path / "texts", classifiers, Distillation())
    spans = make_trainer()
    with pytest.raises(ValueError, match="the teacher of a classifier is a TextTeacher"):
        Trainer(spans.model, spans.data, TrainingOptions(distillation=Distillation()), None, tmp_path, None, teacher)
