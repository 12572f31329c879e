"""Forked processes: torch's threads stay in the first one, and whoever waits for them in another waits for ever."""

import os
from functools import cache

import torch


@cache
def survive_forks() -> None:
    """From now on a process that is forked from this one computes with one thread, which is its own.

    For more of them, load the model in each process, or start processes by ``spawn`` or ``forkserver``.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_leave_threads)


def _leave_threads() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)
