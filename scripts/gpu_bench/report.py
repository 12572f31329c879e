"""From the records of bench_gpu.py to aims and tables.

python scripts/gpu_bench/report.py docs/bench_gpu.json
"""

import argparse
import json
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

Results = dict[str, Any]
Row = dict[str, Any]

OWN, GRAPHS, FLOAT8 = "dtbert", "dtbert, graphs", "dtbert, fp8"
SDPA, COMPILED = "transformers sdpa", "torch.compile max-autotune"
MATERIALISED = "probabilities in memory"
# Of a reason in the table; the JSON has all of it.
_WIDTH = 100


class Aim(NamedTuple):
    """What was wanted of which work; ``measured`` is None where there is no figure."""

    work: str
    aim: str
    measured: float | None
    bound: float
    at_most: bool = False

    @property
    def met(self) -> bool | None:
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: "no figure"}[self.met]


def results_of(records: Sequence[Row], sections: Collection[str] = ()) -> Results:
    """Device, versions, ceilings, rows and what was skipped; of these sections, or of all."""
    results: Results = {"rows": [], "skipped": []}
    for record in records:
        fields = {name: value for name, value in record.items() if name != "kind"}
        if record["kind"] == "record":
            results |= fields
        elif record["kind"] in ("row", "skipped") and (not sections or record["section"] in sections):
            results["rows" if record["kind"] == "row" else "skipped"].append(fields)
    if sections:
        results["sections"] = list(sections)
    return results


def aims(results: Results) -> list[Aim]:
    """Every aim, whether or not there is a figure for it; of ``sections`` alone where the results name some."""
    sections: dict[str, list[Row]] = {}
    for row in results.get("rows", []):
        sections.setdefault(row["section"], []).append(row)
    chosen = results.get("sections") or _JUDGES
    return [aim for name, judge in _JUDGES.items() if name in chosen for aim in judge(sections, results)]


Sections = dict[str, list[Row]]


def _attention(sections: Sections, results: Results) -> Iterator[Aim]:
    for row in sections.get("attention", [{"work": "any"}]):
        yield Aim(f"attention, {row['work']}", "fastest peer's time / dtbert's >= 1", _lead(row), 1)


def _scores(sections: Sections, results: Results) -> Iterator[Aim]:
    for row in sections.get("scores", [{"work": "any"}]):
        for score, bound in (("received", 1.25), ("cls", 1.03)):
            ratio = _ratio(_ms(row, score), _ms(row, "no score"))
            yield Aim(f"score {score}, {row['work']}", f"time / without <= {bound}", ratio, bound, at_most=True)
        if _result(row, MATERIALISED) or "results" not in row:
            ratio = _ratio(_ms(row, MATERIALISED), _ms(row, "received"))
            yield Aim(f"matrix in memory, {row['work']}", "its time / received's >= 5", ratio, 5)
            ratio = _ratio(*(_result(row, name).get("peak_bytes") for name in ("received", MATERIALISED)))
            yield Aim(f"matrix in memory, {row['work']}", "received's peak / its peak <= 0.1", ratio, 0.1, at_most=True)


def _model(sections: Sections, results: Results) -> Iterator[Aim]:
    for row in sections.get("model", [{"work": "any"}]):
        work = f"model, {row['work']}"
        fastest = min((ms for name in (OWN, GRAPHS) if (ms := _ms(row, name)) is not None), default=None)
        yield Aim(work, "ms <= 2.4", fastest, 2.4, at_most=True)
        yield Aim(work, f"{SDPA} / dtbert >= 2", _ratio(_ms(row, SDPA), fastest), 2)
        ceiling = results.get("ceilings", {}).get("flops_per_second")
        share = _ratio(row.get("flops"), _product(fastest, ceiling, 1e-3))
        yield Aim(work, "share of the measured product rate >= 0.55", share, 0.55)


def _compiled(sections: Sections, results: Results) -> Iterator[Aim]:
    for row in sections.get("compiled", [{"work": "any"}]):
        fastest = min((ms for name in (OWN, GRAPHS) if (ms := _ms(row, name)) is not None), default=None)
        yield Aim(f"model, {row['work']}", f"{COMPILED} / dtbert >= 1.3", _ratio(_ms(row, COMPILED), fastest), 1.3)


def _squad(sections: Sections, results: Results) -> Iterator[Aim]:
    for row in sections.get("squad", [{"work": "any"}]):
        rate, fastest = _rates_of(row)
        yield Aim(f"model, {row['work']}", "windows a second >= 28,000", rate, 28_000)
        yield Aim(f"model, {row['work']}", "dtbert's rate / fastest peer's, padded >= 3", _ratio(rate, fastest), 3)


def _compiled_squad(sections: Sections, results: Results) -> Iterator[Aim]:
    for row in sections.get("compiled_squad", [{"work": "any"}]):
        ratio = _ratio(*_rates_of(row))
        yield Aim(f"model, {row['work']}", "dtbert's rate / torch.compile's, padded >= 3", ratio, 3)


def _rates_of(row: Row) -> tuple[float | None, float | None]:
    """Windows a second at the best: dtbert's, and its peers'."""
    own = [result for result in row.get("results", []) if result.get("engine") == OWN]
    others = [result for result in row.get("results", []) if result.get("engine") != OWN]
    best = [max((result["windows_per_second"] for result in found), default=None) for found in (own, others)]
    return best[0], best[1]


