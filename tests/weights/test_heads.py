"""Checkpoints of classifiers and sentence encoders: loaded, written, trained from, fetched, refused."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtbert.weights import (
    CheckpointError,
    convert,
    load_classifier,
    load_encoder,
    load_sentence_encoder,
    load_trainable_classifier,
    resolve_source,
    save_model,
    to_hub_tensors,
)
from tests.weights.checkpoints import CONFIG, assert_same, make_tensors, write
from tests.weights.conftest import Connect
from tests.weights.hub_server import Hub

LABELS = ("no", "yes", "maybe")
ID2LABEL = {"id2label": {str(index): label for index, label in enumerate(LABELS)}}


def tensors(num_labels: int = 3, *, pooler: bool = True) -> dict[str, Tensor]:
    head = {"classifier.weight": torch.randn(num_labels, 16), "classifier.bias": torch.randn(num_labels)}
    return make_tensors(pooler=pooler, span_head=False) | head


def test_classifier_is_loaded_and_saved_bit_for_bit_with_its_labels(tmp_path: Path) -> None:
    there = tensors()
    folder = write(tmp_path / "published", there, "pytorch_model.bin", **ID2LABEL)
    model = load_classifier(folder)
    assert model.labels == LABELS
    assert_same(to_hub_tensors(model), there)
    again = load_classifier(save_model(model, tmp_path / "saved"))
    assert again.labels == LABELS
    assert_same(to_hub_tensors(again), there)
    saved = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert saved["architectures"] == ["BertForSequenceClassification"]
    assert saved["problem_type"] == "single_label_classification"
    assert saved["label2id"] == {"no": 0, "yes": 1, "maybe": 2}


def test_classifier_is_converted_with_its_head(tmp_path: Path) -> None:
    there = tensors()
    folder = write(tmp_path / "published", there, **ID2LABEL)
    assert_same(to_hub_tensors(load_classifier(convert(folder, tmp_path / "plain"))), there)
    int8 = load_classifier(convert(folder, tmp_path / "int8", int8=True))
    ids = torch.arange(12).view(2, 6)
    torch.testing.assert_close(int8(ids), load_classifier(folder)(ids), atol=0.2, rtol=0.1)
    # One of words has no pooler, and is converted all the same.
    words = write(tmp_path / "words", tensors(pooler=False), **ID2LABEL)
    assert convert(words, tmp_path / "of words").is_dir()


@pytest.mark.parametrize(
    ("config", "labels"),
    [
        ({}, ("LABEL_0", "LABEL_1")),
        ({"num_labels": 3}, ("LABEL_0", "LABEL_1", "LABEL_2")),
        ({"id2label": {"1": "b", "0": "a"}}, ("a", "b")),
        ({"id2label": {"0": 0}, "problem_type": "regression"}, ("0",)),
    ],
)
def test_labels_are_those_of_the_config_or_of_transformers(
    config: dict[str, Any], labels: tuple[str, ...], tmp_path: Path
) -> None:
    assert load_classifier(write(tmp_path / "model", tensors(len(labels)), **config)).labels == labels


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"id2label": {"0": "a", "2": "b"}}, "id2label: expected the labels 0 to n - 1, found '0', '2'"),
        ({"id2label": {}}, "id2label: expected the labels 0 to n - 1, found none"),
        ({"id2label": ["a"]}, "id2label: expected an object, found a list"),
        ({"id2label": {"0": None}}, "id2label.0: expected a text or a whole number"),
        ({"id2label": {"0": "a", "1": "a"}}, "at least one label, each once"),
        ({"num_labels": 0}, "num_labels must be from 1"),
        ({"num_labels": 10**9}, "num_labels must be from 1"),
        ({"problem_type": "multi_label_classification"}, "trained to give several"),
        ({"architectures": ["BertForTokenClassification"]}, "does not label whole texts"),
        ({"num_labels": 5}, r"classifier.weight: \[3, 16\], expected \[5, 16\]"),
    ],
)
def test_configs_that_fit_no_classifier_are_refused(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "model", tensors(), **config)
    with pytest.raises(ValueError, match=message):
        load_classifier(folder)


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    span = write(tmp_path / "span", make_tensors())
    with pytest.raises(
        CheckpointError, match=r"pooler.dense.bias: missing(.|\n)*the classifier is missing: `dtbert tr"
    ):
        load_classifier(span)
    with pytest.raises(CheckpointError, match=r"bert.pooler.dense.weight: missing, expected \[16, 16\]$"):
        load_classifier(write(tmp_path / "words", tensors(pooler=False), **ID2LABEL))


def test_sentence_encoder_is_the_encoder_of_any_checkpoint(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", tensors(), **ID2LABEL)
    ids = torch.arange(12).view(2, 6)
    states = load_encoder(folder)(ids).last_hidden_state
    torch.testing.assert_close(load_sentence_encoder(folder)(ids), states.mean(1), atol=1e-6, rtol=1e-6)
    of_cls = load_sentence_encoder(folder, pooling="cls")(ids)
    torch.testing.assert_close(of_cls, states[:, 0], atol=1e-6, rtol=1e-6)


def test_training_goes_on_with_a_classifier_of_the_same_labels_alone(tmp_path: Path) -> None:
    there = tensors()
    folder = write(tmp_path / "model", there, **ID2LABEL)

    def head(labels: tuple[str, ...], source: Path = folder, seed: int = 0) -> tuple[tuple[str, ...], Tensor, Tensor]:
        model = load_trainable_classifier(source, labels, generator=torch.Generator().manual_seed(seed))
        assert model.training
        assert all(one.requires_grad for one in model.parameters())
        torch.testing.assert_close(model.encoder.embeddings.word, there["bert.embeddings.word_embeddings.weight"])
        return model.labels, model.classifier.weight.detach(), model.pooler.weight.detach()

    kept = there["classifier.weight"]
    # In its own order, whatever the task's, and its own spelling.
    labels, weight, pooler = head(("Yes", "Maybe", "No"))
    assert labels == LABELS
    assert torch.equal(weight, kept)
    assert torch.equal(pooler, there["bert.pooler.dense.weight"])
    # Others mean another task: a new classifier, on the same pooler.
    labels, weight, pooler = head(("a", "b", "c"))
    assert labels == ("a", "b", "c")
    assert not torch.equal(weight, kept)
    assert torch.equal(weight, head(("a", "b", "c"))[1])
    assert not torch.equal(weight, head(("a", "b", "c"), seed=1)[1])
    assert torch.equal(pooler, there["bert.pooler.dense.weight"])
    unnamed = write(tmp_path / "unnamed", there, num_labels=3)
    labels, weight, _ = head(("a", "b", "c"), unnamed)
    assert labels == ("a", "b", "c")
    assert torch.equal(weight, kept)
    bare = {name: value for name, value in there.items() if "pooler" not in name and "classifier" not in name}
    labels, weight, pooler = head(LABELS, write(tmp_path / "bare", bare))
    assert weight.shape == (3, 16)
    assert 0 < pooler.std() < 0.05


def test_pooling_comes_along_from_the_hub(connect: Connect, files: dict[str, bytes]) -> None:
    modules = [{"type": f"sentence_transformers.models.{kind}", "path": path}
               for kind, path in (("Transformer", ""), ("Pooling", "1_Pooling"))]  # fmt: skip
    pooling = {"word_embedding_dimension": 16, "pooling_mode_cls_token": True}
    more = {"modules.json": json.dumps(modules).encode(), "1_Pooling/config.json": json.dumps(pooling).encode()}
    hub = connect(Hub("org/name", {"main": files | more}))
    assert load_sentence_encoder("org/name").pooling == "cls"
    hub.requests.clear()
    assert load_sentence_encoder(resolve_source("org/name")).pooling == "cls"
    assert hub.asked("GET") == []
    assert CONFIG["hidden_size"] == 16
