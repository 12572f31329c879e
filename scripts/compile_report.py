"""Compile every kernel in every shipped configuration for GPUs that are not there, and say what they make of it.

    python scripts/compile_report.py                    # a table; exit status 1 if a kernel has a problem
    python scripts/compile_report.py --arch sm_90 --only attention
    python scripts/compile_report.py --brief            # float32 and bfloat16, published sizes: what `make test` runs

A problem is an error of the compiler, a spill in a kernel that runs in every layer, or more shared memory than a block
has. Columns: registers a thread, bytes of spilled registers a thread, shared memory a block, and the matrix
instructions that were chosen. Nothing is run and nothing is timed.
"""

import argparse
import importlib
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import dtbert.kernels.triton as kernels
from dtbert.kernels.triton.launch import ARCHITECTURES, SHARED_MEMORY, CompileCase

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The first that is found in the assembly.
MATRIX_INSTRUCTIONS = ("wgmma", "tcgen05.mma", "mma.sync", "v_mfma")


@dataclass(frozen=True)
class Row:
    """What became of one case on one architecture; the figures are None where it did not compile."""

    arch: str
    name: str
    hot: bool
    num_warps: int
    num_stages: int
    registers: int | None = None
    spilled: int | None = None  # bytes a thread
    shared: int | None = None  # bytes a block
    matrix: str = ""
    error: str = ""

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.hot and self.spilled:
            return "spills"
        if self.shared is not None and self.shared > SHARED_MEMORY[self.arch]:
            return f"needs more than {SHARED_MEMORY[self.arch]} bytes of shared memory"
        return ""


def cases(arch: str) -> Iterator[tuple[str, int, CompileCase]]:
    """Every case of an architecture, with its module and its place there."""
    for module in sorted(info.name for info in pkgutil.iter_modules(kernels.__path__)):
        yield from ((module, i, case) for i, case in enumerate(_cases_of(module, arch)))


def _cases_of(module: str, arch: str) -> list[CompileCase]:
    listed = getattr(importlib.import_module(f"dtbert.kernels.triton.{module}"), "compile_cases", None)
    return [] if listed is None else list(listed(arch))


def compile_case(arch: str, module: str, place: int) -> Row:
    # A kernel cannot be sent to another process: its place can.
    case = _cases_of(module, arch)[place]
    about: dict[str, Any] = {
        "arch": arch,
        "name": case.name,
        "hot": case.hot,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
    }
    # As at a launch: torch's tensors are aligned, and so are the strides of the published widths.
    aligned = [
        parameter.num
        for parameter in case.kernel.params
        if (case.signature[parameter.name][0] == "*" and not parameter.do_not_specialize_on_alignment)
        or "stride" in parameter.name
    ]
    source = ASTSource(
        fn=case.kernel,
        signature=dict(case.signature),
        constexprs=dict(case.constexprs),
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    try:
        compiled = triton.compile(source, target=TARGETS[arch], options=options)
    except Exception as error:  # whatever a compiler raises is what the report is for
        return Row(**about, error=" ".join(str(error).split())[:200] or type(error).__name__)
    text = compiled.asm["amdgcn"] if "amdgcn" in compiled.asm else compiled.asm["ptx"]
    matrix = next((name for name in MATRIX_INSTRUCTIONS if name in text), "")
    registers, spilled = _amd_usage(text) if "amdgcn" in compiled.asm else _nvidia_usage(compiled.asm["cubin"])
    return Row(**about, registers=registers, spilled=spilled, shared=compiled.metadata.shared, matrix=matrix)


def _amd_usage(text: str) -> tuple[int, int]:
    registers, spilled = (_number(rf"\.{name}:\s+(\d+)", text) for name in ("vgpr_count", "vgpr_spill_count"))
    return registers, 4 * spilled


def _nvidia_usage(cubin: bytes) -> tuple[int, int]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Triton's kernels put nothing on the stack of their own accord: what is there was spilled.
    return _number(r"REG:(\d+)", usage), _number(r"STACK:(\d+)", usage) + _number(r"LOCAL:(\d+)", usage)


def _number(pattern: str, text: str) -> int:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"no {pattern} in what the compiler wrote:\n{text[-500:]}")
    return int(found[1])


def table(rows: list[Row]) -> str:
    header = ("arch", "kernel", "hot", "warps", "stages", "registers", "spilled", "shared", "matrix", "problem")
    lines: list[tuple[str, ...]] = [header]
    for row in rows:
        figures = ("-" if figure is None else str(figure) for figure in (row.registers, row.spilled, row.shared))
        hot, options = "yes" if row.hot else "", (str(row.num_warps), str(row.num_stages))
        lines.append((row.arch, row.name, hot, *options, *figures, row.matrix, row.problem))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    numbers = range(3, 8)
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i in numbers else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


# float16 takes the code of bfloat16, no published model has heads of 128, and a width changes no LayerNorm's code.
_NOT_BRIEF = re.compile("fp16|head 128|H768|cls logits bf16|bf16 head 32")


def report(architectures: list[str], only: str, brief: bool, processes: int) -> list[Row]:
    wanted = [
        (arch, module, place)
        for arch in architectures
        for module, place, case in cases(arch)
        if only in case.name and not (brief and _NOT_BRIEF.search(case.name))
    ]
    # A cache of its own, so that every kernel is compiled here and now.
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TRITON_CACHE_DIR"] = folder
        with ProcessPoolExecutor(processes) as pool:
            return list(pool.map(compile_case, *zip(*wanted, strict=True))) if wanted else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), help="GPUs")
    parser.add_argument("--only", default="", metavar="TEXT", help="cases whose name holds this text")
    parser.add_argument("--brief", action="store_true", help="leave out variants of one kernel that compile alike")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="compilers at a time")
    options = parser.parse_args()
    if kernels.INTERPRETED:
        parser.error("TRITON_INTERPRET is set: interpreted kernels cannot be compiled, unset it")
    rows = report(options.arch, options.only, options.brief, options.processes)
    if not rows:
        parser.error(f"no case's name holds {options.only!r}")
    print(table(rows))
    problems = [row for row in rows if row.problem]
    print(f"\n{len(rows)} cases compiled for {', '.join(options.arch)}: {len(problems)} with a problem")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
