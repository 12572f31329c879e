"""Time the file that `dtbert export` writes in ONNX Runtime beside dtbert, in one process, a window at a time.

    python scripts/bench_onnx.py dev-v1.1.json --budget 0.5

Rounds alternate; a round answers every window once. Prints a row a provider, its size on disk, the median over the
rounds of the mean milliseconds a window, and the spread; with --output as JSON with versions and the processor.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from bench.provenance import commit, cpu_name, version

from dtbert.evaluation import read_squad
from dtbert.export import export_onnx
from dtbert.model import PackedBatch
from dtbert.model.policy import Policy
from dtbert.qa import QuestionAnswerer, Window

PACKAGES = ("torch", "onnxruntime", "onnx")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("squad", type=Path, help="questions in SQuAD's format")
    parser.add_argument("--budget", type=float, help="part of all MACs (default: all, nothing dropped)")
    parser.add_argument("--windows", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, metavar="JSON")
    return parser.parse_args(argv)


def first_windows(answerer: QuestionAnswerer, squad: Path, count: int) -> list[Window]:
    found: list[Window] = []
    for question in read_squad(squad):
        found += answerer.windows(question.question, question.context)
        if len(found) >= count:
            break
    return found[:count]


def dtbert_run(answerer: QuestionAnswerer, schedule: Policy | None) -> Callable[[Window], object]:
    def run(window: Window) -> object:
        batch = PackedBatch.from_lists([window.input_ids], [window.token_type_ids])
        with torch.inference_mode():
            return answerer.model.forward_packed(batch, schedule)

    return run


def onnx_run(path: Path, threads: int) -> Callable[[Window], object]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(window: Window) -> object:
        inputs = {"input_ids": window.input_ids, "token_type_ids": window.token_type_ids}
        return session.run(None, {name: np.array([ids]) for name, ids in inputs.items()})

    return run


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    torch.set_num_threads(arguments.threads)
    answerer = QuestionAnswerer.load()
    schedule = None if arguments.budget is None else answerer.within_budget(arguments.budget, static=True).schedule
    work = first_windows(answerer, arguments.squad, arguments.windows)
    with tempfile.TemporaryDirectory() as folder:
        runs, sizes = {f"dtbert, {answerer.model.backend_name}": dtbert_run(answerer, schedule)}, {}
        for name, int8 in (("ONNX Runtime, float32 file", False), ("ONNX Runtime, int8 file", True)):
            path = export_onnx(answerer, Path(folder) / f"{int(int8)}.onnx", schedule, int8=int8).model
            runs[name], sizes[name] = onnx_run(path, arguments.threads), path.stat().st_size
        taken: dict[str, list[float]] = {name: [] for name in runs}
        for round_number in range(arguments.rounds + 1):
            for name, run in runs.items():
                start = time.perf_counter()
                for window in work:
                    run(window)
                # The first round warms up.
                if round_number:
                    taken[name].append(1000 * (time.perf_counter() - start) / len(work))
    for name, rounds in taken.items():
        size = f"{sizes[name] / 1e6:6.1f} MB" if name in sizes else " " * 9
        print(f"{name:28} {size} {statistics.median(rounds):8.2f} ms  ({min(rounds):.2f} to {max(rounds):.2f})")
    if arguments.output is not None:
        made = {"commit": commit(), "cpu": cpu_name(), "versions": {name: version(name) for name in PACKAGES}}
        settings = {"budget": arguments.budget, "threads": arguments.threads, "windows": len(work)}
        arguments.output.write_text(json.dumps({**made, **settings, "bytes": sizes, "ms_a_window": taken}, indent=1))


if __name__ == "__main__":
    main()
