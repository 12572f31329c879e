"""What the public steps take and refuse where the kernels are asked for, and which sizes the kernels have."""

import pytest
import torch
from torch import Tensor

from dtbert import kernels
from dtbert.kernels import Sizes, choose_backend, get_backend, triton
from dtbert.kernels.triton.launch import FLOAT_DTYPES, INTERPRETED, architecture
from tests.kernels.triton.cases import far_apart

H, T, K = 8, 5, 3


def arguments(step: str) -> dict[str, object]:
    """A right call of the step, and one that every kernel of it sees."""
    generator = torch.Generator().manual_seed(0)
    rand = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    offsets = lambda *values: torch.tensor(values, dtype=torch.int32)  # noqa: E731
    keep_indices, norm = torch.tensor([0, 2, 4]), {"norm_weight": rand(H), "norm_bias": rand(H), "eps": 1e-5}
    ids = {name: torch.arange(T) % 2 for name in ("input_ids", "position_ids", "token_type_ids")}
    tables = {name: rand(4, H) for name in ("word", "position", "token_type")}
    product = {"x": rand(K, H), "weight": rand(H, H), "bias": rand(H)}
    attended = {"qkv": rand(T, 3 * H), "cu_seqlens": offsets(0, T), "max_seqlen": T, "num_heads": 2}
    return {
        "embed_layer_norm": {**ids, **tables, **norm},
        "linear": product,
        "linear_gelu": product,
        "linear_add_layer_norm": {**product, "residual": rand(T, H), **norm, "keep_indices": keep_indices},
        "attention": {**attended, "query_indices": keep_indices, "cu_seqlens_q": offsets(0, K)},
        "attention_significance": {**attended, "kind": "from_question", "token_type_ids": torch.arange(T) % 2},
        "select_tokens": {
            "significance": rand(T),
            "cu_seqlens": offsets(0, T),
            "next_cu_seqlens": offsets(0, K),
            "num_kept": K,
            "max_seqlen": T,
        },
        "restore": {"states": rand(T, H), "keep_indices": keep_indices, "kept_states": rand(K, H)},
    }[step]


STEPS = (
    *("embed_layer_norm", "linear", "linear_gelu", "linear_add_layer_norm"),
    *("attention", "attention_significance", "select_tokens", "restore"),
)
TENSORS = [(step, name) for step in STEPS for name, value in arguments(step).items() if isinstance(value, Tensor)]
FLOATS = [(step, name) for step, name in TENSORS if arguments(step)[name].is_floating_point()]
# The argument that sets dtype, device and sizes for the others.
FIRST = ("x", "word", "states", "significance", "qkv")


def call(step: str, backend: str = "triton", **changed: object) -> object:
    return getattr(kernels, step)(**{**arguments(step), **changed}, backend=backend)


def test_kernels_are_interpreted_here() -> None:
    assert INTERPRETED
    assert architecture(torch.device("cpu")) == "interpreter"


