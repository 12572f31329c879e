"""A model in a process that was forked after it was loaded."""

import os
import select
import signal
from collections.abc import Iterator

import pytest
import torch

import dtbert

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
CONTEXT = "Ada wrote the letter in London. " * 60


@pytest.fixture
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_two_threads")
def test_forked_process_answers_with_one_thread() -> None:
    answerer = dtbert.QuestionAnswerer.load()
    expected = answerer("Who wrote it?", CONTEXT)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        found = answerer("Who wrote it?", CONTEXT)
        os.write(writer, f"{found.text} {found.start} {torch.get_num_threads()}".encode())
        os._exit(0)
    ready = select.select([reader], [], [], 60)[0]
    if not ready:
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert ready, "the forked process waits for threads that it has not"
    assert os.read(reader, 1000).decode() == f"{expected.text} {expected.start} 1"
    assert torch.get_num_threads() == 2
