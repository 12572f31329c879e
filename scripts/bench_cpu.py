"""Time dtbert against transformers, torch.compile, ONNX Runtime and OpenVINO on this CPU, in one process.

    python scripts/bench_cpu.py --output docs/bench_cpu.json --plot docs/bench_cpu.png --threads 2
    python scripts/bench_cpu.py --again docs/bench_cpu.json --output docs/bench_cpu.json --plot docs/bench_cpu.png

The second command measures nothing: it judges the figures of an earlier run by the aims of today, and draws them.

Every engine's logits are compared with those of transformers in float32 before it is timed. Each provider first tries
its settings, and at true lengths one window at a time against eight padded to the longest (dtbert: its budgets of
tokens); its fastest is kept. Then rounds: in each, every provider in turn waits until the others' threads sleep, makes
an untimed call, then timed ones. Figures are medians over all rounds; windows are dealt out to the rounds, and each
time is scaled to all of them. Inputs are made before anything is timed. In int8 transformers sdpa, which has none,
computes in float32, and is the base all the same. With ``--squad``, questions go in and answers come out, too: dtbert
at its budgets, and the same tokens and spans around its peers.

The JSON holds ``date``, ``commit``, ``device``, ``versions``, ``arguments`` and five lists:

    comparisons  one per model, dtype and workload: ``windows``, ``tokens``, ``results``, ``not_timed`` (reasons).
                 A result: ``provider``, ``setting``, ``batching``, ``computes_in`` (the dtype of the products: on a CPU
                 that emulates bfloat16, dtbert and OpenVINO compute in float32), ``relative`` (time of transformers
                 sdpa over its own), ``ms`` (median for the whole workload), ``quartiles_ms``, ``samples``,
                 ``largest_error`` (as a part of the largest logit), ``tried_ms`` (each setting's first figure).
    dropping     dtbert at lengths 269,253,252,202,104,34 against all tokens: ``ratio`` of ``time_saved`` and
                 ``macs_saved`` (executed), ``ms``, ``quartiles_ms``, ``samples``, ``ms_without``.
    scoring      one layer that scores and keeps all tokens but one against the same that keeps all: ``ratio``, ``ms``,
                 ``quartiles_ms``, ``samples``, ``ms_without``.
    end_to_end   one per dtype, of the shipped model: ``questions``, ``results``, ``not_timed``. A result: ``provider``,
                 ``setting``, ``budget`` (null: all tokens), ``questions_per_second``, ``same_answers`` (part of them
                 that are those of transformers in float32), ``ms`` for all, ``quartiles_ms``, ``samples``.
    aims         ``work``, ``aim``, ``measured``, ``met``.
"""

import argparse
import datetime
import functools
import itertools
import json
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from bench.checkpoints import random_checkpoint, shipped_checkpoint
from bench.provenance import commit, cpu_fields, cpu_name, version
from bench.windows import EQUAL_LENGTHS, SQUAD, random_windows, squad_windows
from cpu_bench.comparison import DTYPES, Comparison, Effort, laggards
from cpu_bench.end_to_end import end_to_end
from cpu_bench.peers import Engine, bf16_is_emulated, engines
from cpu_bench.picture import plot
from cpu_bench.report import aims, table
from cpu_bench.savings import dropping, scoring

Wanted = Callable[[str], bool]
LISTS = ("comparisons", "dropping", "scoring", "end_to_end", "aims")


def main(options: argparse.Namespace) -> None:
    results = measured(options) if options.again is None else json.loads(options.again.read_text("utf-8"))
    results["aims"] = aims(results)
    save(results, options.output)
    print(table(results))
    if options.plot:
        try:
            plot(results, options.plot)
        except ValueError as error:
            sys.exit(str(error))


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """All figures; what there is of them so far is saved after each workload."""
    torch.set_num_threads(options.threads)
    wanted: Wanted = functools.partial(_matches, re.compile(options.only))
    effort = Effort(options.rounds, options.seconds, tuple(options.batch_tokens))
    results = describe(options)
    lists = {
        name: results.setdefault(name, []) for name in ("comparisons", "dropping", "scoring", "end_to_end", "aims")
    }
    works = {name: random_windows([length] * size) for name, (size, length) in EQUAL_LENGTHS.items()}
    works[SQUAD] = squad_windows(options.squad, options.windows)
    with tempfile.TemporaryDirectory() as folder:
        checkpoints = random_checkpoint(Path(folder, "random")), shipped_checkpoint(Path(folder, "shipped"))
        for checkpoint, dtype in itertools.product(checkpoints, DTYPES):
            comparisons = [Comparison(checkpoint, dtype, name, work) for name, work in works.items()]
            for row in compare(comparisons, effort, options.threads, wanted):
                lists["comparisons"].append(row)
                save(results, options.output)
        with torch.inference_mode():
            for checkpoint, dtype in itertools.product(checkpoints, DTYPES):
                if not bf16_is_emulated(DTYPES[dtype]):
                    lists["dropping"] += dropping(checkpoint, dtype, effort, wanted)
                    lists["scoring"] += scoring(checkpoint, dtype, effort, wanted)
                    save(results, options.output)
        if options.squad is not None:
            for row in end_to_end(checkpoints[1], options.squad, options.questions, options.threads, effort, wanted):
                lists["end_to_end"].append(row)
                save(results, options.output)
    if not any(lists.values()):
        sys.exit(f"--only {options.only!r} matches nothing, such as '6x768 fp32 8x384 OpenVINO'")
    return results


