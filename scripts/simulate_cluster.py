"""What a cluster would do with very many questions, by the block times of a job that was run: arithmetic, no cluster.

    dtbert answer --input questions/ --output answers --engine ray --workers 2
    python scripts/simulate_cluster.py answers --questions 1e9 --machines 100 --workers-per-machine 16

A worker does one block after the other, so questions a second grow with the workers until something that all share is
full: the storage that is read and written, its requests, or the driver that hands out blocks. Where each of these is
full is printed, with all that was assumed.
"""

import argparse
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Of a block on an object store: a range read; part and record each written, moved (a copy and a removal).
_REQUESTS = 7


@dataclass(frozen=True)
class Measured:
    """A block in the mean, of a job that was run: seconds, bytes and questions; and how much a second was planned."""

    questions: float
    read_seconds: float
    answer_seconds: float
    write_seconds: float
    bytes_read: float
    bytes_written: float
    plan_bytes_per_second: float | None

    @property
    def seconds(self) -> float:
        """What a worker needs for it."""
        return self.read_seconds + self.answer_seconds + self.write_seconds

    @classmethod
    def of(cls, times: dict[str, Any]) -> "Measured":
        """From `_times.json`; ValueError where no block was done."""
        blocks = [block for block in times["blocks"] if block["rows"]]
        if not blocks:
            raise ValueError("no block of this job holds a question: nothing was measured")

        def mean(name: str) -> float:
            return sum(block[name] for block in blocks) / len(blocks)

        names = ("read_seconds", "answer_seconds", "write_seconds", "bytes_read", "bytes_written")
        planned = times["input_bytes"] / times["plan_seconds"] if times["plan_seconds"] else None
        return cls(mean("rows"), plan_bytes_per_second=planned, **{name: mean(name) for name in names})


@dataclass(frozen=True)
class Assumed:
    """What is not measured: the cluster and its storage."""

    questions: float
    workers_per_machine: int
    read_rate: float
    write_rate: float
    request_rate: float
    task_rate: float


def limits(block: Measured, assumed: Assumed) -> dict[str, float]:
    """How many workers each thing that they share can serve."""
    return {
        "reading": assumed.read_rate / block.bytes_read * block.seconds,
        "writing": assumed.write_rate / block.bytes_written * block.seconds,
        "requests": assumed.request_rate / _REQUESTS * block.seconds,
        "scheduling": assumed.task_rate * block.seconds,
        "blocks": assumed.questions / block.questions,
    }


def seconds_with(workers: float, block: Measured, assumed: Assumed) -> float:
    """From the first block to the last, in rounds of a block a worker; workers beyond a limit wait."""
    busy = min(workers, *limits(block, assumed).values())
    return math.ceil(assumed.questions / block.questions / busy) * block.seconds


def report(block: Measured, assumed: Assumed, machines: int) -> str:
    """All of it as text."""
    blocks = assumed.questions / block.questions
    rows = [
        "measured, the mean of a block",
        f"  {block.questions:,.0f} questions, {block.bytes_read:,.0f} bytes read, {block.bytes_written:,.0f} written",
        f"  seconds: reading {block.read_seconds:.3g}, answering {block.answer_seconds:.3g}, writing"
        f" {block.write_seconds:.3g}",
        "assumed",
        f"  {assumed.workers_per_machine} workers a machine, each as fast as the measured one",
        f"  storage that reads {assumed.read_rate / 1e9:g} GB/s, writes {assumed.write_rate / 1e9:g} GB/s, and serves",
        f"  {assumed.request_rate:,.0f} requests a second, {_REQUESTS} a block",
        f"  a driver that hands out {assumed.task_rate:,.0f} blocks a second",
        "  starting and planning are not in the hours",
        f"{assumed.questions:,.0f} questions",
        f"  {blocks:,.0f} blocks, {blocks * block.bytes_read / 1e9:,.1f} GB to read,"
        f" {blocks * block.bytes_written / 1e9:,.1f} GB to write",
    ]
    if block.plan_bytes_per_second:
        planning = blocks * block.bytes_read / block.plan_bytes_per_second / 3600
        rate = block.plan_bytes_per_second / 1e6
        rows.append(f"  planned first by one process, in {planning:.3g} h at the measured {rate:,.0f} MB/s")
    full = limits(block, assumed)
    rows += ["", f"{'machines':>8} {'workers':>8} {'hours':>9} {'questions/s':>12}  limited by"]
    for count in sorted({1, 10, 100, 1000, machines}):
        workers = count * assumed.workers_per_machine
        seconds = seconds_with(workers, block, assumed)
        least = min(full, key=full.__getitem__)
        by = least if full[least] < workers else "answering"
        rows.append(f"{count:>8} {workers:>8} {seconds / 3600:>9.3g} {assumed.questions / seconds:>12,.0f}  {by}")
    rows += ["", "more machines help until"]
    for name, most in sorted(full.items(), key=lambda item: item[1]):
        rows.append(f"{most / assumed.workers_per_machine:>12,.1f} machines: {name}")
    return "\n".join(rows)


def main() -> None:
    """Read the command line, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="the folder of a job that is done, which has _times.json")
    parser.add_argument("--questions", type=float, default=1e9, metavar="N", help="(1e9)")
    parser.add_argument("--machines", type=int, default=100, metavar="N", help="(100)")
    parser.add_argument("--workers-per-machine", type=int, default=16, metavar="N", help="(16)")
    parser.add_argument("--read-rate", type=float, default=10e9, metavar="B", help="bytes a second of all (10e9)")
    parser.add_argument("--write-rate", type=float, default=5e9, metavar="B", help="bytes a second of all (5e9)")
    parser.add_argument("--request-rate", type=float, default=3500, metavar="R", help="of the storage a second (3500)")
    parser.add_argument(
        "--task-rate", type=float, default=100, metavar="T", help="blocks a second that Ray hands out (100)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    try:
        times = json.loads((given.output / "_times.json").read_text("utf-8"))
        block = Measured.of(times)
    except (OSError, ValueError) as error:
        parser.error(f"{given.output}: {error}")
    names = ("questions", "workers_per_machine", "read_rate", "write_rate", "request_rate", "task_rate")
    assumed = Assumed(**{name: getattr(given, name) for name in names})
    if min(asdict(assumed).values()) <= 0 or given.machines < 1:
        parser.error("all numbers must be above 0")
    if not given.json:
        print(report(block, assumed, given.machines))
        return
    workers = given.machines * assumed.workers_per_machine
    found = {"seconds": seconds_with(workers, block, assumed), "workers_at_limits": limits(block, assumed)}
    print(json.dumps({"measured": asdict(block), "assumed": asdict(assumed), "machines": given.machines, **found}))


if __name__ == "__main__":
    main()
