"""Which parts there are, in which order, and what they are worth."""

import argparse
import importlib.util
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch
from gpu_bench.machine import machine_ptxas

from gpu_check.runner import Part, Stage

ROOT = Path(__file__).resolve().parents[2]
RECORDS, LOG, SUMMARY = "results.jsonl", "log.txt", "summary.txt"
CHECK, TUNE = "check", "tune"
# Sections of bench_gpu.py: seconds at the least and at the most, and their worth.
_BENCHMARKS = {
    "model": (15, 35, 2),
    "latency": (12, 25, 2),
    "schedule": (15, 30, 5),
    "squad": (15, 30, 3),
    "attention": (12, 30, 3),
    "scores": (15, 35, 4),
    "steps": (15, 35, 8),
    "graphs": (12, 30, 6),
    "float8": (12, 30, 6),
    "tuned": (10, 25, 7),
    "drops": (12, 25, 9),
}
_COMPILED = {"compiled": (60, 110, 10), "compiled_squad": (60, 110, 11), "compiled_latency": (45, 80, 12)}
_TRIAL = 5
_NO_TESTS = 5  # pytest's exit code where every test is left out


def stages(options: argparse.Namespace) -> list[Stage]:
    """In the order in which they run; what times anything runs alone."""
    parts = _Parts(options)
    found = [
        Stage("record", (parts.benchmark("record"),), 25, 45, 0),
        Stage(CHECK, tuple(parts.checks()), 75, 130, 0),
        Stage(TUNE, (parts.tune(),), 15, 45, 1),
        Stage("tests", (parts.tests(),), 60, 130, 1),
    ]
    for name, (least, most, worth) in {**_BENCHMARKS, **_COMPILED}.items():
        found.append(Stage(name, (parts.benchmark(name),), least, most, worth))
    chosen = [stage for stage in found if not options.only or stage.name in options.only]
    if options.only and TUNE in options.only and CHECK not in options.only:
        # Only what was held to integers in the same run is timed.
        place = next(place for place, stage in enumerate(chosen) if stage.name == TUNE)
        chosen.insert(place, Stage(CHECK, (parts.configurations(),), 30, 80, 0))
    # A trial is as slow as its processor.
    return [replace(stage, most_s=_TRIAL * stage.most_s) for stage in chosen] if options.tiny else chosen


def names() -> list[str]:
    return ["record", CHECK, TUNE, "tests", *_BENCHMARKS, *_COMPILED]


class _Parts:
    def __init__(self, options: argparse.Namespace) -> None:
        self._out, self._commit = options.out, options.commit
        self._records = options.out / RECORDS
        self._trial = options.tiny
        self._common = ["--records", str(self._records), "--device", options.device, "--await-turn"]
        self._common += ["--tiny"] if options.tiny else []
        # Without a GPU the kernels are interpreted.
        self._kernels = {"TRITON_INTERPRET": "1"} if options.device == "cpu" else {}

    def checks(self) -> list[Part]:
        """What times nothing: it compiles and computes on all cores at once."""
        found = [self._module("smoke", "gpu_check.smoke"), self.configurations()]
        if self._trial:
            return [*found, self._module("memcheck", "gpu_check.memcheck")]
        ptxas, sanitizer = machine_ptxas(), _sanitizer()
        if ptxas is not None:
            found.append(self._module("smoke by the machine's ptxas", "gpu_check.smoke", "--ptxas", ptxas))
        if sanitizer is not None:
            part = self._module("memcheck", "gpu_check.memcheck")
            # A python3 may only start the Python that runs, seconds before that touches the device: it attaches to
            # whatever process does, and waits for it as long as the part may take.
            processes = ("--target-processes", "all", "--launch-timeout", "0")
            options = ("--tool", "memcheck", *processes, "--error-exitcode", "9")
            # Each tensor in memory of its own, so that what lies behind it is nobody's.
            separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(Part("memcheck", (sanitizer, *options, *part.command), separate))
        return found

    def configurations(self) -> Part:
        return self._module("compile and hold to integers", "gpu_check.tune", "check")

    def tune(self) -> Part:
        folders = [self._out] if self._trial else [self._out, ROOT / "dtbert" / "kernels" / "triton" / "tuned"]
        tables = ["--tables", *map(str, folders)]
        return self._module("tune", "gpu_check.tune", "time", *tables, *self._of_commit())

    def tests(self) -> Part:
        command = [sys.executable, "-m", "pytest", "-m", "gpu", str(ROOT / "tests" / "gpu")]
        command += ["-p", "no:cacheprovider", "-p", "no:benchmark", "--tb=short", "--show-capture=no"]
        command += ["--records", str(self._records)]
        if importlib.util.find_spec("xdist") is not None:
            command += ["-n", "0" if self._trial else "8"]
        return Part("tests", tuple(command), passes=(0, _NO_TESTS) if self._trial else (0,), awaits=False)

    def benchmark(self, section: str) -> Part:
        command = [sys.executable, str(ROOT / "scripts" / "bench_gpu.py"), *self._common, "--only", section]
        command += self._of_commit()
        if self._trial:
            command += ["--rounds", "1", "--block-ms", "0.1"]
        return Part(section, tuple(command), self._kernels if section == "tuned" else {})

    def _module(self, name: str, module: str, *arguments: str) -> Part:
        return Part(name, (sys.executable, "-m", module, *arguments, *self._common), self._kernels)

    def _of_commit(self) -> list[str]:
        return ["--commit", self._commit] if self._commit else []


def _sanitizer() -> str | None:
    usual = Path("/usr/local/cuda/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or (str(usual) if usual.is_file() else None)


def missing(device: str) -> str:
    """What this Python lacks to run the parts; empty where it lacks nothing."""
    needed = ("triton", "transformers", "safetensors", "tokenizers", "huggingface_hub", "pytest", "hypothesis", "tqdm")
    absent = [name for name in needed if importlib.util.find_spec(name) is None]
    if absent:
        return f"this Python lacks {', '.join(absent)}"
    if device == "cuda" and not torch.cuda.is_available():
        return f"torch {torch.__version__} finds no CUDA GPU"
    return ""
