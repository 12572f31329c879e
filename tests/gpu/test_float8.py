"""Products in fp8 on the kernels: rows of the specification's bits, a model as right as the specification, graphs."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from dtbert.kernels.float8 import FLOAT8, ScaledRows, scale_rows
from dtbert.model import BertForQuestionAnswering, LengthSchedule
from dtbert.weights import load_model
from tests.gpu.cases import randn, relative_error
from tests.gpu.test_graphs import BATCHES, SCHEDULES, batch_of, identify, logits, padded

pytestmark = pytest.mark.gpu

# The scorer "random" keeps the same tokens whatever the rounding.
RANDOM = LengthSchedule.ratios((1, 0.9, 0.7, 0.5, 0.3, 0.1), scorer="random")


@pytest.fixture(autouse=True)
def _in_inference() -> Iterator[None]:
    from dtbert.kernels.triton import why_not_float8

    reason = why_not_float8(torch.device("cuda"))
    if reason is not None:
        pytest.skip(f"no products in fp8: {reason}")
    with torch.inference_mode():
        yield


def load(backend: str | None = None, **options: bool) -> BertForQuestionAnswering:
    return load_model(device="cuda", dtype=FLOAT8, backend=backend, **options)


def assert_same_rows(got: ScaledRows, want: ScaledRows) -> None:
    assert torch.equal(got.values.view(torch.uint8), want.values.view(torch.uint8))
    assert torch.equal(got.scale, want.scale)


@pytest.mark.parametrize("width", [16, 312, 384, 768, 3072, 5000])
@pytest.mark.parametrize("tokens", [0, 1, 127, 1000])
def test_rows_have_the_bits_of_the_specification(tokens: int, width: int) -> None:
    from dtbert.kernels.triton.float8 import rows_of

    x = randn(tokens, width, dtype=torch.bfloat16) * torch.logspace(-6, 6, width, device="cuda")
    x = x.to(torch.bfloat16)
    assert_same_rows(rows_of(x), scale_rows(x))


def test_states_carry_the_rows_that_they_are() -> None:
    model, found = load(graphs=False), []
    # Of the embeddings, and of what leaves a layer.
    for layer in model.encoder.layers:
        layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    logits(model, batch_of([120, 7]))
    assert len(found) == len(model.encoder.layers)
    for states in found:
        assert_same_rows(states._float8, scale_rows(states))


@pytest.mark.parametrize("tokens", [1, 7, 127, 300, 12288])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 16), (1152, 384), (2304, 768), (768, 3072)])
def test_product_is_that_of_the_rows(outputs: int, inputs: int, tokens: int) -> None:
    from dtbert.kernels.float8 import rows_product
    from dtbert.kernels.parameters import Linear
    from dtbert.kernels.triton.float8 import rows_of, scaled_linear

    x = randn(tokens, inputs, dtype=torch.bfloat16)
    layer = Linear(inputs, outputs).to("cuda", torch.bfloat16)
    layer.bias.copy_(randn(outputs, dtype=torch.bfloat16, seed=1))
    values, scale = scale_rows(randn(outputs, inputs, dtype=torch.bfloat16, seed=2))
    layer.hold_scaled(values, scale.squeeze(1))
    for bias in (layer.bias, None):
        want = rows_product(scale_rows(x), values, scale.squeeze(1)) + (0 if bias is None else bias)
        # One rounding to bfloat16, and sums of float32 or, of a step's products, of somewhat less.
        assert relative_error(scaled_linear(rows_of(x), layer, bias), want) <= 4e-3


def errors(model: BertForQuestionAnswering, schedule: LengthSchedule | None) -> list[float]:
    exact = load_model(device="cuda", backend="reference")
    batches = [batch_of(lengths) for lengths in ([384] * 8, [128], [384, 128, 1, 200, 57])]
    return [relative_error(logits(model, batch, schedule), logits(exact, batch, schedule)) for batch in batches]


@pytest.mark.parametrize("schedule", [None, RANDOM], ids=["all", "dropping"])
def test_model_is_as_right_as_the_specification(schedule: LengthSchedule | None) -> None:
    got, want = errors(load(), schedule), errors(load("reference"), schedule)
    assert all(mine <= 1.5 * theirs for mine, theirs in zip(got, want, strict=True))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=identify)
def test_replays_have_the_bits_of_an_eager_run(schedule: LengthSchedule | None) -> None:
    model = load()
    for seed, lengths in enumerate(BATCHES):
        batch = batch_of(lengths, seed)
        assert torch.equal(logits(model, batch, schedule), padded(model, batch, schedule)), lengths
    assert model._graphs is not None
    assert len(model._graphs) >= 3


def test_replays_do_not_wait_for_the_device() -> None:
    model, batch = load(), batch_of([120, 70])
    want: list[Tensor] = [logits(model, batch, SCHEDULES[3]) for _ in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = logits(model, batch, SCHEDULES[3])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want[-1])


def test_model_repeats_bit_for_bit() -> None:
    model, batch = load(graphs=False), batch_of([384, 128, 1, 200, 57])
    first = logits(model, batch, SCHEDULES[1])
    assert all(torch.equal(logits(model, batch, SCHEDULES[1]), first) for _ in range(5))
