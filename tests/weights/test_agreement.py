"""Real published weights, loaded by dtbert and by transformers: the same numbers."""

from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer

from dtbert.weights import convert, load_encoder, load_model
from tests.tolerances import assert_as_right_as_peer

SENTENCES = [
    "Who wrote the letter?",
    "The Amazon rainforest covers most of the Amazon basin of South America, which encompasses 7,000,000 square "
    "kilometres, of which 5,500,000 are covered by the rainforest.",
    "No.",
    "Warszawa, naïve café: 東京 — punctuation; and (brackets)!",
    " ".join(["A longer text, which repeats itself until it fills a good part of a window."] * 15),
]


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
    batch = padded_batch(minilm / "tokenizer.json")
    real = batch["attention_mask"].bool()
    peers, exact = (
        transformers.BertModel.from_pretrained(minilm, attn_implementation="eager", dtype=dtype)
        .eval()
        .requires_grad_(False)(**batch, output_hidden_states=True)
        for dtype in (torch.float32, torch.float64)
    )
    for backend in (None, "reference"):
        got = load_encoder(minilm, backend=backend)(**batch, output_hidden_states=True)
        assert len(got.hidden_states) == len(peers.hidden_states) == 7
        assert torch.equal(got.last_hidden_state, got.hidden_states[-1])
        states = ([*(one[real] for one in out.hidden_states), out.pooler_output] for out in (got, peers, exact))
        assert_as_right_as_peer(*states, about=f"backend {backend}, hidden states and pooler's output")


def test_shipped_model_agrees_with_transformers(tmp_path: Path) -> None:
    folder = convert(None, tmp_path / "plain")
    batch = padded_batch(folder / "tokenizer.json")
    real = batch["attention_mask"].bool()
    outputs = [load_model()(**batch)]
    for dtype in (torch.float32, torch.float64):
        theirs, report = transformers.BertForQuestionAnswering.from_pretrained(
            folder, attn_implementation="eager", dtype=dtype, output_loading_info=True
        )
        assert not any(report.values())
        outputs.append(theirs.eval().requires_grad_(False)(**batch))
    assert_as_right_as_peer(*([out.start_logits[real], out.end_logits[real]] for out in outputs))
