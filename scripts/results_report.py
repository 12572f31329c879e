"""The rows of results.py as tables and as a picture."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtbert.pictures import picture

Row = dict[str, Any]

_SCHEDULE = ("scorer", "kind", "keeps")
# What each kind of policy says of the layers.
_KEEPS = ("length_config", "thresholds", "parts")
# Of each kind of row what is shown, beside the model.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "measure": ("questions", "dtype", "budget", *_SCHEDULE, "f1", "exact_match", "executed", "published", "padded"),
    "searched": ("questions", "count", "budget", "f1", "executed"),
    "constant": ("questions", "count", "budget", "f1", "executed"),
    "scorers": ("questions", "count", "budget", "scorer", "keep_question", "f1", "executed"),
    "no-answer": (
        "questions",
        "count",
        "budget",
        "auroc",
        "f1_of_answerable",
        "f1_best",
        "threshold_best",
        "f1_at_0",
        "f1_own",
        "threshold_own",
        "kept_at_best",
        "left_out_at_best",
    ),
    "time": ("threads", "dtype", "budget", "executed", "time", "time_per_macs_saved", "questions_per_second"),
}
_NAMES = {"squad": "SQuAD 1.1, development", "reddit": "Reddit", "amazon": "Amazon reviews"}
_COLORS = ("#0072B2", "#E69F00", "#009E73")
_STYLE = {"axes.grid": True, "grid.color": "0.92", "axes.axisbelow": True}


def tables(rows: Sequence[Row]) -> str:
    """A table in Markdown for each kind of row."""
    lines = []
    for what, columns in _COLUMNS.items():
        picked = [row for row in rows if row["what"] == what]
        if picked:
            lines += [f"\n{what}", f"| model | {' | '.join(columns)} |", f"|---|{'---|' * len(columns)}"]
        for row in picked:
            schedule = row["schedule"] or {}
            keeps = next((schedule[name] for name in _KEEPS if name in schedule), None)
            values = {**schedule, "keeps": keeps, **row}
            cells = (row["model_sha256"][:8], *(values.get(column) for column in columns))
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def draw(rows: Sequence[Row], path: Path) -> None:
    """F1 against executed MACs at the budgets, a line per question file, in the dtype that was measured first.

    Raises:
        ValueError: the rows are of several models.
    """
    rows = [row for row in rows if row["what"] == "measure" and row["budget"] is not None]
    rows = [row for row in rows if row["dtype"] == rows[0]["dtype"]]
    if len(models := {row["model_sha256"][:8] for row in rows}) > 1:
        raise ValueError(f"there are rows of several models ({', '.join(sorted(models))}): draw one model's file")
    with picture(path, 6.4, 4.2, 160, _STYLE) as figure:
        axes = figure.subplots()
        for color, (name, label) in zip(_COLORS, _NAMES.items(), strict=True):
            own = sorted((row for row in rows if row["questions"] == name), key=lambda row: float(row["executed"]))
            if own:
                x, y = [row["executed"] for row in own], [row["f1"] for row in own]
                low, high = zip(*map(interval, own), strict=True)
                axes.fill_between(x, low, high, color=color, alpha=0.13, linewidth=0)
                axes.plot(x, y, "o-", markersize=5, color=color, label=f"{label}: {own[0]['count']:,} questions")
        axes.set_xlabel("executed multiply-accumulates, part of the full model's at each text's own length")
        axes.set_ylabel("F1 (shaded: 95% interval)")
        axes.legend(frameon=False, loc="lower right")


def interval(row: Row) -> tuple[float, float]:
    """The 95% interval of a row's F1; of a row without one, the widest that values from 0 to 100 can have."""
    if "f1_interval" in row:
        low, high = row["f1_interval"]
        return low, high
    half = 1.96 * math.sqrt(row["f1"] * (100 - row["f1"]) / row["count"])
    return max(0.0, row["f1"] - half), min(100.0, row["f1"] + half)
