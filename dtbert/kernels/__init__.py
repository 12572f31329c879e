"""The steps of the network, each as fast as its device allows; torch tensors in and out.

A backend is a module with the functions of `reference`: `reference` itself (any device, differentiable), `cpu` (oneDNN
products) and `triton` (fused kernels for a GPU), the last two for inference only. `get_backend` picks one by device, or
the one that is named. The functions here are the same steps for direct use, from `steps`: they pick the backend and
check all that they are given.
"""

from dtbert.kernels import cpu, reference
from dtbert.kernels.backend import Backend, BackendName, choose_backend, get_backend
from dtbert.kernels.reference import ATTENTION_SCORES, Activation, AttentionScore
from dtbert.kernels.steps import (
    attention,
    attention_significance,
    embed_layer_norm,
    linear,
    linear_add_layer_norm,
    linear_gelu,
    restore,
    select_tokens,
)

__all__ = [
    "ATTENTION_SCORES",
    "Activation",
    "AttentionScore",
    "Backend",
    "BackendName",
    "attention",
    "attention_significance",
    "choose_backend",
    "cpu",
    "embed_layer_norm",
    "get_backend",
    "linear",
    "linear_add_layer_norm",
    "linear_gelu",
    "reference",
    "restore",
    "select_tokens",
]