@pytest.mark.parametrize("step", STEPS)
def test_step_gives_what_the_reference_gives(step: str) -> None:
    torch.testing.assert_close(call(step), call(step, "reference"), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", kernels.ATTENTION_SCORES)
def test_attention_gives_every_score(kind: str) -> None:
    changed = {"query_indices": None, "cu_seqlens_q": None, "token_type_ids": torch.arange(T) % 2}
    got, want = (call("attention", name, significance=kind, **changed) for name in ("triton", "reference"))
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_restore_leaves_its_input_as_it_is() -> None:
    states = arguments("restore")["states"]
    before = states.clone()
    assert not torch.equal(call("restore", states=states), before)
    assert torch.equal(states, before)


@pytest.mark.parametrize(("step", "name"), TENSORS)
def test_step_refuses_another_dtype(step: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{step}: .*torch.int16") as raised:
        call(step, **{name: arguments(step)[name].to(torch.int16)})
    assert name in str(raised.value)


@pytest.mark.parametrize("step", STEPS)
def test_step_refuses_float64(step: str) -> None:
    doubled = {name: arguments(step)[name].double() for of, name in FLOATS if of == step}
    # Significance is float32 on every backend.
    error = TypeError if step == "select_tokens" else ValueError
    with pytest.raises(error, match=r"torch\.float64"):
        call(step, **doubled)


@pytest.mark.parametrize(("step", "name"), [pair for pair in FLOATS if pair[1] != "qkv"])
def test_step_refuses_mixed_precision(step: str, name: str) -> None:
    with pytest.raises(TypeError, match=f"^{step}: .*torch.float16"):
        call(step, **{name: arguments(step)[name].half()})


@pytest.mark.parametrize(("step", "name"), [pair for pair in TENSORS if pair[1] not in FIRST])
def test_step_refuses_tensors_on_different_devices(step: str, name: str) -> None:
    with pytest.raises(ValueError, match=f"^{step}: {name} is on meta, the other tensors on cpu"):
        call(step, **{name: arguments(step)[name].to("meta")})


@pytest.mark.parametrize(("step", "name"), TENSORS)
def test_step_refuses_another_shape_and_says_both(step: str, name: str) -> None:
    value = arguments(step)[name]
    with pytest.raises(ValueError, match=rf"^{step}: .* has shape \[.*\], expected \[.*\]"):
        call(step, **{name: value[None]})


@pytest.mark.parametrize(("step", "name"), TENSORS)
def test_step_refuses_another_size(step: str, name: str) -> None:
    value = arguments(step)[name]
    says_both = r"has shape \[.*\], expected \[.*\]|ends at \d+, .* has \d+|has \d+ columns, which is no multiple of"
    with pytest.raises(ValueError, match=rf"^{step}: .*({says_both})"):
        call(step, **{name: torch.zeros(*value.shape[:-1], value.shape[-1] + 1, dtype=value.dtype)})


@pytest.mark.parametrize(("step", "name"), TENSORS)
def test_step_refuses_rows_that_are_not_contiguous(step: str, name: str) -> None:
    value = arguments(step)[name]
    wide = torch.zeros(*value.shape[:-1], 2 * value.shape[-1], dtype=value.dtype)
    with pytest.raises(ValueError, match=rf"^{step}: {name} has strides \[.*\].*contiguous"):
        call(step, **{name: wide[..., ::2]})


@pytest.mark.parametrize(("step", "name"), FLOATS)
def test_step_refuses_what_needs_gradients(step: str, name: str) -> None:
    value = arguments(step)[name].requires_grad_()
    with pytest.raises(ValueError, match=f"^{step}: gradients are needed, .*choose the backend 'reference'"):
        call(step, **{name: value})
    with torch.no_grad():
        call(step, **{name: value})


def test_step_refuses_an_unknown_activation() -> None:
    with pytest.raises(ValueError, match=r"^linear_gelu: unknown activation 'mish': choose one of gelu, gelu_tanh"):
        call("linear_gelu", activation="mish")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("limit", "beyond", "message"),
    [
        (Sizes(torch.float32), Sizes(torch.float64), "in float32, bfloat16 and float16, not in torch.float64"),
        (Sizes(head_size=128), Sizes(head_size=129), "heads of at most 128 values, not of 129"),
        (Sizes(hidden_size=4096), Sizes(hidden_size=4097), "states of at most 4,096 values, not of 4,097"),
        (Sizes(max_seqlen=16384), Sizes(max_seqlen=16385), "sequences of at most 16,384 tokens, not of 16,385"),
        (
            Sizes(sequence_span=2**31 - 1),
            Sizes(sequence_span=2**31),
            "sequences that span at most 2,147,483,647 values, not of 2,147,483,648",
        ),
    ],
    ids=["dtype", "head size", "hidden size", "sequence", "span"],
)
def test_sizes_beyond_the_kernels_are_refused(device: str, limit: Sizes, beyond: Sizes, message: str) -> None:
    assert choose_backend(device, "triton", limit) == "triton"
    with pytest.raises(ValueError, match=f"^the backend 'triton' .*{message}: choose the backend 'reference'$"):
        choose_backend(device, "triton", beyond)
    # Where nobody names a backend, another one is chosen.
    assert choose_backend(device, None, beyond) == {"cpu": "cpu", "cuda": "reference"}[device]


def test_kernels_need_a_gpu_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert get_backend("cpu", "triton").name == get_backend("cuda").name == "triton"
    monkeypatch.setattr(triton, "INTERPRETED", False)
    with pytest.raises(ValueError, match="runs on a GPU, and on the CPU only interpreted, for tests"):
        choose_backend("cpu", "triton")
    with pytest.raises(ValueError, match="runs on a CUDA or ROCm GPU, not on mps"):
        choose_backend("mps", "triton")
    assert choose_backend("cuda", "triton") == "triton"


def test_steps_refuse_sizes_beyond_the_kernels() -> None:
    keep_indices, wide = torch.tensor([0]), torch.zeros(2, 4097)
    with pytest.raises(ValueError, match="states of at most 4,096 values, not of 4,097"):
        kernels.restore(wide, keep_indices, wide[:1], backend="triton")
    for step in ("attention", "attention_significance"):
        with pytest.raises(ValueError, match="heads of at most 128 values, not of 130"):
            call(step, qkv=torch.zeros(T, 390), num_heads=1)
        with pytest.raises(ValueError, match=r"span at most 2,147,483,647 values, not of 5,368,709,120"):
            call(step, qkv=far_apart(T, 3 * H, torch.float16))
    scores, long = torch.zeros(16385), torch.tensor([0, 16385], dtype=torch.int32)
    offsets = {"cu_seqlens": long, "max_seqlen": 16385}
    with pytest.raises(ValueError, match="sequences of at most 16,384 tokens, not of 16,385"):
        call("select_tokens", significance=scores, **offsets)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_steps_take_every_dtype(dtype: torch.dtype) -> None:
    for step in STEPS:
        if step == "select_tokens":  # scores are float32 whatever the dtype of the states
            continue
        got = call(step, **{name: arguments(step)[name].to(dtype) for of, name in FLOATS if of == step})
        got = got[0] if step == "attention" else got
        assert got.dtype == (torch.float32 if step == "attention_significance" else dtype)
