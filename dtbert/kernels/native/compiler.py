"""Compiling the native steps: once for a torch and a processor, into the user's cache."""

import functools
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dtbert.files import Json, lock, write_whole

_FOLDER = Path(__file__).parent
_SOURCES = ("attention.cpp", "dropped_attention.cpp", "linear.cpp", "selection.cpp", "training.cpp")
_HEADERS = ("common.h", "activations.h", "dropout.h", "heads.h", "tiles.h")
_COMPILERS = ("g++", "clang++")
_FLAGS = ("-std=c++20", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC")
# Shortens what a compiler says to what a person reads.
_TELLING, _MOST_LINES = ("error:", "undefined", "multiple definition", "not found"), 12


class BuildError(RuntimeError):
    """The native steps cannot be compiled here; the message says why, and everything runs without them."""


def library() -> Path:
    """Where the compiled steps of this torch, this processor and these sources lie, or would."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dtbert" / "native" / f"{_key()}.so"


def is_built() -> bool:
    """Whether the compiled steps are there: never an error, for everything runs without them."""
    try:
        return library().is_file()
    except (OSError, RuntimeError):  # a cache that is somebody else's; a user without a home
        return False


def build() -> Path:
    """Compile the steps, unless that was done before; some half a minute.

    Raises:
        BuildError: there is no compiler, it failed, or this is not Linux.
        OSError: the cache cannot be written.
    """
    try:
        target = library()
    except RuntimeError as error:
        raise BuildError(f"there is no place for what is built ({error}): set XDG_CACHE_HOME to a folder") from error
    if target.is_file():
        return target
    if sys.platform != "linux":
        raise BuildError(f"the native steps are built on Linux alone, not on {sys.platform}")
    compiler = next((found for name in _COMPILERS if (found := shutil.which(name)) is not None), None)
    if compiler is None:
        raise BuildError(f"no C++ compiler is here: install one of {', '.join(_COMPILERS)}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with (target.parent / "lock").open("wb") as one, TemporaryDirectory(dir=target.parent) as folder:
        while not lock(one):  # until this block ends: another process may build, too
            time.sleep(0.2)
        if not target.is_file():
            made = Path(folder) / target.name
            _compile(compiler, made)
            made.replace(target)
    return target


def _compile(compiler: str, target: Path) -> None:
    installed = Path(torch.__file__).parent
    includes = [f"-I{installed / part}" for part in ("include", "include/torch/csrc/api/include")]
    defines = ["-DAT_PER_OPERATOR_HEADERS", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    objects = [target.with_name(f"{target.name}.{source}.o") for source in _SOURCES]
    command = [compiler, *_FLAGS, *includes, *defines, "-c"]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    parts = [
        subprocess.Popen([*command, str(_FOLDER / source), "-o", str(made)], **pipes)
        for source, made in zip(_SOURCES, objects, strict=True)
    ]
    said = [part.communicate()[0] for part in parts]
    for part, text in zip(parts, said, strict=True):
        _check(part.returncode, text)
    # Not -fopenmp here: it would bring another runtime beside the one that torch has loaded.
    linked = ["-shared", "-o", str(target), *map(str, objects), f"-L{installed / 'lib'}", "-ltorch_cpu", "-lc10"]
    done = subprocess.run([compiler, *linked, *_openmp()], **pipes, check=False)
    _check(done.returncode, done.stdout)


def _check(status: int, text: bytes) -> None:
    if status:
        lines = [line for line in text.decode(errors="replace").splitlines() if any(word in line for word in _TELLING)]
        raise BuildError("the compiler failed:\n  " + "\n  ".join(lines[:_MOST_LINES] or [f"exit status {status}"]))


def _openmp() -> list[str]:
    """The OpenMP library that torch runs on, by its path: two in one process keep each other from the processor."""
    found = {line.split(maxsplit=5)[-1] for line in Path("/proc/self/maps").read_text().splitlines() if ".so" in line}
    names = ("libgomp", "libiomp5", "libomp")
    return sorted(path for path in found if Path(path).name.startswith(names))[:1]


@functools.cache
def _key() -> str:
    """Of torch, the processor's instructions and the sources."""
    digest = hashlib.sha256(f"{torch.__version__} {platform.machine()} {_instructions()} {_FLAGS}".encode())
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_FOLDER / name).read_bytes())
    return digest.hexdigest()[:24]


def _instructions() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


@functools.cache
def load() -> bool:
    """Load the compiled steps into torch, if they are there; whether they are."""
    if not is_built():
        return False
    try:
        torch.ops.load_library(str(library()))
    except OSError:  # of a torch that is not what it calls itself: build anew
        return False
    return True


def verdict() -> dict[str, float]:
    """By dtype, the time of a pass by the compiled steps over that by torch's own, as `record` left it here."""
    try:
        found = Json.parse(library().with_suffix(".json").read_bytes()).of(dict)
        return {name: float(ratio) for name, ratio in found.items()}
    except (OSError, TypeError, ValueError):
        return {}


def record(ratios: dict[str, float]) -> None:
    """Keep what was measured on this machine beside what was built; OSError where it cannot be written."""
    write_whole(library().with_suffix(".json"), json.dumps(ratios) + "\n")
