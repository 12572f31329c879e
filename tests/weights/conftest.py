"""A hub on loopback in place of the real one, and a checkpoint to publish there."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from torch import Tensor

from tests.weights.checkpoints import make_tensors, write
from tests.weights.hub_server import Hub, serve

Connect = Callable[[Hub], Hub]


@pytest.fixture
def connect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Connect]:
    """Start a hub and make it the one that huggingface_hub asks, with an empty cache."""
    running = []

    def start(hub: Hub) -> Hub:
        server = serve(hub)
        server.__enter__()
        running.append(server)
        point_to(hub.endpoint, monkeypatch)
        return hub

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"), raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield start
    for server in running:
        server.__exit__(None, None, None)


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    return make_tensors()


@pytest.fixture
def files(tmp_path: Path, tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return files_of(write(tmp_path / "published", tensors))
