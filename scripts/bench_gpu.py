"""Time dtbert's kernels and its whole model on a GPU against PyTorch, transformers and torch.compile, in one process.

    python scripts/bench_gpu.py --output docs/bench_gpu.json

Every contender's result is checked before it is timed. Then rounds: in each, every contender in turn makes a block of
calls between two events; figures are medians over the blocks. Inputs are random, and small ones are rotated so that no
cache holds them. Kernels alone are replayed from a CUDA graph, whoever they belong to, so that Python's launches do not
count; whole models are called as a program calls them, and a single sequence is waited for. ``--device cpu --tiny``
runs everything in seconds on small sizes with the reference in place of the kernels: that tests this script alone.

The JSON holds ``date``, ``commit``, ``device``, ``versions``, ``arguments``, ``ceilings`` (a product of 8192^3 and a
large copy, measured here), ``skipped``, ``aims`` and ``rows``. A row: ``section`` (attention, scores, drops, steps,
schedule, model, latency, squad), ``work``, ``flops`` or ``bytes`` of one call, ``results`` and ``not_timed`` (reasons).
A result: ``provider``, ``ms``, ``quartiles_ms``, ``blocks``, ``calls``, ``launch``, ``relative_error``, and
``peak_bytes``, ``macs_saved`` or ``windows_per_second`` where they apply.
"""

import argparse
import datetime
import functools
import json
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench.checkpoints import random_checkpoint, reason
from bench.provenance import commit, version
from gpu_bench import attention, model
from gpu_bench.report import aims, details, table
from gpu_bench.setting import FULL, TINY, Rows, Setting, backend_for, checkpoint_sizes
from gpu_bench.steps import steps
from gpu_bench.timing import Effort

from dtbert.profiling.ceilings import measure_ceilings

Section = tuple[str, Callable[[], Rows]]


def main(options: argparse.Namespace) -> None:
    begin = time.monotonic()
    device = torch.device(options.device)
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    results = describe(options, device)
    ceilings = measure_ceilings(device, dtype)
    results["ceilings"] = {**vars(ceilings), "dtype": str(dtype).removeprefix("torch.")}
    setting = Setting(
        device,
        dtype,
        *backend_for(device),
        TINY if options.tiny else FULL,
        Effort(options.rounds, options.block_ms / 1e3, begin + options.seconds),
        ceilings,
        not options.quick,
    )
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        run(setting, Path(folder), results, options)
    print(details(results))
    if not options.no_table:
        print(f"\n{table(results)}")
    if results["skipped"] or (setting.compiles and any(aim.met is None for aim in aims(results))):
        sys.exit("some figures are missing: the reasons are above")


def run(setting: Setting, folder: Path, results: dict[str, Any], options: argparse.Namespace) -> None:
    """Fill ``rows``, ``skipped`` and ``aims``, and write after each row, so that a run cut short leaves what it had."""
    results |= {"rows": [], "skipped": [], "aims": []}
    broken = ""
    for name, section in _sections(setting, folder):
        if options.only and name not in options.only:
            continue
        if broken or setting.effort.seconds_left < 0:
            results["skipped"].append({"section": name, "reason": broken or "no time was left"})
            continue
        try:
            for row in section():
                results["rows"].append(row)
                results["aims"] = [aim._asdict() | {"met": aim.met} for aim in aims(results)]
                save(results, options.output)
        except Exception as error:
            print(f"{name}: {reason(error)}", file=sys.stderr)
            results["skipped"].append({"section": name, "reason": reason(error)})
            if "CUDA error" in str(error):
                broken = f"the device failed in {name}"
    save(results, options.output)


def _sections(setting: Setting, folder: Path) -> Iterator[Section]:
    yield "attention", functools.partial(attention.without_scores, setting)
    yield "scores", functools.partial(attention.with_scores, setting)
    yield "drops", functools.partial(attention.dropping, setting)
    yield "steps", functools.partial(steps, setting)
    checkpoint = random_checkpoint(folder, **checkpoint_sizes(setting.sizes))
    yield from model.sections(setting, checkpoint)


SECTIONS = ("attention", "scores", "drops", "steps", "schedule", "model", "latency", "squad")


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def describe(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """What the figures belong to: date, commit, device, versions and arguments."""
    kept = ("rounds", "block_ms", "seconds", "quick", "tiny", "only")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": options.commit or commit(),
        "device": _device(device),
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **{name: version(name) for name in ("torch", "triton", "transformers")},
        },
        "arguments": {name: getattr(options, name) for name in kept},
    }


def _device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _driver(),
    }


def _driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time dtbert's kernels and its whole model on a GPU against PyTorch, transformers, torch.compile.",
        epilog="example: python scripts/bench_gpu.py --only attention scores --rounds 15",
    )
    parser.add_argument("--output", type=Path, default=Path("bench_gpu.json"), help="JSON to write (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each contender (%(default)s)")
    parser.add_argument("--block-ms", type=float, default=10, help="length of a block, about (%(default)s)")
    parser.add_argument("--seconds", type=float, default=300, help="in which all sections start (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="without torch.compile, 5 rounds")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections")
    parser.add_argument("--commit", help="for the JSON, where there is no repository to ask")
    parser.add_argument("--no-table", action="store_true", help="print the figures, and leave the aims to report.py")
    parser.add_argument("--device", default="cuda", help="where to run (%(default)s)")
    parser.add_argument(
        "--tiny", action="store_true", help="small sizes: for a trial of this script, with --device cpu"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds = min(options.rounds, 5)
    for name in ("rounds", "block_ms", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {getattr(options, name)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --device cpu --tiny tries the script without one")
    if not options.device.startswith("cuda") and not options.tiny:
        parser.error("the full sizes need a GPU: add --tiny, which tries the script, or leave --device out")
    return options


if __name__ == "__main__":
    main(arguments())
