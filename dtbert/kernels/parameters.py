"""The network's parameters, grouped as the steps take them: each knows its name and the layer that it belongs to.

They are modules, so that `state_dict`, `to` and optimizers find them; what is computed with them is the backend's.
"""

from collections.abc import Callable
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn

from dtbert.kernels.float8 import FLOAT8

M = TypeVar("M", bound=nn.Module)


class _Pair(nn.Module):
    """A weight and a bias."""

    @property
    def weight_and_bias(self) -> tuple[Tensor, Tensor]:
        """Both in one look: each by its name would cost a microsecond."""
        parameters = self._parameters
        return parameters["weight"], parameters["bias"]  # type: ignore[return-value]


class Linear(_Pair):
    """A weight ``[out, in]`` and a bias ``[out]``.

    Attributes:
        name: what the product is called: ``"qkv"``, ``"attention_output"``, ``"intermediate"``, ``"output"`` and so on.
        layer: 0-based index of its layer; None outside of them.
        scale: float32 ``[out]``, of a weight in int8 or fp8: ``weight * scale[:, None]`` is meant; else None.
    """

    scale: Tensor | None = None
    # Of the layout that a backend gave the weight: the plain weight of it.
    _unpack: Callable[[Tensor], Tensor] | None = None

    def __init__(self, in_features: int, out_features: int, name: str = "linear", layer: int | None = None) -> None:
        super().__init__()
        self.name, self.layer = name, layer
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))

    def hold_scaled(self, values: Tensor, scale: Tensor) -> None:
        """Take a weight in int8 or fp8 ``[out, in]``, with its scale, float32 ``[out]``; it cannot be trained."""
        self.to_plain()
        self.weight, self.scale = nn.Parameter(values, requires_grad=False), scale

    def lay_out(self, weight: Tensor, unpack: Callable[[Tensor], Tensor] = Tensor.to_dense) -> None:
        """Hold the same weight in another layout; it stays the parameter that an optimizer knows.

        Args:
            weight: laid out.
            unpack: the plain weight of it.

        Raises:
            RuntimeError: a graph of gradients, or a weak reference, needs it as it is.
        """
        self._hold(weight)
        self._unpack = unpack

    @property
    def scaled_dtype(self) -> torch.dtype | None:
        """int8 or fp8, of a weight with a scale, whatever its layout; else None."""
        if self.scale is None:
            return None
        return FLOAT8 if self.weight.dtype == FLOAT8 else torch.int8

    @property
    def laid_out(self) -> bool:
        """Whether the weight has a backend's own layout: that can neither be moved, copied, saved nor trained."""
        return self._unpack is not None

    @property
    def plain_weight(self) -> Tensor:
        """The weight ``[out, in]`` without its gradient, whatever its layout."""
        weight = self.weight.detach()
        return weight if self._unpack is None else self._unpack(weight)

    def to_plain(self) -> None:
        """Bring the weight back from a backend's own layout."""
        if not self.laid_out:
            return
        plain = self.plain_weight
        self._unpack = None
        try:
            self._hold(plain)
        except RuntimeError:
            self.weight = nn.Parameter(plain, requires_grad=self.weight.requires_grad)

    def _hold(self, weight: Tensor) -> None:
        held = nn.Parameter(weight, requires_grad=self.weight.requires_grad)
        if isinstance(self.weight, nn.Parameter):
            torch.utils.swap_tensors(self.weight, held)
        else:  # of `of_tensors`: somebody else's tensor, which stays as it is
            self._parameters["weight"] = held

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        self.to_plain()

        def moved(tensor: Tensor) -> Tensor:
            # A change of dtype is for floats, which fp8 is to torch: without its scale it would mean something else.
            return fn(tensor.view(torch.int8)).view(FLOAT8) if tensor.dtype == FLOAT8 else fn(tensor)

        super()._apply(moved, *args, **kwargs)  # type: ignore[no-untyped-call]
        if self.scale is not None:
            self.scale = self.scale.to(self.weight.device)  # float32, whatever the dtype of the states becomes
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.laid_out:
            destination[f"{prefix}weight"] = self.plain_weight
        if self.scale is not None:
            destination[f"{prefix}scale"] = self.scale

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        self.to_plain()
        weight, scale = state_dict.get(f"{prefix}weight"), state_dict.pop(f"{prefix}scale", None)
        if weight is not None and (scale is not None or self.scale is not None):
            # From a weight in 8 bit to a float one, or from one in 8 bit.
            device = self.weight.device
            self.weight = nn.Parameter(torch.empty_like(weight, device=device), requires_grad=False)
            # On no device yet, it is assigned, not copied.
            self.scale = scale if scale is None or device.type == "meta" else scale.to(device, copy=True)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if self.laid_out:
            plain = nn.Parameter(self.plain_weight, requires_grad=False)
            state |= {"_parameters": {**self._parameters, "weight": plain}, "_unpack": None}
        return state


class LayerNorm(_Pair):
    """A weight and a bias ``[H]``; ``eps`` is added to the variance."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))


class Embeddings(nn.Module):
    """Word, position and segment tables ``[rows, H]``, and the LayerNorm over their sum."""

    def __init__(self, vocab_size: int, positions: int, token_types: int, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.word = nn.Parameter(torch.empty(vocab_size, hidden_size))
        self.position = nn.Parameter(torch.empty(positions, hidden_size))
        self.token_type = nn.Parameter(torch.empty(token_types, hidden_size))
        self.norm = LayerNorm(hidden_size, eps)


def of_tensors(kind: type[M], **values: Tensor | nn.Module | float | None) -> M:
    """A `Linear`, `LayerNorm` or `Embeddings` of given tensors, as they are: gradients flow to them."""
    module = kind.__new__(kind)
    nn.Module.__init__(module)
    for name, value in values.items():
        if isinstance(value, nn.Module | float | int):
            setattr(module, name, value)
        else:
            module._parameters[name] = value  # type: ignore[assignment]
    return module
