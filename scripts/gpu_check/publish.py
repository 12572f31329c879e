"""From the folders of runs to what is committed: the table of tuned configurations, docs/bench_gpu.json, the picture.

    python scripts/gpu_check/publish.py FOLDER...

Several runs are of one device and commit: each may have taken some of the stages. What no run measured goes from docs/.
Prints the rows of a table for the README.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from gpu_bench.report import COMPILED, GRAPHS, OWN, SDPA, Results, Row, aims, results_of  # noqa: E402

from dtbert.kernels.triton.configs import read_table  # noqa: E402
from dtbert.pictures import picture  # noqa: E402
from gpu_check import records  # noqa: E402
from gpu_check.plan import RECORDS  # noqa: E402
from gpu_check.records import Record  # noqa: E402
from gpu_check.summary import bits, failures, tests, tuned  # noqa: E402

_OWN_COLOR, _PEER_COLOR = "#2f6fb0", "0.72"


def publish(folders: Sequence[Path], docs: Path, tables: Path) -> str:
    """Write all of it; returns the rows for the README.

    Raises:
        ValueError: a folder is of no run, the runs are not of one device and commit, or a table is damaged.
        OSError: a file cannot be read or written.
    """
    found, broken = read_runs(folders)
    results = results_of(found)
    results["failures"] = failures(found, broken)
    passed = {
        "smoke": sum(not record["error"] for record in records.of_kind(found, "smoke")),
        "same_bits_under_both_ptxas": bits(found)[0],
        "configurations": sum(not record["error"] for record in records.of_kind(found, "candidate")),
        "tests": sum(record["outcome"] == "passed" for record in tests(found).values()),
    }
    # What did not run is not among them.
    results["passed"] = {name: count for name, count in passed.items() if count}
    results["tuned"] = tuned(found)
    results["aims"] = [aim._asdict() | {"met": aim.met} for aim in aims(results)]
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "bench_gpu.json").write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    draw(results, docs / "bench_gpu.png")
    for table in (table for folder in folders for table in sorted(folder.glob("sm_*.json"))):
        read_table(table)
        tables.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(table, tables / table.name)
    return readme_rows(results)


def read_runs(folders: Sequence[Path]) -> tuple[list[Record], int]:
    """The records of several runs, of a section that some repeat those of the last; and how many lines are none.

    Raises:
        ValueError: a folder is of no run, or the runs are not of one device and commit.
    """
    found: list[Record] = []
    broken = 0
    for folder in folders:
        run, cut = records.read(folder / RECORDS)
        if not run:
            raise ValueError(f"{folder / RECORDS}: no records: is it a folder that gpu_check.sh wrote?")
        sections = {record["section"] for record in run if "section" in record}
        found = [record for record in found if record.get("section") not in sections] + run
        broken += cut
    named = {f"{record['device']['name']}, commit {record['commit']}" for record in records.of_kind(found, "record")}
    if not named:
        raise ValueError(f"no record of a device in {', '.join(map(str, folders))}: run the stage `record` too")
    if len(named) > 1:
        raise ValueError(f"runs of one device and commit belong together, not of {' and '.join(sorted(named))}")
    return found, broken


def readme_rows(results: Results) -> str:
    """A markdown table of whole models: dtbert beside each peer that was timed, in the times of one run."""
    title = f"{results['device']['name']}, bfloat16, 6 x 768, nothing dropped"
    lines = [[title, "dtbert", SDPA, "torch.compile", "times as fast as sdpa"]]
    rows = {row["section"]: row for row in results["rows"]}
    for section in ("model", "latency"):
        if section in rows:
            row, compiled = rows[section], rows.get(f"compiled{_suffix(section)}", {})
            times = _best(row), _ms(row, SDPA), _ms(compiled, COMPILED)
            ratio = f"{times[1] / times[0]:.1f}" if times[0] and times[1] else "-"
            lines.append([f"{row['work']} tokens", *map(_in_ms, times), ratio])
    if "squad" in rows:
        row, compiled = rows["squad"], rows.get("compiled_squad", {})
        rates = _rate(row, own=True), _rate(row, own=False), _rate(compiled, own=False)
        ratio = f"{rates[0] / rates[1]:.1f}" if rates[0] and rates[1] else "-"
        lines.append([row["work"], *map(_a_second, rates), ratio])
    # A column without a figure goes.
    columns = [column for column in zip(*lines, strict=True) if any(text != "-" for text in column[1:])]
    head, *below = (f"| {' | '.join(line)} |" for line in zip(*columns, strict=True))
    return "\n".join([head, "|---" * len(columns) + "|", *below])


def draw(results: Results, path: Path) -> None:
    """Bars of what each takes, a panel a work; and the time that dropping saves against the work that it saves."""
    rows = {row["section"]: row for row in results["rows"]}
    panels: list[tuple[str, str, dict[str, float]]] = []
    for section, title in (("model", "a batch"), ("latency", "one sequence")):
        if section in rows:
            times = {entry["provider"]: entry["ms"] for entry in rows[section]["results"]}
            times |= {COMPILED: ms} if (ms := _ms(rows.get(f"compiled{_suffix(section)}", {}), COMPILED)) else {}
            panels.append((f"{title}: {rows[section]['work']} tokens", "ms", times))
    if "squad" in rows:
        best: dict[str, float] = {}
        for entry in (*rows["squad"]["results"], *rows.get("compiled_squad", {}).get("results", [])):
            best[entry["engine"]] = max(best.get(entry["engine"], 0), entry["windows_per_second"])
        panels.append((rows["squad"]["work"], "windows a second", best))
    for row in results["rows"]:
        if row["section"] in ("attention", "scores"):
            times = {entry["provider"]: 1e3 * entry["ms"] for entry in row["results"]}
            panels.append((f"{row['section']}, {row['work']}", "us", times))
        if row["section"] == "schedule":
            left = {entry["provider"]: entry["ms"] for entry in row["results"]}
            panels.append((f"tokens dropped, {row['work']}", "ms", left))
    if not panels:
        return
    columns = 3
    lines = -(-len(panels) // columns)
    with picture(path, 4.2 * columns, 0.5 + 2.4 * lines, 150, {"font.size": 8}) as figure:
        axes = figure.subplots(lines, columns, squeeze=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
        for axis, (title, unit, values) in zip(axes.flat, panels, strict=False):
            _bars(axis, title, unit, values)
        below = f"{results['device']['name']}, {results['date'][:10]}"
        figure.supxlabel(below, fontsize=7, color="0.45", x=0.01, ha="left")


def _bars(axis: Any, title: str, unit: str, values: dict[str, float]) -> None:
    names = sorted(values, key=lambda name: values[name], reverse=unit == "ms" or unit == "us")
    colors = [_OWN_COLOR if _ours(name) else _PEER_COLOR for name in names]
    bars = axis.barh(range(len(names)), [values[name] for name in names], color=colors)
    labels = [f"{values[name]:,.0f}" if values[name] >= 100 else f"{values[name]:.3g}" for name in names]
    axis.bar_label(bars, labels, padding=2, fontsize=7)
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.locator_params(axis="x", nbins=5)
    axis.set_xlim(0, 1.18 * max(values.values()))
    axis.set_title(f"{title} ({unit})", loc="left", fontsize=8, fontweight="bold")


def _ours(provider: str) -> bool:
    peers = ("transformers", "torch.compile", "sdpa", "varlen", "probabilities in memory")
    return not provider.startswith(peers)


def _suffix(section: str) -> str:
    return "" if section == "model" else f"_{section}"


def _ms(row: Row, provider: str) -> float | None:
    return next((entry["ms"] for entry in row.get("results", []) if entry["provider"] == provider), None)


def _best(row: Row) -> float | None:
    return min((ms for name in (OWN, GRAPHS) if (ms := _ms(row, name)) is not None), default=None)


def _rate(row: Row, *, own: bool) -> float | None:
    found = [entry for entry in row.get("results", []) if (entry["engine"] == OWN) == own]
    return max((entry["windows_per_second"] for entry in found), default=None)


def _in_ms(ms: float | None) -> str:
    return "-" if ms is None else f"{ms:.3g} ms"


def _a_second(rate: float | None) -> str:
    return "-" if rate is None else f"{rate:,.0f}/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="what gpu_check.sh wrote into")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where figures and picture go (%(default)s)")
    tables = ROOT / "dtbert" / "kernels" / "triton" / "tuned"
    parser.add_argument("--tables", type=Path, default=tables, help="where tuned tables go (%(default)s)")
    options = parser.parse_args()
    try:
        print(publish(options.folders, options.docs, options.tables))
    except (OSError, ValueError) as error:
        sys.exit(f"publish: {error}")


if __name__ == "__main__":
    main()
