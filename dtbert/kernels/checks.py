"""Metadata that the steps refuse: dtypes, devices, shapes and strides. No data is read, so no device is waited for."""

from typing import get_args

import torch
from torch import Tensor

from dtbert.kernels.reference import Activation


def check_matching(step: str, **tensors: Tensor) -> None:
    """Refuse tensors that are not all of one floating dtype, on one device, with contiguous rows."""
    (first_name, first), *others = tensors.items()
    if not first.is_floating_point():
        raise TypeError(f"{step}: {first_name} is {first.dtype}, expected a floating dtype such as torch.float32")
    check_contiguous_rows(step, first_name, first)
    for name, tensor in others:
        if tensor.dtype != first.dtype:
            raise TypeError(f"{step}: {name} is {tensor.dtype}, {first_name} {first.dtype}: they must match")
        check_same_device(step, name, tensor, first)
        check_contiguous_rows(step, name, tensor)


def check_integers(step: str, like: Tensor, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Refuse index tensors of another dtype, on another device than ``like``, or not contiguous."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise TypeError(f"{step}: {name} is {tensor.dtype}, expected {dtype}: convert it with .to({dtype})")
        check_same_device(step, name, tensor, like)
        check_contiguous_rows(step, name, tensor)


def check_same_device(step: str, name: str, tensor: Tensor, like: Tensor) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{step}: {name} is on {tensor.device}, the other tensors on {like.device}: move one of them")


def check_contiguous_rows(step: str, name: str, tensor: Tensor) -> None:
    if tensor.ndim and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{step}: {name} has strides {list(tensor.stride())}, its last dimension must have stride 1: "
            "call .contiguous() on it"
        )


def check_shape(step: str, name: str, tensor: Tensor, *expected: int | None, wanted: str = "") -> None:
    """Refuse a tensor of another shape; None is any size, ``wanted`` what the sizes are in the message."""
    shape = tensor.shape
    fits = len(shape) == len(expected) and all(want in (None, got) for got, want in zip(shape, expected, strict=True))
    if not fits:
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        raise ValueError(f"{step}: {name} has shape {list(shape)}, expected [{sizes}]{wanted and f' ({wanted})'}")


def check_embedding(step: str, ids: dict[str, Tensor], tables: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
    """Refuse ids ``[T]``, tables ``[rows, H]`` and vectors ``[H]`` that do not fit each other."""
    check_matching(step, **tables, **norms)
    word = tables["word"]
    check_shape(step, "word", word, None, None, wanted="rows, hidden size")
    for name, tensor in tables.items():
        check_shape(step, name, tensor, None, word.shape[1], wanted="rows, hidden size")
    for name, tensor in norms.items():
        check_shape(step, name, tensor, word.shape[1], wanted="hidden size")
    check_shape(step, "input_ids", ids["input_ids"], None, wanted="tokens")
    for name, tensor in ids.items():
        check_shape(step, name, tensor, ids["input_ids"].shape[0], wanted="tokens")
    check_integers(step, word, torch.int64, **ids)


def check_product(step: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse operands of ``x @ weight.T + bias`` that do not fit each other."""
    check_matching(step, x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    check_shape(step, "x", x, None, None, wanted="tokens, in")
    check_shape(step, "weight", weight, None, x.shape[1], wanted="out, in")
    if bias is not None:
        check_shape(step, "bias", bias, weight.shape[0], wanted="out")


def check_activation(step: str, activation: str) -> None:
    if activation not in get_args(Activation):
        raise ValueError(f"{step}: unknown activation {activation!r}: choose one of {', '.join(get_args(Activation))}")


def check_gather(
    step: str, rows: int, vectors: dict[str, Tensor], residual: Tensor, keep_indices: Tensor | None
) -> None:
    """Refuse a residual ``[T, H]``, vectors ``[H]`` and ``keep_indices`` that do not fit ``rows`` kept tokens."""
    hidden_size = vectors["bias"].shape[-1] if vectors["bias"].ndim else 0
    for name, tensor in vectors.items():
        check_shape(step, name, tensor, hidden_size, wanted="hidden size")
    tokens = rows if keep_indices is None else None
    check_shape(step, "residual", residual, tokens, hidden_size, wanted="tokens, hidden size")
    if keep_indices is not None:
        check_shape(step, "keep_indices", keep_indices, rows, wanted="kept tokens")
        check_integers(step, residual, torch.int64, keep_indices=keep_indices)


def check_selection(step: str, significance: Tensor, cu_seqlens: Tensor, next_cu_seqlens: Tensor) -> None:
    """Refuse scores ``[T]`` and offsets ``[B + 1]`` that do not fit each other."""
    if significance.dtype != torch.float32:
        raise TypeError(f"{step}: significance is {significance.dtype}, expected torch.float32: call .float() on it")
    check_shape(step, "significance", significance, None, wanted="tokens")
    check_contiguous_rows(step, "significance", significance)
    check_offsets(step, "cu_seqlens", cu_seqlens, significance)
    check_offsets(step, "next_cu_seqlens", next_cu_seqlens, significance)
    check_shape(step, "next_cu_seqlens", next_cu_seqlens, len(cu_seqlens), wanted="sequences + 1")


def check_offsets(step: str, name: str, cu_seqlens: Tensor, like: Tensor) -> None:
    """Refuse offsets that are not int32 ``[B + 1]`` on the device of ``like``."""
    check_shape(step, name, cu_seqlens, None, wanted="sequences + 1")
    if len(cu_seqlens) == 0:
        raise ValueError(f"{step}: {name} is empty, expected one offset more than sequences: start it with 0")
    check_integers(step, like, torch.int32, **{name: cu_seqlens})


def check_restore(step: str, states: Tensor, keep_indices: Tensor, kept_states: Tensor) -> None:
    """Refuse states ``[T, H]``, ``keep_indices`` ``[K]`` and kept states ``[K, H]`` that do not fit each other."""
    check_matching(step, states=states, kept_states=kept_states)
    check_shape(step, "states", states, None, None, wanted="tokens, hidden size")
    check_shape(step, "kept_states", kept_states, None, states.shape[1], wanted="kept tokens, hidden size")
    check_shape(step, "keep_indices", keep_indices, kept_states.shape[0], wanted="kept tokens")
    check_integers(step, states, torch.int64, keep_indices=keep_indices)
