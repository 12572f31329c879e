"""A model in a process that was forked after it was loaded."""

import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import dtbert

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
ROOT = Path(__file__).parents[2]
CONTEXT = "Ada wrote the letter in London. " * 60


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def in_a_fork(work: Callable[[], str]) -> str:
    """What a function gives in a process that is forked from this one."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, work().encode())
        finally:
            os._exit(0)
    ready = select.select([reader], [], [], 60)[0]
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ready, "the forked process waits for threads that it has not"
    return os.read(reader, 1000).decode()


@pytest.mark.usefixtures("_two_threads")
def test_forked_process_answers_with_one_thread() -> None:
    answerer = dtbert.QuestionAnswerer.load()
    expected = answerer("Who wrote it?", CONTEXT)

    def work() -> str:
        (found,) = answerer.answer_many([("Who wrote it?", CONTEXT)])
        return f"{found.text} {found.start} {torch.get_num_threads()}"

    assert in_a_fork(work) == f"{expected.text} {expected.start} 1"
    assert torch.get_num_threads() == 2


# In a process that has prepared no model.
TRAINABLE = """
import torch
from dtbert.weights import load_trainable
from tests.model.test_forks import in_a_fork

torch.set_num_threads(2)
model, ids = load_trainable(None).eval(), torch.ones(2, 300, dtype=torch.int64)
with torch.no_grad():
    model(ids)
    print(in_a_fork(lambda: str(model(ids).start_logits.isfinite().all().item())))
"""


def test_forked_process_runs_a_model_that_was_never_prepared() -> None:
    result = subprocess.run([sys.executable, "-c", TRAINABLE], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout == "True\n", result.stderr
