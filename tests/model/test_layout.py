"""A backend's layout of weights is a layout, not an identity: prepared models are copied, moved, saved and trained."""

import copy
import io
import pickle
import weakref
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


PARTS: dict[str, Callable[[BertForQuestionAnswering], torch.nn.Module]] = {
    "head": lambda model: model.span,
    "encoder": lambda model: model.encoder,
    "last-layer": lambda model: model.encoder.layers[-1],
}


@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_part_of_a_prepared_model_trains(
    model: BertForQuestionAnswering, part: Callable[[BertForQuestionAnswering], torch.nn.Module]
) -> None:
    want = logits(model)
    trained = part(model).requires_grad_(True)
    got = logits(model)
    torch.testing.assert_close(got.detach(), want, atol=1e-5, rtol=1e-5)
    got.sum().backward()
    own = set(trained.parameters())
    assert all((parameter.grad is not None) == (parameter in own) for parameter in model.parameters())


def test_optimizer_made_before_training_moves_the_model(model: BertForQuestionAnswering) -> None:
    """Parameters stay the same objects, laid out or not."""
    before, optimizer = logits(model), torch.optim.SGD(model.parameters(), 0.1)
    parameters = list(model.parameters())
    for _ in range(2):
        model.requires_grad_(True)
        loss = logits(model).sum()
        loss.backward()
        del loss
        optimizer.step()
        optimizer.zero_grad()
        model.prepare()
        assert is_blocked(model)
        assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
        after = logits(model)
        assert not torch.allclose(after, before)
        before = after


def test_weights_that_a_graph_needs_stay_plain_and_right(model: BertForQuestionAnswering) -> None:
    model.requires_grad_(True)
    kept = logits(model)
    model.prepare()
    torch.testing.assert_close(logits(model), kept.detach(), atol=1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="grad"):
        model.span.weight.sum().backward()


def test_weights_that_somebody_refers_to_weakly_come_back_too(model: BertForQuestionAnswering) -> None:
    want = logits(model)
    references = [weakref.ref(parameter) for parameter in model.parameters()]
    model.requires_grad_(True)
    assert not is_blocked(model)
    torch.testing.assert_close(logits(model).detach(), want, atol=1e-5, rtol=1e-5)
    assert len(references) == len(list(model.parameters()))
