"""Tokens a second that a CPU trains, against transformers.

    dtbert build
    python scripts/bench_train.py --threads 2 --output docs/bench_train.json

Steps of some 8,192 tokens, windows at SQuAD's lengths with random words, 6 layers of 384 and of 768 with random
weights, dropout of 0.1, AdamW, in float32 and, where the processor multiplies it, in bfloat16. dtbert with compiled
steps and with torch's own, plain and by LengthDrop (two sub-models, tokens by answer_overlap); transformers with sdpa,
in bfloat16 by autocast, the windows of a step sorted by length and padded in groups, of the size that is fastest here.
Each round times each of them once, a few steps after a first one.

The JSON holds ``date``, ``commit``, ``device``, ``versions``, ``arguments`` and ``rows``. A row: ``work``, ``engine``,
``tokens_per_second`` (the median over the rounds), ``spread`` (the lowest and the highest), and ``ratio``, the median
over the rounds of its speed over transformers', which trains plainly, in the same one.
"""

import argparse
import datetime
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from bench.checkpoints import Checkpoint, random_checkpoint
from bench.provenance import commit, cpu_name, version
from bench.windows import INPUTS, Batch, Window, squad_windows
from torch import Tensor
from tqdm import tqdm

from dtbert.kernels import native
from dtbert.kernels.cpu import computes_natively
from dtbert.training import LengthDrop, TrainingOptions
from dtbert.training.data import LabelledBatch, TrainingData
from dtbert.training.loop import Trainer
from dtbert.training.memory import keep_freed_memory
from dtbert.weights import load_trainable

# Seconds and tokens of the steps that are timed.
Timed = Callable[[], tuple[float, int]]

PEER = "transformers sdpa"
GROUPS = (4, 8, 16)
DROP = LengthDrop(1, 0.3, 0.0, ("answer_overlap+question",), answer_loss=1.0)


