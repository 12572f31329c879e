"""Every kernel compiles for GPUs that are not there, without spills and within their shared memory."""

import os
import subprocess
import sys
from pathlib import Path

REPORT = Path(__file__).parents[2] / "scripts/compile_report.py"


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, REPORT, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})


def test_every_kernel_compiles_for_every_architecture() -> None:
    result = run("--brief", "--processes", "2")
    assert result.returncode == 0, result.stdout + result.stderr
    rows = result.stdout.splitlines()
    kernels = ("embed", "attention", "cls logits", "cls sum", "combine_partials", "select", "add_norm", "fused_linear")
    for arch, matrix in (("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")):
        for kernel in (*kernels, "scatter"):
            assert any(row.split()[:1] == [arch] and f"  {kernel}" in row for row in rows), f"no {kernel} for {arch}"
        assert any(row.startswith(f"{arch} ") and matrix in row for row in rows)


def test_problems_are_told_and_fail_the_report(tmp_path: Path) -> None:
    script = tmp_path / "report.py"
    script.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(REPORT.parent)!r})\n"
        "import compile_report as report\n"
        "row = lambda **figures: report.Row('sm_80', 'some kernel', True, 4, 2, 255, **figures)\n"
        "rows = [row(spilled=8, shared=0), row(spilled=0, shared=200_000), row(error='no such type')]\n"
        "report.report = lambda *_: rows\n"
        "sys.argv = ['compile_report.py']\n"
        "sys.exit(report.main())\n"
    )
    result = subprocess.run([sys.executable, script], capture_output=True, text=True)
    assert result.returncode == 1, result.stderr
    for problem in ("spills", "needs more than 166912 bytes of shared memory", "no such type", "3 with a problem"):
        assert problem in result.stdout


def test_the_report_refuses_the_interpreter_and_an_unknown_case() -> None:
    result = run(TRITON_INTERPRET="1")
    assert result.returncode == 2
    assert "interpreted kernels cannot be compiled" in result.stderr
    result = run("--only", "no such kernel")
    assert result.returncode == 2
    assert "no case's name holds 'no such kernel'" in result.stderr
