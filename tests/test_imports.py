"""The architecture: who may import whom, and what `import dtbert` may cost."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "dtbert"
# Each room may import those before it.
RANKS = {
    "files": -1,
    "pictures": -1,
    "kernels": 0,
    "model": 1,
    "weights": 2,
    "qa": 3,
    "text": 4,
    "evaluation": 5,
    "export": 5,
    "profiling": 6,
    "tracing": 6,
    "training": 6,
    "search": 7,
    "serve": 7,
    "jobs": 7,
    "cli": 8,
}
FILES = sorted(PACKAGE.rglob("*.py"))


def imported_modules(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def room(parts: tuple[str, ...]) -> str:
    return parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_module_imports_only_rooms_below_it(path: Path) -> None:
    here = room(path.relative_to(PACKAGE).parts)
    imports = imported_modules(path)
    assert not {name for name in imports if name.split(".")[0] == "transformers"}
    if here in ("__init__", "__main__"):
        return
    assert here in RANKS, f"{path} is in no room of the architecture"
    for name in imports:
        if name.startswith("dtbert."):
            there = name.split(".")[1]
            assert RANKS[there] <= RANKS[here], f"{here} imports {name}"


def test_files_imports_the_standard_library_alone() -> None:
    assert {name.split(".")[0] for name in imported_modules(PACKAGE / "files.py")} <= sys.stdlib_module_names


def test_triton_is_imported_only_by_its_own_kernels() -> None:
    users = {path for path in FILES if any(name.split(".")[0] == "triton" for name in imported_modules(path))}
    assert all("triton" in path.relative_to(PACKAGE).parts for path in users)


def test_import_of_dtbert_loads_neither_triton_nor_transformers() -> None:
    heavy = {"triton", "transformers", "huggingface_hub", "matplotlib", "onnx"}
    heavy |= {"ray", "pyarrow", "fastapi", "prometheus_client"}
    listed = f"; print(sorted({heavy} & sys.modules.keys()))"
    # A GPU build of torch may import triton itself: compare with what torch alone loads.
    alone = run("import sys, torch" + listed)
    assert run("import sys, dtbert; dtbert.QuestionAnswerer; dtbert.load_model" + listed) == alone


def test_triton_need_not_be_there() -> None:
    blocker = (
        "import importlib.abc, sys\n"
        "class Blocker(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'triton': raise ModuleNotFoundError('blocked', name=name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
    )
    used = (
        "import dtbert\n"
        "half = dtbert.LengthSchedule.ratios([0.9, 0.8, 0.7, 0.6, 0.5, 0.4])\n"
        "print(dtbert.QuestionAnswerer.load()('Who wrote it?', 'Ada wrote it.', schedule=half).text)\n"
        "try: dtbert.load_model(backend='triton')\n"
        "except ValueError as error: print(error)\n"
    )
    answer, error = run(blocker + used).splitlines()
    assert answer == "Ada"
    assert "pip install 'dtbert[triton]'" in error


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
