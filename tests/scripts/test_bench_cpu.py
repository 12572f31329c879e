"""What the CPU benchmark makes of its figures: aims where these were measured, and the picture; nothing is timed."""

import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[2]
Again = Callable[..., dict[str, Any]]


@pytest.fixture
def again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Again:
    """Runs the script on figures that are there; gives what it writes."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    script = importlib.import_module("bench_cpu")

    def run(results: dict[str, Any], *more: str) -> dict[str, Any]:
        (tmp_path / "before.json").write_text(json.dumps(results))
        files = ["--again", str(tmp_path / "before.json"), "--output", str(tmp_path / "after.json")]
        monkeypatch.setattr(sys, "argv", ["bench_cpu.py", *files, *more])
        script.main(script.arguments())
        after: dict[str, Any] = json.loads((tmp_path / "after.json").read_text())
        return after

    return run


def comparison(dtype: str, workload: str, computes_in: str = "float32", **ms: float) -> dict[str, Any]:
    base = ms.get("transformers sdpa")
    results = [
        {
            "provider": provider,
            "setting": "",
            "batching": "",
            "computes_in": computes_in,
            "relative": None if base is None else base / own,
            "ms": own,
            "quartiles_ms": [0.9 * own, 1.2 * own],
        }
        for provider, own in ms.items()
    ]
    sizes = {"model": "6x384", "dtype": dtype, "workload": workload, "windows": 8, "tokens": 3072}
    return {**sizes, "results": results, "not_timed": []}


def dropped(model: str, dtype: str, workload: str, scorer: str, ratio: float) -> dict[str, Any]:
    row = {"model": model, "dtype": dtype, "workload": workload, "scorer": scorer, "ratio": ratio}
    return (
        row
        | {"time_saved": ratio / 2, "macs_saved": 0.5, "ms": 1 - ratio / 2, "quartiles_ms": [0.4, 0.9]}
        | {"ms_without": 1.0}
    )


def results_of(bf16: str = "native", **lists: Any) -> dict[str, Any]:
    device = {"cpu": "a CPU", "torch_capability": "AVX512", "threads": 2, "bf16": bf16, "flags": ["avx512_vnni"]}
    versions = dict.fromkeys(("torch", "transformers", "onnxruntime", "openvino"), "1")
    made = {"comparisons": [], "dropping": [], "scoring": [], "end_to_end": [], "aims": []}
    return {"date": "2026-11-26T00:00", "device": device, "versions": versions} | made | lists


PEERS = {"transformers sdpa": 10.0, "ONNX Runtime": 8.0, "OpenVINO": 9.0}


def test_aims_are_judged_where_the_run_measured_what_they_are_about(again: Again) -> None:
    comparisons = [
        comparison("fp32", "8x384", dtbert=8.0, **PEERS),
        comparison("fp32", "SQuAD windows", dtbert=7.5, **PEERS),
        comparison("bf16", "8x384", dtbert=8.0, OpenVINO=9.6),
        comparison("fp32", "1x384", dtbert=8.0, OpenVINO=9.0),  # who may be faster was not timed
        comparison("fp32", "1x128", **PEERS),
    ]
    drops = [
        dropped("6x768", "fp32", "1x384", "cls", 0.81),
        dropped("6x384", "bf16", "8x384", "received", 0.84),
        dropped("6x384", "fp32", "1x384", "received", 0.5),  # for which there is no aim
    ]
    layers = [dropped("6x384", "bf16", "8x384", scorer, 1.29) for scorer in ("received", "cls")]
    results = results_of(comparisons=comparisons, dropping=drops, scoring=layers)
    judged = {(aim["work"], aim["measured"]): aim["met"] for aim in again(results)["aims"]}
    assert judged == {
        ("6x384 fp32 8x384", 1.0): True,
        ("6x384 fp32 SQuAD windows", 1.067): False,
        ("6x384 bf16 8x384", 1.2): True,
        ("6x768 fp32 1x384, dropping by cls", 0.81): True,
        ("6x384 bf16 8x384, dropping by received", 0.84): False,
        ("6x384 bf16 8x384, one layer scored by received", 1.29): True,
    }
    emulated = again(results_of("emulated", comparisons=comparisons))["aims"]
    assert [aim["work"] for aim in emulated] == ["6x384 fp32 8x384", "6x384 fp32 SQuAD windows"]
    assert "fastest peer (ONNX Runtime)" in emulated[0]["aim"]


def answered(provider: str, budget: float | None, rate: float) -> dict[str, Any]:
    figures = {"questions_per_second": rate, "same_answers": 1.0, "ms": 1e3 / rate, "quartiles_ms": [1.0, 2.0]}
    return {"provider": provider, "setting": "", "budget": budget, **figures}


def test_aims_of_int8_and_of_answers(again: Again) -> None:
    comparisons = [
        comparison("fp32", "8x384", dtbert=8.0, **PEERS),
        comparison("int8", "8x384", "int8", dtbert=3.0, **PEERS),
        comparison("int8", "1x128", "float32", dtbert=3.0),  # what was not computed in int8 is not judged as int8
    ]
    ends = [answered("dtbert", None, 100), answered("dtbert", 0.25, 290), answered("OpenVINO", None, 80)]
    row = {"model": "6x384", "dtype": "bf16", "questions": 9, "results": ends, "not_timed": []}
    judged = {
        (aim["work"], aim["measured"]): aim["met"]
        for aim in again(results_of(comparisons=comparisons, end_to_end=[row]))["aims"]
    }
    assert judged == {
        ("6x384 fp32 8x384", 1.0): True,
        ("6x384 int8 8x384", 2.667): True,
        ("end to end 6x384 bf16", 1.25): True,
        ("end to end 6x384 bf16", 2.9): False,
    }


def test_bars_stand_side_by_side_with_their_quartiles(
    again: Again, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tuple[float, float, Any]] = []
    bar = Axes.bar

    def noted(axes: Axes, x: float, height: float, width: float, **style: Any) -> Any:
        bars.append((x, height, style["yerr"]))
        return bar(axes, x, height, width, **style)

    monkeypatch.setattr(Axes, "bar", noted)
    pair = {"dtbert": 8.0, "transformers sdpa": 10.0}
    comparisons = [comparison("fp32", "1x384", **pair), comparison("fp32", "8x384", **pair)]
    drops = [dropped("6x384", "fp32", "8x384", "received", 0.8)]
    path = tmp_path / "new" / "bench.svg"
    again(results_of(comparisons=comparisons, dropping=drops), "--plot", str(path))
    assert path.read_text().startswith("<?xml")
    assert [x for x, _, _ in bars] == pytest.approx([-0.225, 0.225, 0.775, 1.225, 0])
    assert [height for _, height, _ in bars] == pytest.approx([1, 1.25, 1, 1.25, 0.6])
    _, speed, ((below,), (above,)) = bars[1]
    assert (speed - below, speed + above) == pytest.approx((1.25 / 1.2, 1.25 / 0.9))
    with pytest.raises(SystemExit, match="nothing to draw"):
        again(results_of(comparisons=[comparison("fp32", "8x384", dtbert=8.0)]), "--plot", str(path))


@pytest.mark.parametrize(
    "name", ["bench_cpu", "bench_cpu_amx", "bench_cpu_avx2", "bench_cpu_avx512", "bench_cpu_avx512_bf16"]
)
def test_committed_figures_are_judged_by_the_aims_of_today(again: Again, name: str) -> None:
    results = json.loads((ROOT / "docs" / f"{name}.json").read_text("utf-8"))
    assert again(results) == results
