"""Which process runs a trial, and whether it has ended: known on the machine where it runs, if that is a Linux."""

import os
from pathlib import Path

_PROC = Path("/proc")


def this_process() -> list[str | int] | None:
    """What names this process in a study: where it runs, its number, and when it began; None where that is not told."""
    where, began = _place(), _beginning(os.getpid())
    return None if where is None or began is None else [where, os.getpid(), began]


def has_ended(process: list[str | int] | None) -> bool:
    """Whether a process of this machine has ended; False of one that runs elsewhere, or is not known."""
    if not process or process[0] != _place():
        return False
    # A number is given again to a later process.
    return _beginning(int(process[1])) != process[2]


def _place() -> str | None:
    try:
        boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
        # Containers on one machine number their processes each for itself.
        return f"{boot} {(_PROC / 'self/ns/pid').readlink()}"
    except OSError:
        return None


def _beginning(number: int) -> str | None:
    try:
        fields = (_PROC / str(number) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # A zombie has ended, though it is still listed.
    return None if fields[0] in "ZX" else fields[19]
