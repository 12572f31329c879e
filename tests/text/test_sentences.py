"""Sentence embeddings: real weights against transformers' mean pooling, and what the model's folder asks for."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from dtbert import LengthSchedule, SentenceEncoder, convert, load_sentence_encoder
from tests.text.test_classifier import some_texts
from tests.tolerances import assert_as_right_as_peer
from tests.weights.test_agreement import SENTENCES


@pytest.fixture(scope="module")
def encoder(classifier_folder: Path) -> SentenceEncoder:
    return SentenceEncoder.load(classifier_folder)


def by_transformers(folder: Path, texts: list[str], dtype: torch.dtype, pooling: str = "mean") -> torch.Tensor:
    """The recipe of the model's card: the mean over the mask, of texts padded together."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        states = transformers.BertModel.from_pretrained(folder, dtype=dtype).eval()(**encoded).last_hidden_state
    if pooling == "cls":
        return states[:, 0]
    mask = encoded["attention_mask"][..., None]
    return (states * mask).sum(1) / mask.sum(1)


def test_embeddings_of_all_minilm_l6_v2_agree_with_transformers_mean_pooling(minilm: Path) -> None:
    encoder = SentenceEncoder.load(minilm)
    got = encoder.encode(SENTENCES, normalize=False)
    assert (got.shape, got.dtype) == ((len(SENTENCES), 384), torch.float32)
    theirs, exact = (by_transformers(minilm, SENTENCES, dtype) for dtype in (torch.float32, torch.float64))
    assert_as_right_as_peer([got], [theirs], [exact])
    # Its modules.json asks for length 1.
    unit = encoder.encode(SENTENCES)
    torch.testing.assert_close(unit, got / got.norm(dim=1, keepdim=True))
    # Dropping without training for it moves an embedding, and not far.
    dropped = encoder.encode(SENTENCES, schedule=LengthSchedule.ratios([1, 1, 0.95, 0.9, 0.85, 0.8]))
    assert 0.8 < (dropped * unit).sum(1).min() < 0.9999


def test_any_number_of_texts_in_order_whatever_the_batch(encoder: SentenceEncoder, monkeypatch: Any) -> None:
    texts = some_texts(20)
    single = torch.cat([encoder.encode([text]) for text in texts])
    small = SentenceEncoder(encoder.model, encoder.tokenizer, batch_tokens=64)
    for got in (encoder.encode(texts), small.encode(iter(texts))):
        torch.testing.assert_close(got, single, atol=1e-5, rtol=1e-5)
    monkeypatch.setattr("dtbert.text.reading.BUFFER_TEXTS", 7)
    torch.testing.assert_close(encoder.encode(texts), single, atol=1e-5, rtol=1e-5)
    assert encoder.encode([]).shape == (0, 32)
    # Somebody may train on top of them.
    assert not got.is_inference()


def test_bad_texts_are_errors_with_their_number(encoder: SentenceEncoder) -> None:
    with pytest.raises(TypeError, match="got a single string"):
        encoder.encode("bo")
    with pytest.raises(ValueError, match=r"^text 1: the text has 65 tokens"):
        encoder.encode(["bo", "bo " * 63])
    with pytest.raises(TypeError, match=r"^text 0: the text must be a string"):
        encoder.encode([b"bo"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="1 entries, the model 2 layers"):
        encoder.encode(["bo"], schedule=LengthSchedule.ratios([1]))


def modules(
    folder: Path, names: str = "Transformer Pooling", mode: str = "mean_tokens", path: str = "1_Pooling"
) -> Path:
    kinds = names.split()
    paths = ["", path, "2_Normalize"][: len(kinds)]
    described = [
        {"idx": index, "name": str(index), "path": where, "type": f"sentence_transformers.models.{kind}"}
        for index, (kind, where) in enumerate(zip(kinds, paths, strict=True))
    ]
    (folder / "modules.json").write_text(json.dumps(described))
    (folder / "1_Pooling").mkdir(exist_ok=True)
    flags = {f"pooling_mode_{name}": name in mode.split("+") for name in ("cls_token", "mean_tokens", "max_tokens")}
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 32, **flags}))
    return folder


@pytest.fixture
def own(classifier_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(classifier_folder, tmp_path / "own"))


def test_pooling_and_length_are_what_the_folder_asks_for(own: Path, tmp_path: Path) -> None:
    modules(own, "Transformer Pooling Normalize", "cls_token")
    texts = some_texts(4)
    want = torch.nn.functional.normalize(by_transformers(own, texts, torch.float32, "cls"))
    torch.testing.assert_close(SentenceEncoder.load(own).encode(texts), want, atol=2e-6, rtol=2e-6)
    assert load_sentence_encoder(own).pooling == "cls"
    assert load_sentence_encoder(own, pooling="mean").pooling == "mean"
    # A converted model asks for the same.
    assert SentenceEncoder.load(convert(own, tmp_path / "converted")).model.pooling == "cls"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"names": "Transformer Pooling Dense"}, "the modules are Transformer, Pooling, Dense: dtbert does"),
        ({"names": "Transformer"}, "the modules are Transformer: dtbert does"),
        ({"mode": "max_tokens"}, "config.json: the pooling is max_tokens: dtbert does mean_tokens or cls_token"),
        ({"mode": "cls_token+mean_tokens"}, "the pooling is cls_token with mean_tokens"),
        ({"mode": ""}, "the pooling is none"),
        ({"path": "../elsewhere"}, "expected the paths '' and '1_Pooling'"),
    ],
)
def test_what_dtbert_does_not_do_is_refused(own: Path, asked: dict[str, str], message: str) -> None:
    modules(own, **asked)
    with pytest.raises(ValueError, match=message):
        SentenceEncoder.load(own)


def test_pooling_that_is_missing_is_said(own: Path) -> None:
    modules(own)
    (own / "1_Pooling" / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="1_Pooling"):
        SentenceEncoder.load(own)
