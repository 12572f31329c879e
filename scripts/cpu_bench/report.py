"""From the results of bench_cpu.py to aims, a table and a picture.

python scripts/cpu_bench/report.py docs/bench_cpu.json --plot docs/bench_cpu.png
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]

_OWN = "dtbert"
_SDPA = "transformers sdpa"
_TRANSFORMERS = ("transformers eager", _SDPA)
_ALL_KEPT = ("1x384", "8x384")
_SQUAD = "SQuAD windows"
# At least these, as times of a peer over dtbert's.
_SPEED_AIMS = {
    "fp32": ((("ONNX Runtime",), 1.0), (("OpenVINO",), 1 / 1.1), ((_SDPA,), 2.4)),
    "bf16": ((("OpenVINO",), 1.0), (_TRANSFORMERS, 1.2)),
}
_SQUAD_AIM = 1.1
_SAVING_AIM = 0.9
_SCORING_AIMS = {"received": 1.3, "cls": 1.03}

_DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
_MODELS = {"6x768": "6 layers of 768, random weights", "6x384": "6 layers of 384, the shipped model"}
_COLORS = {
    "transformers eager": "#c9ced6",
    _SDPA: "#a4acb8",
    "torch.compile": "#7f8998",
    "ONNX Runtime": "#8fb0d3",
    "OpenVINO": "#5a86b8",
    _OWN: "#e2571e",
}
# Hides the line at 1 behind a figure.
_BEHIND_LABELS = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
_STYLE: Any = {"font.size": 9, "axes.titlesize": 10, "axes.spines.top": False, "axes.spines.right": False}


def aims(results: Results) -> list[Row]:
    """Each aim that the results can judge: ``work``, ``aim``, ``measured`` and whether it is ``met``."""
    return [*_speed_aims(results), *_saving_aims(results)]


def _speed_aims(results: Results) -> Iterator[Row]:
    for row in results["comparisons"]:
        work = _title(row)
        if row["workload"] in _ALL_KEPT:
            for peers, least in _SPEED_AIMS[row["dtype"]]:
                name = " or ".join(peers) if len(peers) == 1 else "transformers"
                yield from _judge(work, f"at least {least:.2f} times as fast as {name}", _lead(row, peers), least)
        elif row["workload"] == _SQUAD:
            peers = tuple(result["provider"] for result in row["results"] if result["provider"] != _OWN)
            aim = f"at least {_SQUAD_AIM:.2f} times as fast as the fastest peer"
            yield from _judge(work, aim, _lead(row, peers), _SQUAD_AIM)


def _saving_aims(results: Results) -> Iterator[Row]:
    for row in results["dropping"]:
        work = f"{_title(row)}, dropping by {row['scorer']}"
        yield from _judge(work, f"at least {_SAVING_AIM} of the MACs saved is time saved", row["ratio"], _SAVING_AIM)
    for row in results["scoring"]:
        most = _SCORING_AIMS[row["scorer"]]
        work = f"{_title(row)}, one layer scored by {row['scorer']}"
        yield from _judge(work, f"at most {most} times as long as without scores", row["ratio"], most, largest=True)


def _judge(work: str, aim: str, measured: float | None, bound: float, largest: bool = False) -> Iterator[Row]:
    if measured is not None:
        met = measured <= bound if largest else measured >= bound
        yield {"work": work, "aim": aim, "measured": round(measured, 3), "met": met}


def _lead(row: Row, peers: tuple[str, ...]) -> float | None:
    """The time of the fastest of the peers over dtbert's."""
    ms = {result["provider"]: result["ms"] for result in row["results"]}
    theirs = [ms[peer] for peer in peers if peer in ms]
    return min(theirs) / ms[_OWN] if theirs and _OWN in ms else None


def _title(row: Row) -> str:
    return f"{row['model']} {row['dtype']} {row['workload']}"


def table(results: Results) -> str:
    """The results as text, ratios first."""
    lines = [_caption(results)]
    for row in results["comparisons"]:
        lines += ["", f"{_title(row)}, {row['tokens']} tokens", f"  {'speed':>6} {'ms':>10} {'quartiles':>21}"]
        lines += [
            _line(result, row["dtype"]) for result in sorted(row["results"], key=lambda result: float(result["ms"]))
        ]
        reasons = dict.fromkeys((_engine(entry), entry["reason"]) for entry in row["not_timed"])
        lines += [f"  {'-':>6} {engine}: {reason}" for engine, reason in reasons]
    for section, meaning in (
        ("dropping", "time saved over executed MACs saved"),
        ("scoring", "time over time without"),
    ):
        lines += ["", f"{section}: {meaning}"] if results[section] else []
        for row in results[section]:
            times = f"{row['ms']:.1f} ms, without {row['ms_without']:.1f} ms"
            lines.append(f"  {row['ratio']:6.3f} {_title(row)}, {row['scorer']}: {times}")
    lines += ["", "aims"] if results["aims"] else []
    for aim in results["aims"]:
        lines.append(f"  {'met' if aim['met'] else 'NOT MET':7} {aim['measured']:6.3f}  {aim['work']}: {aim['aim']}")
    return "\n".join(lines)


