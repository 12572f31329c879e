"""The steps of the network, each as fast as its device allows; torch tensors in and out.

`Backend` is the contract of the steps and their plain form; `get_backend` picks who runs them by device, or by name.
The functions here are the same steps for direct use, from `checked`: they pick the backend and check all that they are
given.
"""

from dtbert.kernels.backend import SCORE_COSTS, Backend, BackendName, ScoreCost, Sizes, choose_backend, get_backend
from dtbert.kernels.checked import (
    attention,
    attention_significance,
    embed_layer_norm,
    linear,
    linear_add_layer_norm,
    linear_gelu,
    restore,
    select_tokens,
)
from dtbert.kernels.packing import Kept, Left, Packing, Partials, TokenIds
from dtbert.kernels.reference import ATTENTION_SCORES, Activation, AttentionScore

__all__ = [
    "ATTENTION_SCORES",
    "SCORE_COSTS",
    "Activation",
    "AttentionScore",
    "Backend",
    "BackendName",
    "Kept",
    "Left",
    "Packing",
    "Partials",
    "ScoreCost",
    "Sizes",
    "TokenIds",
    "attention",
    "attention_significance",
    "choose_backend",
    "embed_layer_norm",
    "get_backend",
    "linear",
    "linear_add_layer_norm",
    "linear_gelu",
    "restore",
    "select_tokens",
]
