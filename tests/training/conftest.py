"""Made-up questions, a tiny BERT in a folder, and runs of the training loop on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtbert.evaluation import SquadQuestion, read_squad
from dtbert.model import BertConfig, BertForQuestionAnswering
from dtbert.qa import load_tokenizer
from dtbert.training import TrainingOptions
from dtbert.training.checkpoint import RunFolder
from dtbert.training.data import TrainingSet
from dtbert.training.distillation import SpanTeacher
from dtbert.training.loop import Trainer
from dtbert.weights import load_model, load_trainable, save_model

WORDS = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "##s"]

TrainTiny = Callable[..., Trainer]
MakeTrainer = Callable[..., Trainer]


def write_model(folder: Path, *, seed: int = 0, words: list[str] = WORDS, **sizes: int) -> Path:
    """A random model with its vocabulary."""
    vocabulary = [*SPECIAL, *words]
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        **sizes,
    }
    model = BertForQuestionAnswering(BertConfig(vocab_size=len(vocabulary), initializer_range=0.1, **sizes))
    model.reset_parameters(torch.Generator().manual_seed(seed))
    save_model(model, folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    return folder


def write_questions(file: Path, count: int, *, seed: int = 0, name: str = "q") -> Path:
    """Questions of three words about contexts of 8 to 16, in each of which one or two words are the answer."""
    drawn = random.Random(seed)
    paragraphs = []
    for index in range(count):
        words = drawn.choices(WORDS, k=drawn.randint(8, 16))
        first = drawn.randrange(len(words) - 1)
        answer = " ".join(words[first : first + drawn.randint(1, 2)])
        answers = [{"text": answer, "answer_start": len(" ".join([*words[:first], ""]))}]
        qa = {"id": f"{name}{index}", "question": " ".join(drawn.choices(WORDS, k=3)), "answers": answers}
        paragraphs.append({"context": " ".join(words), "qas": [qa]})
    file.write_text(json.dumps({"version": "1.1", "data": [{"title": name, "paragraphs": paragraphs}]}), "utf-8")
    return file


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]


def weights(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["model"]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[SquadQuestion]:
    return read_squad(write_questions(tmp_path_factory.mktemp("questions") / "train.json", 50))


@pytest.fixture
def make_trainer(model_folder: Path, questions: list[SquadQuestion], tmp_path: Path) -> MakeTrainer:
    """Makes a trainer that has not started."""

    def make(
        name: str = "run", *, teacher: Path | None = None, evaluate: Any = None, device: str = "cpu", **options: Any
    ) -> Trainer:
        model, tokenizer = load_trainable(model_folder, device=device), load_tokenizer(model_folder)
        chosen = TrainingOptions(**{"batch_tokens": 256, "epochs": 2.0, "save_every": 2, **options})
        data = TrainingSet.from_questions(questions, tokenizer, model.config, window=40, stride=8)
        folder = RunFolder(tmp_path / name, chosen.to_dict())
        shown = None
        if teacher is not None:
            assert chosen.distillation is not None
            shown = SpanTeacher(
                load_model(teacher, device=device, backend="reference"), chosen.distillation, model.config
            )
        return Trainer(model, data, chosen, folder, model_folder, evaluate, shown)

    return make


@pytest.fixture
def train_tiny(make_trainer: MakeTrainer) -> TrainTiny:
    """Trains the tiny model to the end, without dropout."""

    def train(name: str = "run", **options: Any) -> Trainer:
        plain = {"save_every": 100, "hidden_dropout": 0.0, "attention_dropout": 0.0}
        trainer = make_trainer(name, **{**plain, **options})
        trainer.run()
        return trainer

    return train
