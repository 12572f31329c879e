"""What the figures belong to: the device and its state, the versions of what compiles for it, and its ceilings."""

import ctypes
import datetime
import platform
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from bench.provenance import commit, cpu_name, version

from dtbert.profiling.ceilings import measure_ceilings

_CLOCKS = "clocks.sm,clocks.max.sm,clocks.mem,temperature.gpu,power.draw,power.limit"


def describe(device: torch.device, of_commit: str | None) -> dict[str, Any]:
    """``date``, ``commit``, ``device`` and ``versions``."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": of_commit or commit(),
        "device": describe_device(device),
        "versions": package_versions() | _compilers(),
    }


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The rates of a large product and a large copy, measured now."""
    return {**vars(measure_ceilings(device, dtype)), "dtype": str(dtype).removeprefix("torch.")}


def describe_device(device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {"name": cpu_name()}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "driver": _of_nvidia_smi("driver_version"),
        "clocks": dict(zip(_CLOCKS.split(","), _of_nvidia_smi(_CLOCKS).split(", "), strict=False)),
    }


def package_versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "cuda": torch.version.cuda or "none",
        "cudnn": str(torch.backends.cudnn.version() or "none"),
        **{name: version(name) for name in ("torch", "triton", "transformers")},
    }


def machine_ptxas() -> str | None:
    """The ptxas of the CUDA that is installed here, beside the one that Triton brings."""
    usual = Path("/usr/local/cuda/bin/ptxas")
    return shutil.which("ptxas") or (str(usual) if usual.is_file() else None)


def _compilers() -> dict[str, str]:
    import triton

    found = {"triton's ptxas": str(Path(triton.__file__).parent / "backends/nvidia/bin/ptxas")}
    found["machine's ptxas"] = machine_ptxas() or ""
    return {**{name: _release(path) for name, path in found.items()}, "cublas": _cublas()}


def _release(path: str) -> str:
    """What a program of CUDA says is its version."""
    text = _output([path, "--version"]) if path else ""
    match = re.search(r"V(\d[\d.]*)", text)
    return match[1] if match else "none"


def _cublas() -> str:
    """The version of the cuBLAS that torch has loaded."""
    number = ctypes.c_int()
    for name in ("libcublas.so.13", "libcublas.so.12"):
        try:
            library = ctypes.CDLL(name)
            parts = [library.cublasGetProperty(part, ctypes.byref(number)) or number.value for part in range(3)]
        except (OSError, AttributeError):
            continue
        return ".".join(map(str, parts))
    return "unknown"


def _of_nvidia_smi(fields: str) -> str:
    text = _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"])
    return text.split("\n")[0] or "unknown"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
