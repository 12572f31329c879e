"""What all launchers share: how a kernel is launched, and for which GPU.

A step is a kernel and its launcher, which allocates the outputs; it is decorated with `operator`, and looks at nothing
that the kernel does not need: `dtbert.kernels.checked` checks tensors for whoever calls the steps directly.

Triton compiles a kernel anew for an integer that 16 divides or that is 1, and for a pointer that 16 divides. Counts of
tokens differ so from layer to layer, and so do offsets, which are rows of one tensor: every kernel is decorated with
``do_not_specialize`` for the ones and ``do_not_specialize_on_alignment`` for the others.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import local
from typing import Any, ParamSpec, TypeVar

import torch
import triton

P = ParamSpec("P")
R = TypeVar("R")

# Decided when triton is imported: `triton.jit` made interpreted kernels of everything, or of nothing.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Every kernel is compiled for these without a GPU, and the report holds them to these bytes of shared memory a block.
SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}
ARCHITECTURES = tuple(SHARED_MEMORY)


class _Traced(local):
    depth = 0  # in how many steps of which shapes alone are asked this thread is


_traced = _Traced()


def operator(name: str, mutates_args: tuple[str, ...] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make ``torch.ops.dtbert.<name>`` of a function that launches kernels through `launched`.

    torch.compile and torch.export see the operator and no more: what they make runs the function as a plain call does,
    with the same kernels, for nothing could be fused into these. A plain call does not go through the operator, which
    saves 20 to 40 us. The function takes tensors, ints, floats, bools and strings, the first a tensor on the device of
    the launch; it returns new tensors, and changes none but those it names. Without its launches it says what the
    outputs' shapes are.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def plain(*args: P.args, **kwargs: P.kwargs) -> R:
            if INTERPRETED or _one_gpu():
                return function(*args, **kwargs)
            # Triton launches on the current device, whatever the tensors'.
            with torch.cuda.device_of(args[0]):
                return function(*args, **kwargs)

        @functools.wraps(function)
        def shapes(*args: P.args, **kwargs: P.kwargs) -> R:
            _traced.depth += 1
            try:
                return function(*args, **kwargs)
            finally:
                _traced.depth -= 1

        registered = torch.library.custom_op(f"dtbert::{name}", plain, mutates_args=mutates_args)
        registered.register_fake(shapes)

        @functools.wraps(function)
        def step(*args: P.args, **kwargs: P.kwargs) -> R:
            return registered(*args, **kwargs) if torch.compiler.is_compiling() else plain(*args, **kwargs)

        return step

    return decorate


def cdiv(total: int, size: int) -> int:
    """Blocks of a size that hold a total. Triton's own function of the name takes 5 us."""
    return -(-total // size)


def next_power_of_2(number: int) -> int:
    """The least power of two that is not below a number of at least 1."""
    return 1 << (number - 1).bit_length()


def launched(kernel: Any) -> Any:
    """The kernel, ready for ``[grid](...)``; where shapes alone are asked, one that does nothing."""
    return _NO_KERNEL if _traced.depth else kernel


class _NoKernel:
    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return lambda *args, **kwargs: None


_NO_KERNEL = _NoKernel()


@functools.cache
def _one_gpu() -> bool:
    return torch.cuda.device_count() == 1


_pretended: ContextVar[str] = ContextVar("_pretended", default="")


@contextmanager
def pretending(arch: str) -> Iterator[None]:
    """Launchers choose what they would for this architecture, whatever device the tensors are on."""
    before = _pretended.set(arch)
    try:
        yield
    finally:
        _pretended.reset(before)


def architecture(device: torch.device) -> str:
    """``"sm_90"``, ``"gfx942"`` and so on; ``"interpreter"`` for tensors of the interpreter."""
    return _pretended.get() or ("interpreter" if device.type == "cpu" else _architecture(device.index or 0))


@functools.cache
def _architecture(index: int) -> str:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"