class RandomWindows(TrainingData):
    """Windows of random words at the lengths of SQuAD's, of at least so many tokens."""

    unit = "window"

    def __init__(self, tokens: int) -> None:
        self.windows: list[Window] = []
        known = itertools.cycle(squad_windows(None, tokens))
        while tokens > 0:
            self.windows.append(next(known))
            tokens -= len(self.windows[-1])

    @property
    def lengths(self) -> list[int]:
        return [len(window) for window in self.windows]

    def id_of(self, index: int) -> str:
        return str(index)

    def batch(self, indices: Sequence[int], device: torch.device | str = "cpu") -> tuple[Batch, Tensor]:
        """Some windows, and where the answer starts in each, which has two tokens."""
        batch = Batch.of([self.windows[index] for index in indices], device)
        return batch, torch.tensor(batch.lengths, device=device) // 2

    def collate(self, indices: Sequence[int], device: torch.device) -> LabelledBatch:
        batch, starts = self.batch(indices, device)
        return LabelledBatch(batch.packed, starts, starts + 1, tuple(map(self.id_of, indices)))


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    results = describe(options)
    dtypes = [dtype for dtype in (torch.float32, torch.bfloat16) if computes_natively(torch.device("cpu"), dtype)]
    for size in options.size:
        layers, hidden = map(int, size.split("x"))
        with tempfile.TemporaryDirectory() as folder:
            sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": 4 * hidden}
            checkpoint = random_checkpoint(Path(folder), num_attention_heads=max(1, hidden // 32), **sizes)
            for dtype in dtypes:
                work = f"{size} {str(dtype).removeprefix('torch.')}"
                results["rows"] += measured(work, checkpoint, dtype, options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(table(results))


def measured(
    work: str, checkpoint: Checkpoint, dtype: torch.dtype, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """The rows of one size and dtype."""
    data = RandomWindows((2 + options.steps) * options.batch_tokens)
    engines: dict[str, Timed] = {PEER: theirs(checkpoint, data, dtype, options)}
    compiled = native.available(dtype)
    for kind, drop in (("", None), (", LengthDrop", DROP)):
        if compiled:
            engines[f"dtbert{kind}"] = own(checkpoint, data, dtype, drop, options, pays=True)
        engines[f"dtbert, torch's steps{kind}"] = own(checkpoint, data, dtype, drop, options, pays=False)
    speeds: dict[str, list[float]] = {name: [] for name in engines}
    names = list(engines)
    for index in tqdm(range(options.rounds), desc=work, unit="round", leave=False):
        first = index % len(names)
        for name in (*names[first:], *names[:first]):
            seconds, tokens = engines[name]()
            speeds[name].append(tokens / seconds)
    for name, values in speeds.items():
        ratios = [value / peer for value, peer in zip(values, speeds[PEER], strict=True)]
        yield {
            "work": work,
            "engine": name,
            "tokens_per_second": round(statistics.median(values), 1),
            "spread": [round(min(values), 1), round(max(values), 1)],
            "ratio": round(statistics.median(ratios), 3),
        }


def own(
    checkpoint: Checkpoint,
    data: TrainingData,
    dtype: torch.dtype,
    drop: LengthDrop | None,
    options: argparse.Namespace,
    *,
    pays: bool,
) -> Timed:
    """dtbert's trainer, by compiled steps or by torch's own."""

    def run() -> tuple[float, int]:
        records: list[dict[str, Any]] = []
        asked = TrainingOptions(
            epochs=1, batch_tokens=options.batch_tokens, length_drop=drop, bf16=dtype == torch.bfloat16
        )
        with patch.object(native, "pays", lambda dtype: pays):
            Trainer(load_trainable(checkpoint.folder), data, asked, None, checkpoint.folder).run(records.append)
        timed = records[1 : 1 + options.steps]
        return sum(record["seconds"] for record in timed), sum(record["tokens"] for record in timed)

    return run


def theirs(checkpoint: Checkpoint, data: RandomWindows, dtype: torch.dtype, options: argparse.Namespace) -> Timed:
    """transformers' model in a loop of its own, with windows in groups of the fastest size."""
    steps = data.batches(options.batch_tokens, 0, 0)[: 1 + options.steps]

    def run(group: int) -> tuple[float, int]:
        model = checkpoint.transformers("sdpa").train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-5, fused=True)
        autocast = torch.autocast("cpu", torch.bfloat16) if dtype == torch.bfloat16 else nullcontext()
        seconds, tokens = 0.0, 0
        for index, step in enumerate(steps):
            begin = time.perf_counter()
            step = sorted(step, key=lambda window: data.lengths[window])
            optimizer.zero_grad(set_to_none=True)
            for at in range(0, len(step), group):
                with autocast:
                    loss = model(**padded(data, step[at : at + group])).loss
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            if index:
                seconds += time.perf_counter() - begin
                tokens += sum(data.lengths[window] for window in step)
        return seconds, tokens

    fastest = min(GROUPS, key=lambda group: run(group)[0])
    return lambda: run(fastest)


def padded(data: RandomWindows, indices: Sequence[int]) -> dict[str, Tensor]:
    """What transformers' model takes."""
    batch, starts = data.batch(indices)
    inputs = dict(zip(INPUTS, (batch.ids, batch.mask, batch.segments), strict=True))
    return {**inputs, "start_positions": starts, "end_positions": starts + 1}


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to: date, commit, device, versions and arguments."""
    device = {
        "cpu": cpu_name(),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": options.threads,
    }
    packages = {name: version(name) for name in ("torch", "transformers")}
    asked = {name: getattr(options, name) for name in ("size", "batch_tokens", "steps", "rounds")}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": device,
        "versions": {"python": platform.python_version(), **packages},
        "arguments": asked,
        "rows": [],
    }


def table(results: dict[str, Any]) -> str:
    """One line a row, under what they belong to."""
    device = results["device"]
    lines = [
        f"{device['cpu']}, {device['threads']} threads, {results['date'][:10]}, commit {results['commit'][:12]}",
        "",
    ]
    for row in results["rows"]:
        low, high = row["spread"]
        speed = f"{row['tokens_per_second']:8,.0f} tokens/s [{low:,.0f} - {high:,.0f}]"
        lines.append(f"{row['work']:14} {row['engine']:34} {speed}, {row['ratio']:.2f} times {PEER}")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time training on a CPU, against transformers.",
        epilog="example: python scripts/bench_train.py --size 6x384 --rounds 3",
    )
    parser.add_argument("--output", type=Path, default=Path("bench_train.json"), help="JSON to write (%(default)s)")
    parser.add_argument("--size", nargs="+", default=["6x384", "6x768"], metavar="LxH", help="layers and width")
    parser.add_argument("--batch-tokens", type=int, default=8192, help="tokens of a step (%(default)s)")
    parser.add_argument("--steps", type=int, default=3, help="timed in a round (%(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of all engines (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of the CPU (%(default)s)")
    options = parser.parse_args()
    for name in ("batch_tokens", "steps", "rounds", "threads"):
        if getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {getattr(options, name)}")
    if options.batch_tokens < 512:
        parser.error(f"--batch-tokens must be at least 512, SQuAD's longest windows, not {options.batch_tokens}")
    for size in options.size:
        parts = size.split("x")
        if len(parts) != 2 or not all(part.isdecimal() and int(part) for part in parts) or int(parts[1]) % 32:
            parser.error(f"--size must be layers x width, as 6x384, of whole heads of 32, not {size}")
    return options


if __name__ == "__main__":
    main(arguments())
