"""These tests run in a process of their own, which tests/kernels/test_triton.py starts with TRITON_INTERPRET=1.

Elsewhere they are not collected: once triton is imported, its kernels are all interpreted or all compiled.
"""

import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob = ["test_*.py"]

POISON = {torch.int64: -(2**40), torch.int32: -(2**20)}


@pytest.fixture(scope="session", autouse=True)
def _language_looked_through_once() -> None:
    """The interpreter looks through Triton's language at each call of a function; this is a third of these tests' time.

    What it looks for, the builtins that it replaces while a kernel runs, does not change. Its next release may do
    otherwise, and these tests then take longer.
    """
    from triton.runtime import interpreter

    if not {"_patch_builtin", "_patch_attr"} <= vars(interpreter).keys():
        return
    found: dict[Any, list[tuple[str, Any]]] = {}

    def patch_builtin(language: Any, *rest: Any) -> None:
        if language not in found:
            members = inspect.getmembers(language)
            found[language] = [(name, one) for name, one in members if interpreter.tl.core.is_builtin(one)]
        for name, member in found[language]:
            if getattr(language, name) is member:
                interpreter._patch_attr(language, name, member, *rest)

    interpreter._patch_builtin = patch_builtin


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output that a kernel leaves unwritten, in whole or in part, shows."""
    empty: Callable[..., Tensor] = torch.empty

    def poisoned(*args: object, **options: object) -> Tensor:
        tensor = empty(*args, **options)
        return tensor.fill_(float("nan") if tensor.is_floating_point() else POISON.get(tensor.dtype, 1))

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture
def one_row_a_program(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Rows in programs of their own, as on a GPU."""
    # Imported here: where these tests are not collected, triton must stay as it is.
    from dtbert.kernels.triton import layer_norm

    monkeypatch.setattr(layer_norm, "INTERPRETED_ROWS", 1)
    layer_norm.row_config.cache_clear()
    yield
    layer_norm.row_config.cache_clear()
