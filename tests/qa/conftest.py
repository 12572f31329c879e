"""A tiny model with random weights behind the tokenizer that ships with dtbert."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from dtbert.model import BertConfig, BertForQuestionAnswering
from dtbert.qa import QuestionAnswerer, load_tokenizer
from dtbert.weights import resolve_source


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