def _line(result: Row, dtype: str) -> str:
    speed = "-" if result["relative"] is None else f"{result['relative']:.2f}"
    quartiles = " - ".join(f"{value:.1f}" for value in result["quartiles_ms"])
    # A CPU that has no bfloat16 makes some compute in float32.
    other = "" if result["computes_in"] == _DTYPES[dtype] else f", computes in {result['computes_in']}"
    return f"  {speed:>6} {result['ms']:10.1f} {quartiles:>21}  {_engine(result)}{other}"


def _engine(entry: Row) -> str:
    return ", ".join(filter(None, (entry["provider"], entry["setting"], entry.get("batching"))))


def _caption(results: Results) -> str:
    device, versions = results["device"], results["versions"]
    threads = f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}"
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "onnxruntime", "openvino"))
    return f"{device['cpu']} ({device['torch_capability']}), {threads}, {results['date'][:10]}, {packages}"


def plot(results: Results, path: Path) -> None:
    """Draw the speed of each provider relative to transformers sdpa, one panel per model and dtype."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Where bfloat16 is emulated its bars would compare float32 with an emulation.
    dtypes = ("fp32",) if results["device"]["bf16"] == "emulated" else ("fp32", "bf16")
    rows = [row for row in results["comparisons"] if row["dtype"] in dtypes and _relative(row)]
    panels = list(dict.fromkeys((row["model"], row["dtype"]) for row in rows))
    if not panels:
        raise ValueError(f"nothing to draw: no workload of the results has both a figure of {_SDPA} and another")
    with pyplot.rc_context(_STYLE):
        figure, axes = pyplot.subplots(len(panels), 1, figsize=(9, 0.9 + 2.8 * len(panels)), squeeze=False)
        for axis, panel in zip(axes[:, 0], panels, strict=True):
            _draw(axis, [row for row in rows if (row["model"], row["dtype"]) == panel])
            axis.set_title(f"{_MODELS.get(panel[0], panel[0])}, {panel[1]}", loc="left")
        handles, labels = axes[0, 0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper center", ncols=len(labels), frameon=False)
        figure.text(0.01, 0.008, _caption(results), fontsize=7, color="0.45")
        figure.tight_layout(rect=(0, 0.03, 1, 1 - 0.32 / figure.get_figheight()))
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _relative(row: Row) -> dict[str, float]:
    return {result["provider"]: result["relative"] for result in row["results"] if result["relative"] is not None}


def _draw(axis: Any, rows: list[Row]) -> None:
    width = 0.9 / len(_COLORS)
    highest = max(speed for row in rows for speed in _relative(row).values())
    for index, (provider, color) in enumerate(_COLORS.items()):
        points = [(place, _relative(row)[provider]) for place, row in enumerate(rows) if provider in _relative(row)]
        if not points:
            continue
        places = [place + (index - (len(_COLORS) - 1) / 2) * width for place, _ in points]
        speeds = [speed for _, speed in points]
        bars = axis.bar(places, speeds, 0.92 * width, color=color, label=provider)
        weight = "bold" if provider == _OWN else "normal"
        axis.bar_label(bars, fmt="%.2f", fontsize=7, padding=2, fontweight=weight, bbox=_BEHIND_LABELS)
    axis.axhline(1, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axis.set_xticks(range(len(rows)), [_work(row) for row in rows])
    axis.set_ylim(0, 1.15 * highest)
    axis.set_ylabel(f"speed ({_SDPA} = 1)")
    axis.tick_params(axis="x", length=0)


def _work(row: Row) -> str:
    if row["workload"] == _SQUAD:
        return f"{row['windows']} SQuAD windows,\neach at its own length"
    size, length = row["workload"].split("x")
    return f"{size} x {length} tokens"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the table of bench_cpu.py's results, and draw them.")
    parser.add_argument("results", type=Path, help="JSON that bench_cpu.py wrote")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    options = parser.parse_args()
    try:
        results = json.loads(options.results.read_text("utf-8"))
        print(table(results | {"aims": aims(results)}))
        if options.plot:
            plot(results, options.plot)
    except (OSError, ValueError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
