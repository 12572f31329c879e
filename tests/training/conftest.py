"""Made-up questions, a tiny BERT in a folder, and runs of the training loop on them."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from dtbert.evaluation import SquadQuestion, read_squad
from dtbert.model import BertConfig, BertForQuestionAnswering
from dtbert.qa import load_tokenizer
from dtbert.training import TrainingOptions
from dtbert.training.checkpoint import RunFolder
from dtbert.training.data import TrainingSet
from dtbert.training.loop import Trainer
from dtbert.weights import load_trainable, save_model

WORDS = [first + second for first in "bdfgklmnprst" for second in "aeiou"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", "##s"]

TrainTiny = Callable[..., Trainer]


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


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> list[SquadQuestion]:
    return read_squad(write_questions(tmp_path_factory.mktemp("questions") / "train.json", 50))


@pytest.fixture
def train_tiny(model_folder: Path, questions: list[SquadQuestion], tmp_path: Path) -> TrainTiny:
    """Trains the tiny model to the end in a folder of its own."""

    def train(name: str = "run", **options: object) -> Trainer:
        model = load_trainable(model_folder)
        data = TrainingSet.from_questions(questions, load_tokenizer(model_folder), model.config, window=40, stride=8)
        changed = TrainingOptions(**{"batch_tokens": 256, "hidden_dropout": 0.0, "attention_dropout": 0.0, **options})
        trainer = Trainer(model, data, changed, RunFolder(tmp_path / name, changed.to_dict()), model_folder)
        trainer.run()
        return trainer

    return train
