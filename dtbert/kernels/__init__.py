"""The steps of the network, each as fast as its device allows; torch tensors in and out.

A backend is a module with the functions of `reference`: `reference` itself (any device, differentiable) and
`cpu` (oneDNN products, inference only). `get_backend` picks one by device, or the one that is named.
"""

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from dtbert.kernels import cpu, reference
from dtbert.kernels.reference import ATTENTION_SCORES, Activation, AttentionScore

BackendName = Literal["reference", "cpu"]

__all__ = ["ATTENTION_SCORES", "Activation", "AttentionScore", "Backend", "BackendName", "get_backend"]


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


def get_backend(device: torch.device | str, name: BackendName | None = None) -> Backend:
    """The backend for a device, or the named one.

    Args:
        device: where the tensors are.
        name: ``"reference"`` or ``"cpu"``; by default ``cpu`` on a CPU and ``reference`` elsewhere.

    Raises:
        ValueError: the name is unknown, or the backend does not run on the device.
    """
    device = torch.device(device)
    if name is None:
        name = "cpu" if device.type == "cpu" else "reference"
    if name == "reference":
        return reference
    if name == "cpu":
        if device.type != "cpu":
            raise ValueError(f"the backend 'cpu' needs tensors on the CPU, not on {device}: leave backend out")
        return cpu
    raise ValueError(f"unknown backend {name!r}: choose one of {', '.join(get_args(BackendName))}")
