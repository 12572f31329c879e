"""The Triton backend without a GPU: whatever would run there is stood in for, and the Python around it remains."""

import contextlib
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

from dtbert.model import BertConfig, BertForQuestionAnswering

_ARCHITECTURE = "sm_90"


def _places() -> dict[str, tuple[Any, str]]:
    """All that a forward calls which launches a kernel or allocates on a GPU: where it is looked up, and its name."""
    import triton

    return {
        "launches": (triton.JITFunction, "run"),
        "allocations": (torch, "empty"),
        "products": (F, "linear"),
        "gelus": (torch.ops.aten.gelu_, "default"),
        "index_selects": (torch.Tensor, "index_select"),
    }


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Let tensors on ``meta``, which have shapes and no contents, pass for those of a machine with one GPU.

    Raises:
        ImportError: triton is not installed.
        RuntimeError: its kernels are interpreted.
    """
    from dtbert.kernels import backend
    from dtbert.kernels.triton import launch

    if launch.INTERPRETED:
        raise RuntimeError("the kernels are interpreted: unset TRITON_INTERPRET")
    # Cached as what they replace, and so as quick.
    with (
        mock.patch.object(backend, "_why_not_triton", functools.cache(lambda device, sizes: None)),
        launch.pretending(_ARCHITECTURE),
        mock.patch.object(launch, "_one_gpu", functools.cache(lambda: True)),
    ):
        yield


def model_without_weights(**sizes: Any) -> BertForQuestionAnswering:
    """A model in bfloat16 of shapes alone, on the backend ``triton``; within `as_on_a_gpu`."""
    with torch.device("meta"):
        model = BertForQuestionAnswering(BertConfig(**sizes), backend="triton")
    return model.to(torch.bfloat16).eval().requires_grad_(False)


def recorded(forward: Callable[[], object]) -> tuple[Iterator[Any], dict[str, int]]:
    """What the replaced functions return in a forward, over and over in that order; and how many calls of each."""
    functions = {name: getattr(place, attribute) for name, (place, attribute) in _places().items()}
    functions["launches"] = lambda *args, **options: None
    made: list[Any] = []
    calls: Counter[str] = Counter()

    def recording(name: str) -> Callable[..., Any]:
        def record(*args: Any, **options: Any) -> Any:
            # On ``meta`` torch composes some functions of others, in Python: those are not dtbert's calls.
            with _replaced(functions):
                result = functions[name](*args, **options)
            calls[name] += 1
            made.append(result)
            return result

        return record

    with _replaced({name: recording(name) for name in functions}):
        forward()
    return itertools.cycle(made), dict(calls)


@contextlib.contextmanager
def replaying(made: Iterator[Any]) -> Iterator[None]:
    """Within it each replaced function hands out the next of what was recorded, and looks at nothing."""

    def hand_out(*args: object, **options: object) -> Any:
        return next(made)

    with _replaced(dict.fromkeys(_places(), hand_out)):
        yield


@contextlib.contextmanager
def _replaced(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, (place, attribute) in _places().items():
            stack.enter_context(mock.patch.object(place, attribute, functions[name]))
        yield
