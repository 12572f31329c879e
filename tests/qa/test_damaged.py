"""Weights that are damaged after they were loaded: an error, never an answer."""

from collections.abc import Callable

import pytest
import torch
from tokenizers import Tokenizer

from dtbert import LengthSchedule, load_model
from dtbert.kernels import native
from dtbert.qa import QuestionAnswerer
from tests.qa.conftest import LETTER, QUESTION


def test_damaged_weights_are_an_error(make_answerer: Callable[..., QuestionAnswerer]) -> None:
    answerer = make_answerer()
    with torch.no_grad():
        answerer.model.span.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN or infinite"):
        answerer(QUESTION, LETTER)


@pytest.mark.usefixtures("built_steps")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_one_nan_in_any_layer_reaches_the_logits_through_the_compiled_steps(
    dtype: torch.dtype, tokenizer: Tokenizer
) -> None:
    if not native.available(dtype):
        pytest.skip(native.why_not(dtype))
    model = load_model(dtype=dtype, backend="native")
    answerer, layers = QuestionAnswerer(model, tokenizer), model.encoder.layers
    schedule = LengthSchedule.ratios([0.7] * len(layers))
    sound = answerer(QUESTION, LETTER, schedule=schedule)
    for part in (model.encoder.embeddings.norm, layers[0], layers[len(layers) - 1]):
        for parameter in part.parameters():
            if not parameter.is_floating_point():
                continue
            values = parameter.detach().view(-1)
            value, values[5] = values[5].item(), torch.nan
            for one in (None, schedule):
                with pytest.raises(ValueError, match="its weights are damaged"):
                    answerer(QUESTION, LETTER, schedule=one)
            values[5] = value
    assert answerer(QUESTION, LETTER, schedule=schedule) == sound
