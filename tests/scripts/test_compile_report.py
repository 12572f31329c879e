"""Every kernel compiles for GPUs that are not there, without spills and within their shared memory."""

import importlib
import itertools
import pkgutil
import subprocess
import sys
from functools import partial

import pytest
import torch
from triton import knobs
from triton.runtime.jit import JITFunction

from dtbert.kernels import triton as kernels
from dtbert.kernels.triton import configs
from dtbert.kernels.triton.launch import ARCHITECTURES, architecture
from scripts import compile_report
from scripts.compile_report import cases, recording


def test_every_kernel_compiles_for_every_architecture() -> None:
    command = [sys.executable, compile_report.__file__, "--brief", "--processes", "2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    rows = result.stdout.splitlines()
    kernels = ("embed", "attention", "cls logits", "cls sum", "combine_partials", "select", "add_norm", "fused_linear")
    kernels = (*kernels, "scatter", "question overlap")
    for arch, matrix in (("sm_80", "mma.sync"), ("sm_90", "wgmma"), ("sm_100", "tcgen05.mma"), ("gfx942", "v_mfma")):
        for kernel in kernels:
            assert any(row.split()[:1] == [arch] and f"  {kernel}" in row for row in rows), f"no {kernel} for {arch}"
        assert any(row.startswith(f"{arch} ") and matrix in row for row in rows)


def test_every_kernel_that_is_launched_has_a_case() -> None:
    names = [found.name for found in pkgutil.iter_modules(kernels.__path__, f"{kernels.__name__}.")]
    modules = [importlib.import_module(name) for name in names]
    jitted = [value for module in modules for value in vars(module).values() if isinstance(value, JITFunction)]
    called = {name for function in jitted for name in function.fn.__code__.co_names}
    launched = {function.__name__ for function in jitted} - called
    assert launched == {case.launch("sm_90").source.name for case in cases()}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_cases_are_launches(arch: str) -> None:
    found = {case.name: case.launch(arch) for case in cases()}
    assert len(found) == len(cases())
    for name, (source, *_) in found.items():
        constants = {source.fn.arg_names[i] for (i,) in source.constants}
        assert {argument for argument, kind in source.signature.items() if kind == "constexpr"} == constants, name
    # All but rows of 312 values and the number of tokens.
    source = found["fused_linear bf16 in 312"].source
    aligned = {source.fn.arg_names[i] for (i,), attributes in source.attrs.items() if attributes}
    assert aligned == {"x", "weight", "bias", "output", "outputs"}
    assert found["add_norm fp32 H768 gather"].source.signature["keep_indices"] == "*i64"


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_row_of_a_table_has_a_case(arch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = set()

    def chosen(arch: str, kernel: str, dtype: torch.dtype, size: int, variant: str) -> configs.Config:
        asked.add((kernel, configs.dtype_name(dtype), configs.padded_size(size), variant))
        return configs.candidates(kernel, dtype, size, variant)[0]

    monkeypatch.setattr(configs, "_chosen", chosen)
    for case in cases():
        case.launch(arch)
    kinds = itertools.product(("float32", "bfloat16", "float16"), (32, 64, 128), configs.variants("attention"))
    assert {("attention", *kind) for kind in kinds} <= asked
    path = configs.TABLES / f"{arch}.json"
    assert not path.exists() or {row.key for row in configs.read_table(path).rows} <= asked


def test_nothing_is_pretended_after_a_recording() -> None:
    hook = knobs.runtime.jit_cache_hook
    with recording("gfx942"):
        assert architecture(torch.device("cuda")) == architecture(torch.device("cpu")) == "gfx942"
    assert architecture(torch.device("cpu")) == "interpreter"
    assert knobs.runtime.jit_cache_hook is hook


def test_problems_are_told_and_fail_the_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    row = partial(compile_report.Row, "sm_80", "some kernel", True, 4, 2, 255)
    rows = [row(spilled=8, shared=0), row(spilled=0, shared=200_000), row(error="no such type")]
    rows.append(row(spilled=0, shared=0, barrier="no barrier"))
    monkeypatch.setattr(compile_report, "report", lambda *_: rows)
    monkeypatch.setattr(sys, "argv", ["compile_report.py"])
    assert compile_report.main() == 1
    out = capsys.readouterr().out
    for problem in (
        "spills",
        "needs more than 166912 bytes of shared memory",
        "no such type",
        "no barrier",
        "4 with a problem",
    ):
        assert problem in out


@pytest.mark.parametrize(
    ("interpreted", "arguments", "message"),
    [
        (True, [], "interpreted kernels cannot be compiled"),
        (False, ["--only", "no such kernel"], "no case's name holds 'no such kernel'"),
    ],
)
def test_the_report_refuses_the_interpreter_and_an_unknown_case(
    interpreted: bool,
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(compile_report, "INTERPRETED", interpreted)
    monkeypatch.setattr(sys, "argv", ["compile_report.py", *arguments])
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # which the report sets
    with pytest.raises(SystemExit) as exited:
        compile_report.main()
    assert exited.value.code == 2
    assert message in capsys.readouterr().err
