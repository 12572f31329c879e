"""Training of classifiers: the losses by hand, and a made-up task that LengthDrop learns with fewer tokens."""

import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from dtbert import LengthSchedule, TextClassifier
from dtbert.evaluation import LabelledText, LabelledTexts, PreparedTexts, task_named
from dtbert.qa import load_tokenizer
from dtbert.text import TextReader
from dtbert.training import Distillation, LengthDrop, TrainingOptions
from dtbert.training.backend import TrainingBackend
from dtbert.training.checkpoint import RunFolder
from dtbert.training.evaluation import held_out_text_scores
from dtbert.training.length_drop import SubModel, sub_models
from dtbert.training.loop import Trainer
from dtbert.training.texts import (
    ClassifierModel,
    LabelledTextBatch,
    TextTrainingSet,
    agreement_loss,
    label_loss,
    text_losses_of_step,
)
from dtbert.weights import load_trainable_classifier
from tests.text.conftest import LABELS, write_classifier
from tests.training.conftest import WORDS, metrics, weights


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("source") / "tiny", LABELS)


def made_up(count: int, seed: int = 0, task: str = "sst2") -> LabelledTexts:
    """Texts of 6 to 20 words; those with "bo" among them are positive."""
    drawn, examples = random.Random(seed), []
    for number in range(count):
        words = drawn.choices([word for word in WORDS if word != "bo"], k=drawn.randint(6, 20))
        if number % 2:
            words[drawn.randrange(len(words))] = "bo"
        examples.append(LabelledText(number + 1, " ".join(words), None, float(number % 2)))
    return LabelledTexts(task_named(task), task_named(task).labels or (), examples, [])


def test_losses_are_their_formulas() -> None:
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_(True).unbind()
    labels = torch.tensor([0, 2, 1, 1, 0])
    p, q = teacher.detach().softmax(1), student.softmax(1)
    expected = -q[torch.arange(5), labels].log().sum()
    torch.testing.assert_close(label_loss(student, labels), expected)
    torch.testing.assert_close(agreement_loss(student, teacher), -(p * q.log()).sum())
    torch.testing.assert_close(agreement_loss(student, teacher, "kl"), (q * (q / p).log()).sum())
    cooler = -((teacher.detach() / 2).softmax(1) * (student / 2).log_softmax(1)).sum()
    torch.testing.assert_close(agreement_loss(student, teacher, temperature=2.0), cooler)
    assert torch.autograd.grad(agreement_loss(student, teacher), teacher, allow_unused=True)[0] is None
    numbers = torch.randn(5)
    torch.testing.assert_close(label_loss(student[:, :1], numbers), ((student[:, 0] - numbers) ** 2).sum())
    torch.testing.assert_close(
        agreement_loss(student[:, :1], teacher[:, :1]), ((student[:, 0] - teacher[:, 0].detach()) ** 2).sum()
    )


def test_a_step_weighs_every_pass_alike_and_sub_models_learn_from_the_full_one(source: Path) -> None:
    model = load_trainable_classifier(source, ("negative", "neutral", "positive"))
    data = TextTrainingSet.from_texts(made_up(6), TextReader(load_tokenizer(source), model.config), model.labels[::2])
    labelled = data.collate(range(6), torch.device("cpu"))
    drawn = sub_models(LengthDrop(num_sandwich=1, ratio_bound=0.5), 2, 0, 0)
    passes = ClassifierModel(model)
    losses = list(text_losses_of_step(passes, labelled, TrainingBackend(), drawn))
    full = model.forward_packed(labelled.batch)
    torch.testing.assert_close(losses[0], F.cross_entropy(full, labelled.labels, reduction="sum") / 3)
    for loss, sub in zip(losses[1:], drawn, strict=True):
        own = model.forward_packed(labelled.batch, sub.schedule)
        torch.testing.assert_close(loss, agreement_loss(own, full) / 3)
    losses[-1].backward()
    assert all(
        one.grad is not None and one.grad.abs().sum() > 0 for one in (model.classifier.weight, model.pooler.weight)
    )
    # A sub-model may leave a layer out, the last one too, after which more than [CLS] is left.
    for skipped in (0, 1):
        logits = passes(labelled, TrainingBackend(), SubModel(drawn[0].schedule, frozenset([skipped]))).logits
        assert logits.shape == (6, 3)
    torch.manual_seed(0)
    assert not torch.equal(passes(labelled, TrainingBackend(hidden_dropout=0.3)).logits, full)


