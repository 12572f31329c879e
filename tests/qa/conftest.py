"""A tiny model with random weights behind the tokenizer that ships with dtbert, and one that knows a single word."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch, SpanLogits
from dtbert.qa import Answer, QuestionAnswerer, load_tokenizer
from dtbert.weights import resolve_source

NEEDLE = "treasure"  # a token of its own
QUESTION = "Who wrote the letter?"
LETTER = "The letter was written by Ada Lovelace in 1843, and Charles Babbage answered it."


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_source(None))


def make_model(**overrides: Any) -> BertForQuestionAnswering:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "initializer_range": 0.5,
    }
    model = BertForQuestionAnswering(BertConfig(**{**sizes, **overrides}))
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.prepare()
    return model.eval()


@pytest.fixture(scope="session")
def make_answerer(tokenizer: Tokenizer) -> Callable[..., QuestionAnswerer]:
    """Makes an answerer with a model of its own."""

    def make(**options: Any) -> QuestionAnswerer:
        return QuestionAnswerer(make_model(), tokenizer, **options)

    return make


@pytest.fixture(scope="session")
def answerer(make_answerer: Callable[..., QuestionAnswerer]) -> QuestionAnswerer:
    return make_answerer()


@pytest.fixture
def finder(make_answerer: Callable[..., QuestionAnswerer], monkeypatch: pytest.MonkeyPatch) -> QuestionAnswerer:
    """An answerer whose model is sure of the needle and of nothing else."""
    answerer = make_answerer()
    needle = answerer.tokenizer.token_to_id(NEEDLE)

    def forward(batch: PackedBatch, schedule: LengthSchedule | None = None) -> SpanLogits:
        logits = torch.where(batch.input_ids == needle, 20.0, 0.0)
        return SpanLogits(logits, logits)

    monkeypatch.setattr(answerer.model, "forward_packed", forward)
    return answerer


def same(got: list[Answer], expected: list[Answer]) -> None:
    assert [tuple(answer)[:3] for answer in got] == [tuple(answer)[:3] for answer in expected]
    assert [answer.score for answer in got] == pytest.approx([answer.score for answer in expected], rel=1e-3)
