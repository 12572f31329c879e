"""Which module of kernels serves a device: the backends, and the choice between them."""

import importlib
import importlib.util
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from dtbert.kernels import cpu, reference
from dtbert.kernels.reference import Activation, AttentionScore

BackendName = Literal["reference", "cpu", "triton"]


class Backend(Protocol):
    """What a module must offer to serve as a backend; `reference` documents each step."""

    def embed_layer_norm(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        word: Tensor,
        position: Tensor,
        token_type: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
    ) -> Tensor: ...

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor: ...

    def linear_gelu(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "gelu"
    ) -> Tensor: ...

    def linear_add_layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        keep_indices: Tensor | None = None,
    ) -> Tensor: ...

    def attention(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        *,
        significance: AttentionScore | None = None,
        token_type_ids: Tensor | None = None,
        query_indices: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]: ...

    def attention_significance(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        kind: AttentionScore,
        token_type_ids: Tensor | None = None,
    ) -> Tensor: ...

    def select_tokens(
        self,
        significance: Tensor,
        cu_seqlens: Tensor,
        next_cu_seqlens: Tensor,
        num_kept: int,
        max_seqlen: int,
    ) -> Tensor: ...

    def restore(self, states: Tensor, keep_indices: Tensor, kept_states: Tensor) -> Tensor: ...


def choose_backend(
    device: torch.device | str,
    name: BackendName | None = None,
    *,
    dtype: torch.dtype | None = None,
    head_size: int | None = None,
) -> BackendName:
    """The name of the backend for a device, or the named one once it is sure to run there.

    Args:
        device: where the tensors are.
        name: ``"reference"``, ``"cpu"`` or ``"triton"``. By default ``"cpu"`` on a CPU; ``"triton"`` on a GPU, if it is
            installed and has kernels for the dtype and the head size; else ``"reference"``.
        dtype: of the weights, if known.
        head_size: D, if known.

    Raises:
        ValueError: the name is unknown, or the backend does not run on the device, with the dtype or the head size, or
            is not installed.
    """
    device = torch.device(device)
    if name is None:
        if device.type == "cpu":
            return "cpu"
        return "triton" if device.type == "cuda" and _why_not_triton(device, dtype, head_size) is None else "reference"
    if name not in get_args(BackendName):
        raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(get_args(BackendName))}")
    if name == "cpu" and device.type != "cpu":
        raise ValueError(f"the backend 'cpu' needs tensors on the CPU, not on {device}: leave backend out")
    if name == "triton":
        reason = _why_not_triton(device, dtype, head_size)
        if reason is not None:
            raise ValueError(f"the backend 'triton' {reason}")
    return name


def get_backend(
    device: torch.device | str,
    name: BackendName | None = None,
    *,
    dtype: torch.dtype | None = None,
    head_size: int | None = None,
) -> Backend:
    """The module that `choose_backend` names; arguments and errors are its own."""
    chosen = choose_backend(device, name, dtype=dtype, head_size=head_size)
    if chosen == "triton":
        return _triton()
    return cpu if chosen == "cpu" else reference


def _why_not_triton(device: torch.device, dtype: torch.dtype | None, head_size: int | None) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "needs triton, which is not installed: pip install triton, or choose the backend 'reference'"
    if device.type not in ("cuda", "cpu"):
        return f"runs on a CUDA or ROCm GPU, not on {device}: leave backend out"
    if device.type == "cpu" and not _triton().INTERPRETED:
        return (
            "runs on a GPU, and on the CPU only interpreted, for tests (TRITON_INTERPRET=1 before triton is imported): "
            "move the tensors to a GPU, or leave backend out"
        )
    if dtype is not None and dtype not in _triton().FLOAT_DTYPES:
        return f"computes in float32, bfloat16 and float16, not in {dtype}: choose the backend 'reference'"
    if head_size is not None and head_size > _triton().MAX_HEAD_SIZE:
        return (
            f"takes heads of at most {_triton().MAX_HEAD_SIZE} values, not of {head_size}: "
            "choose the backend 'reference'"
        )
    return None


def _triton() -> Any:
    # Imported when first used: its import takes a second, and triton may be missing.
    return importlib.import_module("dtbert.kernels.triton")
