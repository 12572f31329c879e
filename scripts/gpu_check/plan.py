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
    parts, wanted = _Parts(options), options.only or names()
    checks = parts.checks() if CHECK in wanted else []
    if TUNE in wanted:
        # Only what was held to integers in the same run is timed.
        checks.append(parts.configurations())
    found = [
        Stage("record", (parts.benchmark("record"),), 25, 45, 0),
        Stage(CHECK, tuple(checks), *((75, 180) if CHECK in wanted else (30, 80)), 0),
        Stage(TUNE, (parts.tune(),), 15, 45, 1),
        Stage("tests", (parts.tests(),), 60, 240, 1),
    ]
    for name, (least, most, worth) in {**_BENCHMARKS, **_COMPILED}.items():
        found.append(Stage(name, (parts.benchmark(name),), least, most, worth))
    chosen = [stage for stage in found if stage.name in wanted or (stage.name == CHECK and checks)]
    # A trial is as slow as its processor.
    return [replace(stage, most_s=_TRIAL * stage.most_s) for stage in chosen] if options.tiny else chosen


def names() -> list[str]:
    return ["record", CHECK, TUNE, "tests", *_BENCHMARKS, *_COMPILED]


class _Parts:
    def __init__(self, options: argparse.Namespace) -> None:
        self._out, self._commit = options.out, options.commit
        self._records = options.out / RECORDS
        self._trial = options.tiny
        self._common = ["--records", str(self._records), "--device", options.device]
        self._common += ["--tiny"] if options.tiny else []
        # Without a GPU the kernels are interpreted.
        self._kernels = {"TRITON_INTERPRET": "1"} if options.device == "cpu" else {}

    def checks(self) -> list[Part]:
        """What times nothing, beside `configurations`: it compiles and computes on all cores at once."""
        found = [self._module("smoke", "gpu_check.smoke")]
        # It begins at its turn, for nothing says that the sanitizer would hand it on.
        part = self._module("memcheck", "gpu_check.memcheck", awaits=False)
        if self._trial:
            return [*found, part]
        ptxas, sanitizer = machine_ptxas(), _sanitizer()
        if ptxas is not None:
            found.append(self._module("smoke by the machine's ptxas", "gpu_check.smoke", "--ptxas", ptxas))
        if sanitizer is not None:
            # A python3 may only start the Python that runs, seconds before that touches the device: it attaches to
            # whatever process does, and waits for it as long as the part may take.
            processes = ("--target-processes", "all", "--launch-timeout", "0")
            options = ("--tool", "memcheck", *processes, "--error-exitcode", "9")
            # Each tensor in memory of its own, so that what lies behind it is nobody's.
            separate = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            found.append(replace(part, command=(sanitizer, *options, *part.command), environment=separate))
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
        command = [sys.executable, str(ROOT / "scripts" / "bench_gpu.py"), *self._common, "--await-turn"]
        command += ["--only", section, *self._of_commit()]
        if self._trial:
            command += ["--rounds", "1", "--block-ms", "0.1"]
        return Part(section, tuple(command), self._kernels if section == "tuned" else {})

    def _module(self, name: str, module: str, *arguments: str, awaits: bool = True) -> Part:
        command = [sys.executable, "-m", module, *arguments, *self._common, *(["--await-turn"] if awaits else [])]
        return Part(name, tuple(command), self._kernels, awaits)

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