def _schedule(sections: Sections, results: Results) -> Iterator[Aim]:
    for row in sections.get("schedule", [{"work": "any"}]):
        dropping = [result for result in row.get("results", []) if "macs_saved" in result]
        for result in dropping or [{"provider": "any schedule"}]:
            left = _ratio(result.get("ms"), _ms(row, "all tokens"))
            saved = None if left is None else _ratio(1 - left, result["macs_saved"])
            work = f"{result['provider']}, {row['work']}"
            yield Aim(work, "time saved / executed MACs saved >= 0.85", saved, 0.85)


def _latency(sections: Sections, results: Results) -> Iterator[Aim]:
    for row in sections.get("latency", [{"work": "any"}]):
        work, ms = f"model with graphs, {row['work']}", _ms(row, GRAPHS)
        yield Aim(work, "ms <= 0.3", ms, 0.3, at_most=True)
        yield Aim(work, f"{SDPA} / dtbert >= 5", _ratio(_ms(row, SDPA), ms), 5)


def _float8(sections: Sections, results: Results) -> Iterator[Aim]:
    for row in sections.get("float8", [{"work": "any"}]):
        ratio = _ratio(_ms(row, GRAPHS), _ms(row, FLOAT8))
        yield Aim(f"model in fp8, {row['work']}", "bfloat16's time / fp8's >= 1.2", ratio, 1.2)


# In the order in which the aims are shown.
_JUDGES: dict[str, Callable[[Sections, Results], Iterator[Aim]]] = {
    "model": _model,
    "compiled": _compiled,
    "latency": _latency,
    "squad": _squad,
    "compiled_squad": _compiled_squad,
    "attention": _attention,
    "scores": _scores,
    "schedule": _schedule,
    "float8": _float8,
}


def _result(row: Row, provider: str) -> Row:
    return next((result for result in row.get("results", []) if result["provider"] == provider), {})


def _ms(row: Row, provider: str) -> float | None:
    return _result(row, provider).get("ms")


def _lead(row: Row) -> float | None:
    others = [result["ms"] for result in row.get("results", []) if result["provider"] != OWN]
    return _ratio(min(others, default=None), _ms(row, OWN))


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above is not None and below else None


def _product(*factors: float | None) -> float | None:
    product = 1.0
    for factor in factors:
        if factor is None:
            return None
        product *= factor
    return product


def details(results: Results) -> str:
    """Every row with its contenders, fastest first."""
    lines = []
    for row in results.get("rows", []):
        kind = "".join(f", {row[name]}" for name in ("scorer", "kept") if name in row)
        lines += ["", f"{row['section']}: {row['work']}{kind}"]
        for result in sorted(row["results"], key=lambda result: float(result["ms"])):
            lines.append(f"  {result['ms']:10.4f} ms  {result['provider']}{_rates(row, result)}")
        lines += [
            f"  {'-':>10}     {entry['provider']}: {shorten(entry['reason'], _WIDTH)}" for entry in row["not_timed"]
        ]
    return "\n".join(lines)


def _rates(row: Row, result: Row) -> str:
    seconds, found = result["ms"] / 1e3, []
    if "flops" in row:
        found.append(f"{row['flops'] / seconds / 1e12:.1f} TFLOP/s")
    if "bytes" in row:
        found.append(f"{row['bytes'] / seconds / 1e9:.0f} GB/s")
    if "windows_per_second" in result:
        found.append(f"{result['windows_per_second']:,} windows/s")
    if "macs_saved" in result:
        found.append(f"{result['macs_saved']:.3f} of the MACs saved")
    if result.get("peak_bytes"):
        found.append(f"{result['peak_bytes'] / 2**20:.1f} MiB at the most")
    if result.get("relative_error") is not None:
        found.append(f"error {result['relative_error']:.1e}")
    if result["launch"] != "called":
        found.append(result["launch"])
    return f"  ({', '.join(found)})" if found else ""


def verdicts(found: Sequence[Aim]) -> list[str]:
    """The aims, one a line, under what they belong to."""
    lines = []
    for aim in found:
        value = "-" if aim.measured is None else f"{aim.measured:,.0f}" if aim.measured > 999 else f"{aim.measured:.3f}"
        lines.append(f"{aim.verdict:9} {value:>8}  {aim.work}: {aim.aim}")
    return lines


def table(results: Results) -> str:
    """What the figures belong to, the aims, and what was not run."""
    skipped = (f"not run: {entry['section']}: {entry['reason']}" for entry in results.get("skipped", []))
    return "\n".join([caption(results), "", *verdicts(aims(results)), *skipped])


def caption(results: Results) -> str:
    """One line: device, versions, date, commit and ceilings, as far as they were recorded."""
    if "device" not in results:
        return "no record of the device"
    device, versions = results["device"], results["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "triton", "transformers"))
    driver = f", driver {device['driver']}" if device.get("driver") else ""
    line = f"{device['name']}{driver}, {packages}, {results['date'][:10]}, commit {results['commit'][:12]}"
    if "ceilings" not in results:
        return line
    rates = results["ceilings"]
    product, copy = rates["flops_per_second"] / 1e12, rates["bytes_per_second"] / 1e12
    return f"{line}; a {rates['dtype']} product reaches {product:.3g} TFLOP/s, a copy {copy:.3g} TB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description="Print the aims and figures of a docs/bench_gpu.json.")
    parser.add_argument("results", type=Path, help="JSON that gpu_check's `publish` wrote")
    parser.add_argument("--details", action="store_true", help="every figure, before the aims")
    options = parser.parse_args()
    try:
        results = json.loads(options.results.read_text("utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"{options.results}: {error}")
    if options.details:
        print(details(results), end="\n\n")
    print(table(results))


if __name__ == "__main__":
    main()