def _matches(pattern: re.Pattern[str], name: str) -> bool:
    return pattern.search(name) is not None


def compare(comparisons: list[Comparison], effort: Effort, threads: int, wanted: Wanted) -> Iterator[dict[str, Any]]:
    """The rows of one model and dtype, whose engines are built once."""
    checkpoint, dtype = comparisons[0].checkpoint, DTYPES[comparisons[0].dtype]

    def wanted_anywhere(provider: str) -> bool:
        return any(wanted(f"{comparison.name} {provider}") for comparison in comparisons)

    # Outside inference mode, whose tensors cannot be exported.
    available = list(engines(checkpoint, dtype, threads, wanted_anywhere))
    with torch.inference_mode():
        for comparison in comparisons:
            chosen = [entry for entry in available if wanted(f"{comparison.name} {entry.provider}")]
            if not any(isinstance(entry, Engine) for entry in chosen):
                continue
            row = comparison.run(chosen, effort)
            yield row
            if bf16_is_emulated(dtype) and comparison.workload != "1x128":
                too_slow = laggards(row)
                available = [too_slow.get(entry.provider, entry) for entry in available]


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to: date, commit, device, versions and arguments."""
    names = ("dtbert", "torch", "transformers", "onnxruntime", "openvino", "nncf", "onnx", "numpy")
    kept = ("threads", "rounds", "seconds", "only", "windows", "questions", "batch_tokens")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": _device() | {"threads": options.threads},
        "versions": {"python": platform.python_version()} | {name: version(name) for name in names},
        "arguments": {name: getattr(options, name) for name in kept},
    }


def _device() -> dict[str, Any]:
    fields = cpu_fields()
    flags = fields.get("flags", fields.get("Features", "")).split()
    return {
        "cpu": cpu_name(),
        "flags": sorted(flag for flag in flags if re.match(r"avx|amx|fma$|f16c|asimd|sve|sme\d?$|i8mm|bf16", flag)),
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "bf16": "emulated" if bf16_is_emulated(torch.bfloat16) else "native",
    }


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time dtbert against transformers, torch.compile, ONNX Runtime and OpenVINO on this CPU.",
        epilog="example: python scripts/bench_cpu.py --only '6x384 fp32' --rounds 3 --plot bench_cpu.png",
    )
    parser.add_argument("--output", type=Path, default=Path("bench_cpu.json"), help="JSON to write (%(default)s)")
    parser.add_argument("--plot", type=Path, help="PNG, PDF or SVG to draw")
    parser.add_argument("--again", type=Path, metavar="JSON", help="judge and draw these figures, and measure none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every provider (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="at most, for each workload (%(default)s)")
    parser.add_argument(
        "--seconds", type=float, default=12, help="of rounds of one workload at equal lengths, about (%(default)s)"
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="part of '6x768 fp32 8x384 OpenVINO', 'scoring 6x768 ...', 'end to end 6x384 ...'",
    )
    parser.add_argument("--squad", type=Path, metavar="FILE", help="SQuAD's development set; else its lengths alone")
    parser.add_argument("--windows", type=int, default=256, help="of SQuAD (%(default)s)")
    parser.add_argument("--questions", type=int, default=512, help="of SQuAD, in end to end (%(default)s)")
    parser.add_argument(
        "--batch-tokens",
        type=int,
        nargs="+",
        default=[384, 1024],
        help="that dtbert tries at true lengths (%(default)s)",
    )
    options = parser.parse_args()
    counts = {name: getattr(options, name) for name in ("threads", "rounds", "windows", "questions")}
    for name, count in (*counts.items(), *(("batch-tokens", tokens) for tokens in options.batch_tokens)):
        if count < 1:
            parser.error(f"--{name} must be at least 1, not {count}")
    for name in ("squad", "again"):
        if (file := getattr(options, name)) and not file.is_file():
            parser.error(f"--{name} {file}: there is no such file")
    try:
        re.compile(options.only)
    except re.error as error:
        parser.error(f"--only {options.only!r} is not a regular expression: {error}")
    return options


if __name__ == "__main__":
    main(arguments())