def test_labels_are_by_the_models_own_numbers_and_bad_texts_are_left_out(source: Path) -> None:
    model = load_trainable_classifier(source, ("positive", "neutral", "negative"))
    reader = TextReader(load_tokenizer(source), model.config)
    data = made_up(4)._replace(labels=("positive", "neutral", "negative"))
    data.examples.insert(1, LabelledText(9, "bo " * 90, None, 1.0))
    found = TextTrainingSet.from_texts(data, reader, model.labels)
    assert model.labels == ("negative", "neutral", "positive")
    assert found.labels.tolist() == [2, 1, 2, 1]
    assert len(found.unusable) == 1
    assert found.unusable[0].startswith("line 9: the text has 92 tokens")
    assert found.lengths == [len(one.text.split()) + 2 for one in data.examples if one.line != 9]
    with pytest.raises(ValueError, match="none of 1 texts can be trained on: line 9"):
        TextTrainingSet.from_texts(data._replace(examples=data.examples[1:2]), reader, model.labels)
    numbers = TextTrainingSet.from_texts(made_up(3, task="stsb"), reader, ("score",))
    assert numbers.labels.dtype == torch.float32
    assert isinstance(numbers.collate([0], torch.device("cpu")), LabelledTextBatch)


DROPPING = LengthSchedule.ratios([0.5, 0.3], scorer="cls")


def trainer(folder: Path, source: Path, **options: object) -> tuple[Trainer, PreparedTexts]:
    model = load_trainable_classifier(source, ("negative", "positive"), generator=torch.Generator().manual_seed(0))
    classifier = TextClassifier(model, load_tokenizer(source))
    data = TextTrainingSet.from_texts(made_up(600), classifier.reader, model.labels)
    held_out = PreparedTexts(classifier, made_up(100, seed=1))
    plain = {"batch_tokens": 256, "hidden_dropout": 0.0, "attention_dropout": 0.0, "learning_rate": 3e-3}
    chosen = TrainingOptions(**{**plain, "epochs": 2.0, **options})  # type: ignore[arg-type]
    run = RunFolder(folder, chosen.to_dict())

    def evaluate() -> dict[str, float]:
        return held_out_text_scores(held_out, {"half": DROPPING})

    return Trainer(model, data, chosen, run, source, evaluate), held_out


def test_length_drop_learns_whether_a_word_occurs_and_keeps_it_where_tokens_are_dropped(tmp_path: Path) -> None:
    source = write_classifier(tmp_path / "start", ("a", "b"), initializer_range=0.1)
    drop = LengthDrop(num_sandwich=1, ratio_bound=0.4, scorers=("cls",))
    trained, _ = trainer(tmp_path / "run", source, length_drop=drop)
    trained.run()
    record = metrics(tmp_path / "run")[-1]
    assert record["accuracy"] >= 95
    assert record["accuracy half"] >= 95
    assert record["main"] == pytest.approx((record["accuracy"] + record["accuracy half"]) / 2)
    saved = TextClassifier.load(tmp_path / "run" / "best")
    assert saved.labels == ("negative", "positive")
    texts = PreparedTexts(saved, made_up(100, seed=2))
    for schedule in (None, DROPPING):
        assert texts.scores(texts.predict(schedule))["accuracy"] >= 95


def test_interrupted_run_ends_as_an_unbroken_one(tmp_path: Path) -> None:
    source = write_classifier(tmp_path / "start", ("a", "b"))
    options = {"epochs": 0.1, "save_every": 1, "hidden_dropout": 0.1}
    trainer(tmp_path / "whole", source, **options)[0].run()

    def stop(record: dict[str, object]) -> None:
        if record["step"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "broken", source, **options)[0].run(stop)
    again = trainer(tmp_path / "broken", source, **options)[0]
    assert 0 < again.step < again.num_steps
    again.run()
    whole, broken = weights(tmp_path / "whole"), weights(tmp_path / "broken")
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)


def test_a_classifier_has_no_answer_loss_and_a_teacher_with_its_options(tmp_path: Path, source: Path) -> None:
    with pytest.raises(ValueError, match=r"a teacher and options\.distillation go together"):
        trainer(tmp_path / "one", source, distillation=Distillation())
    with pytest.raises(ValueError, match="has no span head"):
        trainer(tmp_path / "two", source, length_drop=LengthDrop(answer_loss=1.0))
