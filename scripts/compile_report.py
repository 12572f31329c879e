"""Compile every kernel in every shipped configuration for GPUs that are not there, and say what they make of it.

    python scripts/compile_report.py                    # a table; exit status 1 if a kernel has a problem
    python scripts/compile_report.py --arch sm_90 --only attention
    python scripts/compile_report.py --brief            # float32 and bfloat16, published sizes: what `make test` runs

A problem is an error of the compiler, a spill in a kernel that runs in every layer, more shared memory than a block
has, or a copy that may overwrite what another warpgroup still multiplies (`barriers`). Columns: registers a thread,
bytes of spilled registers a thread, shared memory a block, and the matrix instructions that were chosen. Nothing is run
and nothing is timed.

What is compiled is what a launch asks Triton for: the launchers are called on CPU tensors, and Triton is stopped before
it compiles.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import triton
from barriers import barrier_problem
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dtbert.kernels import Kept, Left, Packing, Partials, TokenIds
from dtbert.kernels.reference import ATTENTION_SCORES
from dtbert.kernels.triton import Triton
from dtbert.kernels.triton.add_norm import add_norm, add_norm_float8
from dtbert.kernels.triton.embed import embed, embed_float8
from dtbert.kernels.triton.float8 import scale_rows
from dtbert.kernels.triton.launch import ARCHITECTURES, INTERPRETED, SHARED_MEMORY, pretending
from dtbert.kernels.triton.linear import fused_linear
from dtbert.kernels.triton.select import MAX_SEQLEN

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
    barrier: str = ""  # how it breaks the rule of `barriers`
    error: str = ""

    @property
    def problem(self) -> str:
        if self.error:
            return self.error
        if self.hot and self.spilled:
            return "spills"
        if self.shared is not None and self.shared > SHARED_MEMORY[self.arch]:
            return f"needs more than {SHARED_MEMORY[self.arch]} bytes of shared memory"
        return self.barrier


class Launch(NamedTuple):
    """What Triton was asked for: the kernel with its signature, constants and alignment, and options."""

    source: ASTSource
    num_warps: int
    num_stages: int
    key: str  # what Triton looks up a compiled kernel by


@contextmanager
def recording(arch: str) -> Iterator[list[Launch]]:
    """Launches of tensors of any device end up in the list, as Triton would compile them for this GPU."""
    launches: list[Launch] = []

    def record(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        source = ASTSource(fn.jit_function, compile["signature"], compile["constants"], compile["configs"][0])
        launches.append(Launch(source, compile["num_warps"], compile["num_stages"], compile["key"]))
        return True  # and Triton neither compiles nor launches

    gpu = SimpleNamespace(
        get_current_device=lambda: arch, get_current_stream=lambda _: 0, get_current_target=lambda: TARGETS[arch]
    )
    hooked = patch.object(triton.knobs.runtime, "jit_cache_hook", record)
    with pretending(arch), patch.object(triton.runtime.driver, "_active", gpu), hooked:
        yield launches


class Case(NamedTuple):
    """A kernel in one shipped configuration."""

    kernel: str
    variant: str
    step: Callable[[], object]  # launches the kernel, among others
    architectures: tuple[str, ...] = ARCHITECTURES  # that have what it needs

    @property
    def name(self) -> str:
        return f"{self.kernel} {self.variant}".rstrip()

    @property
    def hot(self) -> bool:
        """Whether it runs in every layer of usual work, so that a register spill there is a defect."""
        # Sequences of 16,384 tokens are nobody's usual work.
        return self.kernel not in ("embed", "question overlap", "scatter") and self.variant != "long"

    def launch(self, arch: str) -> Launch:
        with recording(arch) as launches:
            self.step()
        function = f"_{self.kernel.replace(' ', '_')}_kernel"
        (launch,) = (launch for launch in launches if launch.source.name == function)
        return launch


def cases() -> list[Case]:
    """Every kernel for every dtype, the published widths and 12 heads, and the variants of the commonest of them."""
    # Nobody looks at the values; to fill large tensors would start threads, which a forked process waits for in vain.
    steps, ids = Triton(), torch.empty(2, dtype=torch.int64)
    packing = Packing((2,), torch.empty(2, dtype=torch.int32))
    long = Packing((MAX_SEQLEN,), torch.empty(2, dtype=torch.int32))
    found = [
        Case("question overlap", "", partial(steps.question_overlap, TokenIds(ids, ids, ids), packing)),
        Case("select", "", partial(steps.select, torch.empty(2), packing, packing)),
        Case("select", "long", partial(steps.select, torch.empty(2), long, packing)),
    ]
    for dtype, kind in ((torch.float32, "fp32"), (torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        floats = partial(torch.empty, dtype=dtype)
        for width in (384, 768):
            size, x, norm = f"{kind} H{width}", floats(2, width), (floats(width), floats(width), 1e-12)
            parts, again = Partials(torch.empty(1, 12, 2), 128, False), Left(packing, ids, x, ids, True)
            found += [
                Case("add_norm", size, partial(add_norm, x, floats(width), x, *norm, None)),
                Case("add_norm", f"{size} gather", partial(add_norm, x, floats(width), x, *norm, ids)),
                Case("embed", size, partial(embed, ids, ids, ids, x, x, x, *norm)),
                Case("scatter", size, partial(steps.scatter, x, ids, x)),
                Case("select", f"{size} drops", partial(steps.drop, Left(packing), packing, parts, x, x)),
                Case("select", f"{size} drops again", partial(steps.drop, again, packing, parts, x, x)),
            ]
        # bfloat16 also for a width that the kernel's blocks do not divide.
        for width in (312, 768) if kind == "bf16" else (768,):
            product = floats(2, width), floats(4 * width, width), floats(4 * width)
            found.append(Case("fused_linear", f"{kind} in {width}", partial(fused_linear, *product, "gelu")))
        for head_size in (32, 64, 128):
            size, packed = f"{kind} head {head_size}", (floats(2, 36 * head_size), packing, 12)
            context, cls = partial(steps.attention, *packed), partial(steps.significance, *packed, "cls")
            scored = {score: partial(steps.scored_attention, *packed, score) for score in ATTENTION_SCORES}
            found += [Case("attention", size, context), Case("cls logits", size, cls)]
            if (kind, head_size) != ("bf16", 64):
                found.append(Case("attention", f"{size} received", scored["received"]))
                alone = partial(steps.significance, *packed, "received")
                found.append(Case("attention", f"{size} received alone", alone))
                continue
            for score, step in scored.items():
                if score not in ("cls", "from_question"):
                    found.append(Case("attention", f"{size} {score}", step))
                if score in ("received", "from_question"):
                    alone = partial(steps.significance, *packed, score, ids)
                    found.append(Case("attention", f"{size} {score} alone", alone))
            found += [
                Case("attention", f"{size} kept", partial(context, Kept(ids, packing))),
                Case("combine_partials", "sum", scored["received"]),
                Case("combine_partials", "maximum", scored["received_max"]),
                Case("cls sum", "", cls),
            ]
    return sorted([*found, *_in_float8()], key=lambda case: case.kernel)


def _in_float8() -> list[Case]:
    """What writes rows in fp8, which NVIDIA has from sm_89 on."""
    floats, ids = partial(torch.empty, dtype=torch.bfloat16), torch.empty(2, dtype=torch.int64)
    found = []
    for width in (384, 768):
        x, norm = floats(2, width), (floats(width), floats(width), 1e-12)
        size, given = f"bf16 H{width} float8", (x, floats(width), x, *norm)
        found += [
            Case("add_norm", size, partial(add_norm_float8, *given, None)),
            Case("add_norm", f"{size} gather", partial(add_norm_float8, *given, ids)),
            Case("embed", size, partial(embed_float8, ids, ids, ids, x, x, x, *norm)),
            Case("scale_rows", size, partial(scale_rows, x, "")),
            Case("scale_rows", f"{size} gelu", partial(scale_rows, floats(2, 4 * width), "gelu")),
        ]
    found.append(Case("scale_rows", "bf16 in 8192 float8", partial(scale_rows, floats(2, 8192), "gelu_tanh")))
    return [case._replace(architectures=("sm_90", "sm_100")) for case in found]


def compile_case(arch: str, name: str) -> Row:
    # A kernel cannot be sent to another process: a name can.
    case = next(case for case in cases() if case.name == name)
    source, num_warps, num_stages, _ = case.launch(arch)
    options: dict[str, Any] = {"num_warps": num_warps, "num_stages": num_stages}
    about = {"arch": arch, "name": name, "hot": case.hot, **options}
    try:
        compiled = triton.compile(source, target=TARGETS[arch], options=options)
    except Exception as error:  # whatever a compiler raises is what the report is for
        return Row(**about, error=" ".join(str(error).split())[:200] or type(error).__name__)
    text = compiled.asm["amdgcn"] if "amdgcn" in compiled.asm else compiled.asm["ptx"]
    matrix = next((name for name in MATRIX_INSTRUCTIONS if name in text), "")
    registers, spilled = _amd_usage(text) if "amdgcn" in compiled.asm else _nvidia_usage(compiled.asm["cubin"])
    barrier = barrier_problem(text) if matrix == "wgmma" and num_warps > 4 else ""
    shared = compiled.metadata.shared
    return Row(**about, registers=registers, spilled=spilled, shared=shared, matrix=matrix, barrier=barrier)


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
_NOT_BRIEF = re.compile("fp16|in 8192|head 128|H768|cls logits bf16 head ..$|bf16 head 32")


def report(architectures: list[str], only: str, brief: bool, processes: int) -> list[Row]:
    chosen = [case for case in cases() if only in case.name and not (brief and _NOT_BRIEF.search(case.name))]
    wanted = [(arch, case.name) for arch in architectures for case in chosen if arch in case.architectures]
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
    if INTERPRETED:
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
