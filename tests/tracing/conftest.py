"""An answerer with a tiny random model, which reads 40 tokens at a time behind the tokenizer that ships with dtbert."""

import pytest

from dtbert.qa import QuestionAnswerer, load_tokenizer
from dtbert.weights import resolve_source
from tests.qa.conftest import make_model


@pytest.fixture(scope="session")
def answerer() -> QuestionAnswerer:
    return QuestionAnswerer(make_model(), load_tokenizer(resolve_source(None)), window=40, stride=10)
