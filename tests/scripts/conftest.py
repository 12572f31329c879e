"""What the tests of several scripts have in common."""

from pathlib import Path

import pytest


@pytest.fixture
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules beside the scripts can be imported, as the scripts import them."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "scripts")
