"""What is wrong with tensors: metadata, looked at without a wait for the device, and contents, all in one wait."""

import functools
import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar, get_type_hints

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")

# Whether something is wrong, as a bool on the device, and what to say then.
Fault = tuple[Tensor, Callable[[], str]]


def of_right_kinds(step: Callable[P, R]) -> Callable[P, R]:
    """The step, which raises TypeError where an argument is no tensor or number as it is annotated."""
    signature, hints = inspect.signature(step), get_type_hints(step)
    expected = {Tensor: Tensor, Tensor | None: Tensor | None, int: int, float: float | int}
    kinds = {name: expected[hint] for name, hint in hints.items() if name in signature.parameters and hint in expected}

    @functools.wraps(step)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            return step(*args, **kwargs)
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in kinds and (not isinstance(value, kinds[name]) or isinstance(value, bool)):
                wanted = {Tensor: "a tensor", Tensor | None: "a tensor or None", int: "a whole number"}
                expects = wanted.get(hints[name], "a number")
                raise TypeError(f"{step.__name__}: {name} is {type(value).__name__}, expected {expects}")
        return step(*args, **kwargs)

    return checked


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


def check_product(step: str, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Refuse operands of ``x @ weight.T + bias`` that do not fit each other."""
    check_matching(step, x=x, weight=weight, **({} if bias is None else {"bias": bias}))
    check_shape(step, "x", x, None, None, wanted="tokens, in")
    check_shape(step, "weight", weight, None, x.shape[1], wanted="out, in")
    if bias is not None:
        check_shape(step, "bias", bias, weight.shape[0], wanted="out")


def check_offsets(step: str, name: str, cu_seqlens: Tensor, like: Tensor) -> None:
    """Refuse offsets that are not int32 ``[B + 1]`` on the device of ``like``."""
    check_shape(step, name, cu_seqlens, None, wanted="sequences + 1")
    if len(cu_seqlens) == 0:
        raise ValueError(f"{step}: {name} is empty, expected one offset more than sequences: start it with 0")
    check_integers(step, like, torch.int32, **{name: cu_seqlens})


def check_rows(step: str, name: str, rows: Tensor, count: int | None, like: Tensor) -> None:
    """Refuse indices that are not int64 ``[count]`` on the device of ``like``."""
    check_shape(step, name, rows, count, wanted="kept tokens")
    check_integers(step, like, torch.int64, **{name: rows})


def refuse(step: str, *faults: Fault) -> None:
    """Raise ValueError for the first fault; one wait for the device, a second one to say what came."""
    present = torch.stack([wrong for wrong, _ in faults]).tolist()
    for wrong, (_, say) in zip(present, faults, strict=True):
        if wrong:
            raise ValueError(f"{step}: {say()}")


def outside(name: str, ids: Tensor, size: int) -> Fault:
    wrong = (ids < 0) | (ids >= size)

    def say() -> str:
        token = first_true(wrong)
        return f"{name} holds {ids[token].item()} at token {token}, its table rows 0 to {size - 1}"

    return wrong.any(), say


def not_ascending(name: str, indices: Tensor, rows: int) -> tuple[Fault, Fault]:
    outside, falling = (indices < 0) | (indices >= rows), indices.diff() <= 0
    return (
        (
            outside.any(),
            lambda: f"{name} holds {indices[first_true(outside)].item()}, there are the rows 0 to {rows - 1}",
        ),
        (
            falling.any(),
            lambda: (
                f"{name} must ascend, but {indices[first_true(falling)].item()} comes before "
                f"{indices[first_true(falling) + 1].item()}"
            ),
        ),
    )


def not_offsets(name: str, cu_seqlens: Tensor, of: str, rows: int) -> tuple[Fault, Fault, Fault]:
    falling = cu_seqlens.diff() < 0
    return (
        (cu_seqlens[0] != 0, lambda: f"{name} starts at {cu_seqlens[0].item()}, expected 0"),
        (
            falling.any(),
            lambda: (
                f"{name} falls from {cu_seqlens[first_true(falling)].item()} to "
                f"{cu_seqlens[first_true(falling) + 1].item()} at sequence {first_true(falling)}: offsets must not fall"
            ),
        ),
        (
            cu_seqlens[-1] != rows,
            lambda: f"{name} ends at {cu_seqlens[-1].item()}, {of} {'is' if of == 'num_kept' else 'has'} {rows}",
        ),
    )


def longer_than(cu_seqlens: Tensor, max_seqlen: int) -> Fault:
    longest = cu_seqlens.diff().amax() if len(cu_seqlens) > 1 else cu_seqlens[0]
    return (
        longest > max_seqlen,
        lambda: f"max_seqlen is {max_seqlen}, the longest sequence of cu_seqlens has {longest.item()} tokens",
    )


def in_another_sequence(query_indices: Tensor, cu_seqlens_q: Tensor, cu_seqlens: Tensor) -> Fault:
    place = torch.arange(len(query_indices), dtype=torch.int32, device=query_indices.device)
    asked = torch.searchsorted(cu_seqlens_q[1:], place, right=True)
    holds = torch.searchsorted(cu_seqlens[1:], query_indices.int(), right=True)
    wrong = asked != holds

    def say() -> str:
        query = first_true(wrong)
        return (
            f"query_indices holds {query_indices[query].item()} for sequence {asked[query].item()}, "
            f"but that row belongs to sequence {holds[query].item()}"
        )

    return wrong.any(), say


def first_true(wrong: Tensor) -> int:
    return int(wrong.int().argmax())
