"""Processes that work on one command together, as torchrun starts them."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TypeVar

from dtbert.cli.output import printable
from dtbert.files import first_line

T = TypeVar("T")

# The others wait while the first evaluates; one that ends in an error is noticed at once, without a timeout.
_TIMEOUT = timedelta(hours=12)


@contextmanager
def joined(device: str) -> Iterator[int]:
    """Join the processes that torchrun started; gives this one's rank, 0 where there are no others.

    An error of the first process goes on to the caller. Another process ends with status 2: silently where all have
    the same error, and with one line where its error is its own.

    Raises:
        ValueError: a CUDA device with a number, though each process has its own; or fewer GPUs than processes.
        OSError: in the first process, where another one has ended.
    """
    if "RANK" not in os.environ:
        yield 0
        return
    import torch
    from torch import distributed

    from dtbert.training.loop import TrainingError

    if device.startswith("cuda"):
        if device != "cuda":
            raise ValueError(f"--device {device}: under torchrun each process takes a GPU of its own: give cuda")
        local_rank, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local_rank >= gpus:
            raise ValueError(f"--device cuda: process {local_rank} of this machine has no GPU, there are {gpus}")
        torch.cuda.set_device(local_rank)
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
    rank = distributed.get_rank()
    try:
        yield rank
    except TrainingError:
        if rank == 0:
            raise
        _leave_after_first()
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        reason = first_line(error)
        if isinstance(error, distributed.DistError) or "gloo" in reason:
            # Not this process's own: another one has gone. The first says so.
            if rank == 0:
                raise OSError(f"another process has ended ({reason}): the same command goes on") from error
        elif rank == 0:
            raise
        else:
            print(printable(f"dtbert: process {rank} stops: {reason}"), file=sys.stderr, flush=True)
        # Nothing of this process may wait for one that has gone.
        os._exit(2)
    else:
        distributed.destroy_process_group()


def agree(prepare: Callable[[], T]) -> T:
    """Prepare in all processes; where one fails, the first raises its error, and the others end silently.

    Raises:
        ValueError, TypeError, OSError: of ``prepare``.
    """
    from torch import distributed

    if not distributed.is_initialized():
        return prepare()
    failure: Exception | None = None
    try:
        prepared = prepare()
    except (ValueError, TypeError, OSError) as error:
        failure = error
    reasons: list[str | None] = [None] * distributed.get_world_size()
    distributed.all_gather_object(reasons, None if failure is None else str(failure))
    failed = [rank for rank, reason in enumerate(reasons) if reason is not None]
    if not failed:
        return prepared
    if distributed.get_rank() != 0:
        _leave_after_first()
    raise failure or ValueError(f"process {failed[0]}: {reasons[failed[0]]}")


def _leave_after_first() -> None:
    # torchrun ends all processes when one has ended: the first must have said why.
    from torch import distributed

    with suppress(RuntimeError):
        distributed.barrier()
    os._exit(2)
