"""Time dtbert's kernels and its whole model on a GPU against PyTorch, transformers and torch.compile, side by side.

    python scripts/bench_gpu.py --records bench_gpu.jsonl

Every contender's result is checked before it is timed. Then rounds: in each, every contender in turn makes a block of
calls between two events; figures are medians over the blocks. Inputs are random, and small ones are rotated so that no
cache holds them. Kernels alone are replayed from a CUDA graph, whoever they belong to, so that Python's launches do not
count; whole models are called as a program calls them, and a single sequence is waited for. ``--device cpu --tiny``
runs everything in seconds on small sizes with the reference in place of the kernels: that tests this script alone.

Adds JSON Lines to the file, each as soon as it is known. Of the section ``record``: ``date``, ``commit``, ``device``,
``versions`` and ``ceilings`` (a product of 8192^3 and a large copy, measured here). Of the others, a row each: its
``section``, ``work``, ``flops`` or ``bytes`` of one call, ``results`` and ``not_timed`` (reasons). A result:
``provider``, ``ms``, ``quartiles_ms``, ``blocks``, ``calls``, ``launch``, ``relative_error``, and ``peak_bytes``,
``macs_saved`` or ``windows_per_second`` where they apply.
"""

import argparse
import functools
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from bench.checkpoints import random_checkpoint, reason
from gpu_bench import attention, compiled, machine, model, schedule, squad
from gpu_bench.models import Models
from gpu_bench.report import aims, details, results_of, verdicts
from gpu_bench.setting import FULL, TINY, Row, Rows, Setting, checkpoint_sizes
from gpu_bench.steps import steps
from gpu_bench.timing import Effort
from gpu_check import records
from gpu_check.pool import NO_TIME
from gpu_check.turn import add_part_arguments, wait_for_turn


def _tuned(setting: Setting) -> Rows:
    # Imported here: it imports triton, which a trial without a GPU does not need.
    from gpu_bench.tuned import tuned

    return tuned(setting)


# Of kernels alone; of whole models; and of those that torch.compile compiles first.
KERNELS: dict[str, Callable[[Setting], Rows]] = {
    "attention": attention.without_scores,
    "scores": attention.with_scores,
    "drops": attention.dropping,
    "steps": steps,
    "tuned": _tuned,
}
MODELS: dict[str, Callable[[Models], Rows]] = {
    "model": model.nothing_dropped,
    "latency": model.alone,
    "schedule": schedule.dropping,
    "squad": squad.squad,
    "graphs": model.graphs,
    "float8": model.float8,
    **compiled.SECTIONS,
}
SECTIONS = ("record", *KERNELS, *MODELS)


def main(options: argparse.Namespace) -> int:
    device = torch.device(options.device)
    names = options.only or SECTIONS
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        sizes = TINY if options.tiny else FULL
        checkpoint = random_checkpoint(Path(folder), **checkpoint_sizes(sizes)) if set(names) & set(MODELS) else None
        begin = time.monotonic()
        deadline = min(wait_for_turn(options.await_turn), begin + options.seconds)
        effort = Effort(options.rounds, options.block_ms / 1e3, deadline)
        setting = Setting.on(device, sizes, effort)
        sections = {name: functools.partial(section, setting) for name, section in KERNELS.items()}
        if checkpoint is not None:
            models = Models(setting, checkpoint)
            sections |= {name: functools.partial(section, models) for name, section in MODELS.items()}
        broken = ""
        for name in names:
            if name == "record":
                record(setting, options)
            elif broken or setting.effort.seconds_left < 0:
                skip(options.records, name, broken or NO_TIME)
            else:
                broken = measure(name, sections[name], options.records)
    skipped = results_of(records.read(options.records)[0], names)["skipped"]
    return 1 if any(entry["reason"] != NO_TIME for entry in skipped) else 0


def record(setting: Setting, options: argparse.Namespace) -> None:
    """What the figures belong to; first without the ceilings, should these fail."""
    about = machine.describe(setting.device, options.commit)
    records.append(options.records, "record", about)
    print(about, flush=True)
    about["ceilings"] = machine.ceilings(setting.device, setting.dtype)
    records.append(options.records, "record", about)
    print(about["ceilings"], flush=True)


def measure(name: str, section: Callable[[], Rows], output: Path) -> str:
    """Add the rows of a section, and print its figures and aims; what broke the device, if it broke."""
    rows: list[Row] = []
    broken = ""
    try:
        for row in section():
            rows.append(row)
            records.append(output, "row", row)
    except Exception as error:
        print(f"{name}: {reason(error)}", file=sys.stderr)
        skip(output, name, reason(error))
        if "CUDA error" in str(error):
            broken = f"the device failed in {name}"
    # Whatever else is in the file, by this section's rows alone.
    results = results_of(records.read(output)[0], (name,))
    print("\n".join([details({"rows": rows}), "", *verdicts(aims(results))]), flush=True)
    return broken


def skip(output: Path, section: str, why: str) -> None:
    records.append(output, "skipped", {"section": section, "reason": why})


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time dtbert's kernels and its whole model on a GPU against PyTorch, transformers, torch.compile.",
        epilog="example: python scripts/bench_gpu.py --records bench_gpu.jsonl --only record attention scores",
    )
    add_part_arguments(parser)
    parser.add_argument("--rounds", type=int, default=9, help="blocks of each contender (%(default)s)")
    parser.add_argument("--block-ms", type=float, default=10, help="length of a block, about (%(default)s)")
    parser.add_argument("--seconds", type=float, default=600, help="in which all sections start (%(default)s)")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, help="these sections")
    parser.add_argument("--commit", help="for the record, where there is no repository to ask")
    options = parser.parse_args()
    for name in ("rounds", "block_ms", "seconds"):
        if getattr(options, name) <= 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, not {getattr(options, name)}")
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA GPU here; --device cpu --tiny tries the script without one")
    if not options.device.startswith("cuda") and not options.tiny:
        parser.error("the full sizes need a GPU: add --tiny, which tries the script, or leave --device out")
    return options


if __name__ == "__main__":
    raise SystemExit(main(arguments()))
