"""A backend's layout of weights is a layout, not an identity: prepared models are copied, moved, saved and trained."""

import copy
import io
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from dtbert.kernels import cpu
from dtbert.model import BertForQuestionAnswering
from tests.peer import make_config, make_dtbert, make_peer

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> BertForQuestionAnswering:
    """Small, and in blocked layout whatever pays on this machine."""
    monkeypatch.setattr(cpu, "blocked_pays", lambda weight: True)
    model = make_dtbert(make_peer(make_config(layers=2)), blocked=False)
    model.prepare()
    assert is_blocked(model)
    return model


def is_blocked(model: BertForQuestionAnswering) -> bool:
    return model.encoder.layers[0].qkv.weight.is_mkldnn


def logits(model: BertForQuestionAnswering) -> Tensor:
    return torch.stack(model(IDS))


COPIES: dict[str, Callable[[BertForQuestionAnswering], BertForQuestionAnswering]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "to": lambda model: model.to("cpu"),
}


@pytest.mark.parametrize("make", COPIES.values(), ids=COPIES)
def test_a_copy_has_the_same_numbers_and_the_same_layout(
    model: BertForQuestionAnswering, make: Callable[[BertForQuestionAnswering], BertForQuestionAnswering]
) -> None:
    want = logits(model)
    made = make(model)
    assert torch.equal(logits(made), want)
    assert is_blocked(made)
    assert torch.equal(logits(model), want)


def test_state_is_saved_plain_and_loaded_into_any_layout(model: BertForQuestionAnswering) -> None:
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert not any(value.is_mkldnn for value in state.values())
    for other in (BertForQuestionAnswering(model.config), copy.deepcopy(model)):
        with torch.no_grad():
            other.span.bias.fill_(3)
        other.load_state_dict(state)
        assert torch.equal(other.span.bias, model.span.bias)
    assert is_blocked(other)
    torch.testing.assert_close(logits(other), logits(model))


def test_dtype_changes_in_any_layout(model: BertForQuestionAnswering) -> None:
    want = logits(model)
    assert model.double().dtype == torch.float64
    torch.testing.assert_close(logits(model).float(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(model.float()), want, atol=1e-6, rtol=1e-6)
    assert is_blocked(model)


def test_prepared_model_trains_again(model: BertForQuestionAnswering) -> None:
    want = logits(model)
    model.requires_grad_(True)
    assert model.backend_name == "reference"
    torch.testing.assert_close(logits(model).detach(), want, atol=1e-5, rtol=1e-5)
    logits(model).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    model.prepare()
    assert is_blocked(model)
    assert model.backend_name == "cpu"
