"""A tiny classifier in a folder, with the vocabulary of the tests of training."""

from pathlib import Path

import pytest
import torch

from dtbert.model import BertConfig, BertForSequenceClassification
from dtbert.weights import save_model
from tests.training.conftest import SPECIAL, WORDS

LABELS = ("negative", "neutral", "positive")


def write_classifier(folder: Path, labels: tuple[str, ...] = LABELS, **sizes: float) -> Path:
    """A random model with its vocabulary, of which each layer changes what it reads."""
    vocabulary = [*SPECIAL, *WORDS]
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
        **sizes,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **sizes), labels)
    model.reset_parameters(torch.Generator().manual_seed(0))
    save_model(model, folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    return folder


@pytest.fixture(scope="session")
def classifier_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_classifier(tmp_path_factory.mktemp("classifier") / "tiny")
