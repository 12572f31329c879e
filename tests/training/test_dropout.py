"""Dropout as a CPU draws it."""

import pytest
import torch

from dtbert.training.dropout import dropout

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("probability", [0.001, 0.1, 0.5, 0.97])
def test_dropped_values_are_0_the_others_scaled_and_the_gradient_is_theirs(
    probability: float, dtype: torch.dtype
) -> None:
    x = torch.rand(301, 333, dtype=dtype).add_(0.5).requires_grad_()
    found = dropout(x, probability)
    dropped = found == 0
    count, mean = x.numel(), dropped.double().mean().item()
    # Within five standard errors, and a draw's resolution.
    assert abs(mean - probability) < 5 * (probability * (1 - probability) / count) ** 0.5 + 2**-15
    scale = 1 / (1 - int(probability * 2**15) / 2**15)
    assert torch.equal(found[~dropped], x[~dropped] * scale)
    gradient = torch.rand_like(x).add_(0.5)
    found.backward(gradient)
    assert x.grad is not None
    assert torch.equal(x.grad, (gradient * scale).masked_fill(dropped, 0))


def test_draws_are_of_the_seed_and_of_each_place_alone() -> None:
    x = torch.ones(64, 1024)
    torch.manual_seed(7)
    first, second = dropout(x, 0.5) == 0, dropout(x, 0.5) == 0
    torch.manual_seed(7)
    assert torch.equal(dropout(x, 0.5) == 0, first)
    for one, other in ((first, second), (first[:, 1:], first[:, :-1]), (first[:, 4:], first[:, :-4])):
        # Two fair coins agree half of the time; 65,536 throws, five standard errors.
        assert abs((one == other).double().mean().item() - 0.5) < 0.01


@pytest.mark.parametrize("shape", [(0,), (1,), (3, 5), (7, 1, 2)])
def test_any_shape_goes_through_and_without_dropout_nothing_is_drawn(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape).transpose(0, -1)
    assert dropout(x, 0.3).shape == x.shape
    state = torch.get_rng_state()
    assert dropout(x, 0.0) is x
    assert torch.equal(torch.get_rng_state(), state)
