"""A job on Ray: its blocks as a Dataset, mapped by workers that write their parts themselves.

Ray Data decides who does what, starts workers again, and shows how far it is; what is done it need not remember, for
the output folder does. So only descriptions of blocks go through it, and a job goes on in another cluster as well.
"""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter
from typing import Any

from dtbert.files import first_line
from dtbert.jobs.blocks import Block, InputFile, plan
from dtbert.jobs.folder import Manifest, OutputFolder, Record
from dtbert.jobs.worker import Answering, Worker

# Workers that may be killed one after the other while they start; afterwards Ray Data sets no limit.
_DEATHS_AT_START = 5


@dataclass(frozen=True)
class Cluster:
    """Where a job runs.

    Attributes:
        address: of a Ray cluster, or None for one of this machine alone, which ends with the job.
        workers: how many; None for one on each GPU, or for all CPUs that there are when it starts.
        quiet: no progress, and no warnings of Ray's.
    """

    address: str | None = None
    workers: int | None = None
    quiet: bool = False


def check_ray() -> None:
    """Raise ValueError where Ray Data is not installed."""
    try:
        import ray.data  # noqa: F401
    except ImportError as error:
        raise ValueError(f"--engine ray needs Ray Data ({error}): pip install 'dtbert[ray]'") from error


def run_job(
    settings: dict[str, Any],
    files: Sequence[InputFile],
    block_bytes: int,
    answering: Answering,
    output: OutputFolder,
    cluster: Cluster,
) -> list[Record]:
    """Do what is left of a job; the records of all its blocks.

    Raises:
        ValueError, OSError: as `OutputFolder.manifest`, `plan` and `Worker.answer`; or as `answer_blocks`.
    """
    manifest = output.manifest(settings, files)
    with output.locked():
        planned = None
        if manifest is None:
            began = perf_counter()
            manifest = Manifest(settings, list(files), plan(files, block_bytes))
            planned = perf_counter() - began
            output.write_manifest(manifest)
        left = output.left(manifest.blocks)
        times: dict[str, Any] = {"plan_seconds": planned}
        if left:
            times |= answer_blocks(left, Worker(answering, output), cluster)
            if missing := output.left(left):
                raise OSError(
                    f"{len(missing)} of {len(left)} parts are not in {output.place.name}: all machines must write to "
                    "one place, so name a shared folder or a URL"
                )
        records = output.records(manifest.blocks)
        if left or not output.finished():
            size = sum(file.size for file in files)
            output.finish({**times, "input_bytes": size, "blocks": list(map(asdict, records))})
        return records


def answer_blocks(blocks: Sequence[Block], worker: Worker, cluster: Cluster) -> dict[str, Any]:
    """Answer blocks on a cluster; how many workers did it, and how long they took.

    Raises:
        ValueError: what a worker says is wrong with the job, or the cluster has too little for it.
        OSError: there is no cluster at the address, or workers ended while they started.
    """
    with _connected(cluster) as ray:
        from ray.data import ActorPoolStrategy, DataContext
        from ray.exceptions import RayError

        answering = worker.answering
        gpus = 1 if (answering.device or "cpu").startswith("cuda") else 0
        count = _workers(ray, cluster, gpus, answering.threads)
        context = DataContext.get_current()
        context.enable_progress_bars = not cluster.quiet
        # A block may take long, and machines may come and go.
        context.execution_no_progress_timeout_s = -1
        context.max_consecutive_actor_init_deaths = _DEATHS_AT_START
        dataset = ray.data.from_items([asdict(block) for block in blocks], override_num_blocks=len(blocks)).map(
            Worker,
            fn_constructor_args=(answering, worker.output),
            # None waits behind a busy worker while another one has nothing to do.
            compute=ActorPoolStrategy(size=min(count, len(blocks)), max_tasks_in_flight_per_actor=1),
            num_cpus=answering.threads,
            num_gpus=gpus,
        )
        began = perf_counter()
        try:
            for row in dataset.iter_rows():
                if row["error"] is not None:
                    raise ValueError(row["error"])
        except RayError as error:
            reason = str(error).strip().splitlines()[-1]
            raise OSError(
                f"the workers of Ray have ended ({reason}): the same command goes on after the blocks that are done"
            ) from error
        return {"workers": min(count, len(blocks)), "threads": answering.threads, "seconds": perf_counter() - began}


@contextmanager
def _connected(cluster: Cluster) -> Iterator[Any]:
    # Ray asks at the first start whether it may send home what is used; dtbert sends nothing anywhere.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if cluster.quiet:
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    local = {"include_dashboard": False} if cluster.address is None else {}
    try:
        ray.init(
            address=cluster.address or "local",
            log_to_driver=not cluster.quiet,
            logging_level="ERROR" if cluster.quiet else "WARNING",
            **local,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        if cluster.address is None:
            raise
        raise OSError(
            f"--address {cluster.address}: there is no Ray cluster that answers ({first_line(error)})"
        ) from error
    try:
        yield ray
    finally:
        ray.shutdown()


def _workers(ray: Any, cluster: Cluster, gpus: int, threads: int) -> int:
    """How many workers there shall be; ValueError where a cluster that cannot grow has no place for them."""
    there = ray.cluster_resources()
    room = int(there.get("GPU", 0)) if gpus else int(there.get("CPU", 0)) // threads
    count = room if cluster.workers is None else cluster.workers
    if not count or (cluster.address is None and count > room):
        has = f"{there.get('GPU', 0):.0f} GPUs" if gpus else f"{there.get('CPU', 0):.0f} CPUs"
        each = "a GPU" if gpus else f"{threads} threads"
        raise ValueError(
            f"no place for {count or 1} workers of {each}: this cluster has {has}; see --workers, --threads"
        )
    return count
