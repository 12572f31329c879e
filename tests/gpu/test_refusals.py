"""Bad input is refused before anything is launched, and the device goes on working."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from dtbert import kernels
from dtbert.kernels import Sizes, choose_backend, get_backend
from tests.gpu.cases import offsets, randn

pytestmark = pytest.mark.gpu

H = 128


@pytest.fixture(autouse=True)
def _device_still_works() -> Iterator[None]:
    yield
    torch.cuda.synchronize()
    assert float(torch.ones(4, device="cuda").sum()) == 4


def attention_arguments() -> dict[str, Any]:
    return {
        "qkv": randn(30, 3 * H, dtype=torch.bfloat16),
        "cu_seqlens": offsets([10, 20]),
        "max_seqlen": 20,
        "num_heads": 2,
    }


@pytest.mark.parametrize(
    ("changed", "error"),
    [
        ({"qkv": torch.zeros(30, 3 * H)}, ValueError),
        ({"qkv": torch.zeros(30, 3 * H, dtype=torch.int64)}, TypeError),
        ({"num_heads": 5}, ValueError),
        ({"num_heads": 0}, ValueError),
        ({"cu_seqlens": torch.tensor([0, 10, 30], dtype=torch.int32)}, ValueError),
        ({"cu_seqlens": torch.tensor([0, 10, 30])}, TypeError),
        ({"significance": "loudest"}, ValueError),
        ({"significance": "from_question"}, ValueError),
        ({"query_indices": torch.zeros(1, dtype=torch.int64)}, ValueError),
    ],
    ids=["cpu", "integers", "heads", "no-heads", "offsets-cpu", "offsets-int64", "score", "segments", "half-a-pair"],
)
@pytest.mark.parametrize("backend", [None, "triton"])
def test_attention_refuses(backend: Any, changed: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match="attention"):
        kernels.attention(**{**attention_arguments(), **changed}, backend=backend)


@pytest.mark.parametrize("bad", [[0, 20, 10], [0, 10, 31], [0, 10, 29], [1, 10, 30], [0, -5, 30]], ids=str)
def test_attention_refuses_offsets_that_do_not_fit(bad: list[int]) -> None:
    cu_seqlens = torch.tensor(bad, dtype=torch.int32, device="cuda")
    with pytest.raises(ValueError, match="cu_seqlens"):
        kernels.attention(**{**attention_arguments(), "cu_seqlens": cu_seqlens})


@pytest.mark.parametrize("bad", [[-1, 3], [3, 30], [5, 4], [4, 4]], ids=str)
def test_steps_refuse_keep_indices_that_do_not_fit(bad: list[int]) -> None:
    keep = torch.tensor(bad, device="cuda")
    states, kept = randn(30, H, dtype=torch.bfloat16), randn(2, H, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="keep_indices"):
        kernels.restore(states, keep, kept)


def test_embed_layer_norm_refuses_ids_outside_their_tables() -> None:
    tables = [randn(rows, H, dtype=torch.bfloat16) for rows in (50, 30, 2)]
    norms = [randn(H, dtype=torch.bfloat16) for _ in range(2)]
    ids = [torch.zeros(3, dtype=torch.int64, device="cuda") for _ in tables]
    ids[0][1] = 50
    with pytest.raises(ValueError, match="input_ids"):
        kernels.embed_layer_norm(*ids, *tables, *norms, 1e-12)


def test_kernels_refuse_float64_and_gradients() -> None:
    arguments = attention_arguments()
    with pytest.raises(ValueError, match="float64"):
        kernels.attention(**{**arguments, "qkv": arguments["qkv"].double()}, backend="triton")
    with pytest.raises(ValueError, match="gradients"):
        kernels.attention(**{**arguments, "qkv": arguments["qkv"].requires_grad_()}, backend="triton")


def test_kernels_refuse_heads_that_are_too_large() -> None:
    qkv = randn(30, 3 * 2 * 256, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="256"):
        kernels.attention(qkv, offsets([10, 20]), 20, 2, backend="triton")


TOO_LARGE = [
    Sizes(dtype=torch.float64),
    Sizes(head_size=129),
    Sizes(hidden_size=4097),
    Sizes(max_seqlen=16385),
]


@pytest.mark.parametrize("sizes", TOO_LARGE, ids=["float64", "head-size", "hidden-size", "max-seqlen"])
def test_choose_backend_leaves_to_the_reference_what_the_kernels_do_not_take(sizes: Sizes) -> None:
    assert choose_backend("cuda") == "triton"
    assert choose_backend("cuda", sizes=sizes) == "reference"
    assert get_backend("cuda", sizes=sizes).name == "reference"
    with pytest.raises(ValueError, match="choose the backend 'reference'"):
        choose_backend("cuda", "triton", sizes)


def test_choose_backend_refuses_compiled_kernels_on_a_cpu_and_the_cpu_on_a_gpu() -> None:
    with pytest.raises(ValueError, match="TRITON_INTERPRET"):
        choose_backend("cpu", "triton")
    with pytest.raises(ValueError, match="leave backend out"):
        choose_backend("cuda", "cpu")


@pytest.mark.parametrize("backend", [None, "reference"])
def test_reference_computes_what_the_kernels_do_not(backend: Any) -> None:
    arguments = attention_arguments()
    arguments["qkv"] = arguments["qkv"].double()
    context, _ = kernels.attention(**arguments, backend=backend)
    assert context.dtype == torch.float64
