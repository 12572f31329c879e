"""These tests need a CUDA GPU: scripts/gpu_check.sh runs them on one. Elsewhere they are collected and left out."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.gpu.plugin import BrokenDevice, Recorder, device_is_broken

_left_out = pytest.StashKey[int]()
_POISON = {torch.int64: -(2**40), torch.int32: -(2**20)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", type=Path, help="JSON Lines to which each outcome is added at once")


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        if torch.cuda.is_available():
            config.pluginmanager.register(BrokenDevice(device_is_broken))
    elif config.getoption("--records", default=None):
        config.pluginmanager.register(Recorder(config.getoption("--records")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    here = [item for item in items if item.get_closest_marker("gpu") is not None]
    items[:] = [item for item in items if item.get_closest_marker("gpu") is None]
    config.stash[_left_out] = len(here)
    config.hook.pytest_deselected(items=here)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if config.stash.get(_left_out, 0):
        count = config.stash[_left_out]
        terminalreporter.line(f"tests/gpu: {count} tests left out, for want of a GPU: scripts/gpu_check.sh runs them")


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every output that a kernel leaves unwritten, in whole or in part, shows."""

    def filled(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def allocate_filled(*args: object, **options: object) -> Tensor:
            tensor = allocate(*args, **options)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else _POISON.get(tensor.dtype, 1))

        return allocate_filled

    monkeypatch.setattr(torch, "empty", filled(torch.empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))
