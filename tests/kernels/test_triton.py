"""Runs the tests of the Triton kernels in the interpreter, in processes of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "triton"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))
# Few processes: to start one takes as long as most files' tests. More than one: they run side by side, and so cut
# that the slowest files, of graphs, of the model and of selection, lie apart.
SHARES = [FILES[first::4] for first in range(4)]


@pytest.mark.parametrize("files", SHARES, ids=lambda files: "-".join(file[5:-3] for file in files))
def test_kernels_pass_interpreted(files: list[str]) -> None:
    # Collected elsewhere, these files would be left out: their conftest.py reads the variable.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *(FOLDER / file for file in files)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=FOLDER.parents[2])
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_kernel_has_tests() -> None:
    kernels = Path(__file__).parents[2] / "dtbert/kernels/triton"
    defines_one = re.compile(r"^def _\w+_kernel\(", re.MULTILINE)
    steps = {path.stem for path in kernels.glob("*.py") if defines_one.search(path.read_text("utf-8"))}
    assert steps == {
        "add_norm",
        "attention",
        "embed",
        "float8",
        "linear",
        "overlap",
        "scatter",
        "select",
        "significance",
    }
    assert {f"test_{step}.py" for step in steps} <= set(FILES)
