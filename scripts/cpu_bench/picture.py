"""The picture of bench_cpu.py's results: speed beside the peers, and what dropping leaves of the time."""

from pathlib import Path
from typing import Any

from cpu_bench.report import OWN, SDPA, SQUAD, Results, Row, caption
from dtbert.pictures import picture

_MODELS = {"6x768": "6 layers of 768, random weights", "6x384": "6 layers of 384, the shipped model"}
_COLORS = {
    "transformers eager": "#c9ced6",
    SDPA: "#a4acb8",
    "torch.compile": "#7f8998",
    "torch dynamic": "#7f8998",
    "ONNX Runtime": "#8fb0d3",
    "OpenVINO": "#5a86b8",
    OWN: "#e2571e",
}
# Hides the line at 1 behind a figure.
_BEHIND_LABELS = {"facecolor": "white", "edgecolor": "none", "pad": 0.3}
_STYLE = {"font.size": 9, "axes.titlesize": 10}
_SPREAD: dict[str, Any] = {"elinewidth": 0.8, "ecolor": "0.25"}


def plot(results: Results, path: Path) -> None:
    """Draw a line of panels for each model and dtype: its speed, as times of transformers sdpa, and what it drops.

    Raises:
        ValueError: the results have nothing to draw.
    """
    # Where bfloat16 is emulated its bars would compare float32 with an emulation.
    dtypes = ("fp32", "int8") if results["device"]["bf16"] == "emulated" else ("fp32", "bf16", "int8")
    speeds = [row for row in results["comparisons"] if row["dtype"] in dtypes and len(_speeds(row)) > 1]
    drops = [row for row in results["dropping"] if row["dtype"] in dtypes]
    lines = list(dict.fromkeys((row["model"], row["dtype"]) for row in (*speeds, *drops)))
    if not lines:
        raise ValueError(f"nothing to draw: no workload of the results has both a figure of {SDPA} and another")
    path.parent.mkdir(parents=True, exist_ok=True)
    columns = [
        (rows, draw, wide) for rows, draw, wide in ((speeds, _draw_speeds, 3.2), (drops, _draw_drops, 1)) if rows
    ]
    with picture(path, 2 + sum(2.2 * wide for *_, wide in columns), 0.8 + 2.5 * len(lines), 160, _STYLE) as figure:
        ratios = [wide for *_, wide in columns]
        axes = figure.subplots(len(lines), len(columns), squeeze=False, width_ratios=ratios)
        for line, of_line in zip(lines, axes, strict=True):
            for (rows, draw, _), axis in zip(columns, of_line, strict=True):
                if own := [row for row in rows if (row["model"], row["dtype"]) == line]:
                    draw(axis, own)
                else:
                    axis.set_visible(False)
            of_line[0].set_title(f"{_MODELS.get(line[0], line[0])}, {line[1]}", loc="left")
        if speeds:
            shown = {provider for row in speeds for provider in _speeds(row)}
            handles = {name: _patch(color) for name, color in _COLORS.items() if name in shown}
            figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=len(handles), frameon=False)
        below = f"Thin lines: quartiles. {caption(results)}"
        figure.supxlabel(below, fontsize=7, color="0.45", x=0.01, ha="left")


def _patch(color: str) -> Any:
    from matplotlib.patches import Patch

    return Patch(color=color)


def _speeds(row: Row) -> dict[str, tuple[float, float, float]]:
    """Of each provider its speed and its lower and upper quartile; none where transformers sdpa, the 1, is missing."""
    found = {}
    for result in row["results"]:
        if (speed := result["relative"]) is not None:
            low, high = (speed * result["ms"] / ms for ms in reversed(result["quartiles_ms"]))
            found[result["provider"]] = speed, low, high
    return found


def _draw_speeds(axis: Any, rows: list[Row]) -> None:
    width = 0.9 / max(len(_speeds(row)) for row in rows)
    for place, row in enumerate(rows):
        speeds = _speeds(row)
        # Side by side around the middle, however many there are.
        present = [provider for provider in _COLORS if provider in speeds]
        for index, provider in enumerate(present):
            where = place + (index - (len(present) - 1) / 2) * width
            speed, low, high = speeds[provider]
            spread = [[speed - low], [high - speed]]
            bar = axis.bar(where, speed, 0.92 * width, color=_COLORS[provider], yerr=spread, error_kw=_SPREAD)
            weight = "bold" if provider == OWN else "normal"
            axis.bar_label(bar, fmt="%.2f", fontsize=7, padding=2, fontweight=weight, bbox=_BEHIND_LABELS)
    axis.axhline(1, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    axis.set_xticks(range(len(rows)), [_work(row) for row in rows])
    axis.set_ylim(0, 1.12 * max(high for row in rows for *_, high in _speeds(row).values()))
    axis.set_ylabel(f"speed ({SDPA} = 1)")
    axis.tick_params(axis="x", length=0)


def _draw_drops(axis: Any, rows: list[Row]) -> None:
    """Bars of the time that is left, and lines at the multiply-accumulates that are."""
    for place, row in enumerate(rows):
        time, (low, high) = 1 - row["time_saved"], (ms / row["ms_without"] for ms in row["quartiles_ms"])
        spread = [[max(0, time - low)], [max(0, high - time)]]
        bar = axis.bar(place, time, 0.8, color=_COLORS[OWN], yerr=spread, error_kw=_SPREAD)
        axis.bar_label(bar, fmt="%.2f", fontsize=7, padding=2, bbox=_BEHIND_LABELS)
        axis.hlines(1 - row["macs_saved"], place - 0.45, place + 0.45, color="black", linewidth=1.4)
    axis.axhline(1, color="0.6", linewidth=0.8, linestyle=(0, (4, 3)), zorder=0)
    labels = [f"{row['scorer']}\n{row['workload'].replace('x', ' x ')}" for row in rows]
    axis.set_xticks(range(len(rows)), labels, fontsize=7)
    axis.set_ylim(0, 1.12 * max(1, *(row["quartiles_ms"][1] / row["ms_without"] for row in rows)))
    axis.set_title("half dropped: time (bar), MACs (line)", loc="left", fontsize=8)
    axis.set_ylabel("of nothing dropped")
    axis.tick_params(axis="x", length=0)


def _work(row: Row) -> str:
    if row["workload"] == SQUAD:
        return f"{row['windows']} SQuAD windows,\neach at its own length"
    size, length = row["workload"].split("x")
    return f"{size} x {length} tokens"
