"""What every step refuses before it launches anything; sizes and places, without reading data."""

import pytest
import torch
from torch import Tensor

from dtbert.kernels import triton
from dtbert.kernels.triton.launch import INTERPRETED, TRITON_NAMES, architecture

H, T, K = 8, 5, 3


def product() -> dict[str, Tensor]:
    return {"x": torch.zeros(K, H), "weight": torch.zeros(H, H), "bias": torch.zeros(H)}


def norm() -> dict[str, Tensor]:
    return {"norm_weight": torch.ones(H), "norm_bias": torch.zeros(H)}


def arguments(step: str) -> dict[str, object]:
    """A right call of the step."""
    keep_indices, residual = torch.tensor([0, 2, 4]), torch.zeros(T, H)
    ids = {name: torch.zeros(T, dtype=torch.int64) for name in ("input_ids", "position_ids", "token_type_ids")}
    tables = {name: torch.zeros(4, H) for name in ("word", "position", "token_type")}
    kept = {"residual": residual, **norm(), "eps": 1e-5, "keep_indices": keep_indices}
    return {
        "embed_layer_norm": {**ids, **tables, **norm(), "eps": 1e-5},
        "linear": product(),
        "linear_gelu": product(),
        "fused_linear_gelu": product(),
        "linear_add_layer_norm": {**product(), **kept},
        "gather_add_layer_norm": {"product": torch.zeros(K, H), "bias": torch.zeros(H), **kept},
        "select_tokens": {
            "significance": torch.zeros(T),
            "cu_seqlens": torch.tensor([0, T], dtype=torch.int32),
            "next_cu_seqlens": torch.tensor([0, K], dtype=torch.int32),
            "num_kept": K,
            "max_seqlen": T,
        },
        "restore": {"states": torch.zeros(T, H), "keep_indices": keep_indices, "kept_states": torch.zeros(K, H)},
    }[step]


STEPS = (
    *("embed_layer_norm", "linear", "linear_gelu", "fused_linear_gelu", "linear_add_layer_norm"),
    *("gather_add_layer_norm", "select_tokens", "restore"),
)
INTEGERS = ("input_ids", "position_ids", "token_type_ids", "keep_indices", "cu_seqlens", "next_cu_seqlens")
TENSORS = [(step, name) for step in STEPS for name, value in arguments(step).items() if isinstance(value, Tensor)]
# The argument that sets dtype, device and sizes for the others.
FIRST = ("x", "word", "states", "significance", "product")


def call(step: str, **changed: object) -> object:
    return getattr(triton, step)(**{**arguments(step), **changed})


def test_kernels_are_interpreted_here() -> None:
    assert INTERPRETED
    assert architecture(torch.device("cpu")) == "interpreter"


@pytest.mark.parametrize("step", STEPS)
def test_step_takes_a_right_call(step: str) -> None:
    call(step)


@pytest.mark.parametrize(("step", "name"), TENSORS)
def test_step_refuses_another_dtype(step: str, name: str) -> None:
    value = arguments(step)[name]
    with pytest.raises(TypeError, match=f"{step}: .*torch.int16") as raised:
        call(step, **{name: value.to(torch.int16)})
    assert name in str(raised.value)


@pytest.mark.parametrize(("step", "name"), [pair for pair in TENSORS if pair[1] not in INTEGERS])
def test_step_refuses_mixed_precision_and_float64(step: str, name: str) -> None:
    changed = {
        key: value.double() for key, value in arguments(step).items() if getattr(value, "dtype", 0) == torch.float32
    }
    with pytest.raises(TypeError, match=r"torch.float64"):
        call(step, **changed)
    with pytest.raises(TypeError, match=r"torch.float16"):
        call(step, **{name: arguments(step)[name].half()})


@pytest.mark.parametrize(("step", "name"), [pair for pair in TENSORS if pair[1] not in FIRST])
def test_step_refuses_tensors_on_different_devices(step: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"{step}: .* is on (meta|cpu), the other tensors on (meta|cpu)"):
        call(step, **{name: arguments(step)[name].to("meta")})


@pytest.mark.parametrize(("step", "name"), TENSORS)
def test_step_refuses_another_shape_and_says_both(step: str, name: str) -> None:
    value = arguments(step)[name]
    with pytest.raises(ValueError, match=r"has shape \[.*\], expected \[.*\]"):
        call(step, **{name: value[None]})
    if (step, name) in (("select_tokens", "significance"), ("select_tokens", "cu_seqlens"), ("restore", "states")):
        return  # any length fits the rest of the call
    with pytest.raises(ValueError, match=r"has shape \[.*\], expected \[.*\]"):
        call(step, **{name: torch.zeros(*value.shape[:-1], value.shape[-1] + 1, dtype=value.dtype)})


@pytest.mark.parametrize(("step", "name"), TENSORS)
def test_step_refuses_rows_that_are_not_contiguous(step: str, name: str) -> None:
    value = arguments(step)[name]
    wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)
    with pytest.raises(ValueError, match=rf"{step}: {name} has strides \[.*\].*contiguous"):
        call(step, **{name: wide[..., ::2]})


@pytest.mark.parametrize(("step", "name"), [pair for pair in TENSORS if pair[1] not in INTEGERS])
def test_step_refuses_what_needs_gradients(step: str, name: str) -> None:
    value = arguments(step)[name].requires_grad_()
    with pytest.raises(ValueError, match=f"{step}: {name} needs gradients, .*choose the backend 'reference'"):
        call(step, **{name: value})
    with torch.no_grad():
        call(step, **{name: value})


def test_step_refuses_an_unknown_activation() -> None:
    for step in ("linear_gelu", "fused_linear_gelu"):
        with pytest.raises(
            ValueError, match=f"{step}: unknown activation 'swish': choose one of gelu, gelu_tanh, relu"
        ):
            call(step, activation="swish")


def test_step_refuses_rows_wider_than_its_registers() -> None:
    wide = torch.zeros(2, 5000)
    with pytest.raises(ValueError, match="hidden_size is 5000, the kernels take up to 4096"):
        triton.restore(wide, torch.tensor([0]), wide[:1])


def test_step_takes_every_dtype_that_has_a_name() -> None:
    for dtype in TRITON_NAMES:
        assert triton.linear(*(tensor.to(dtype) for tensor in product().values())).dtype == dtype
