"""From the results of bench_cpu.py to aims and a table."""

from collections.abc import Iterator
from typing import Any

Results = dict[str, Any]
Row = dict[str, Any]

OWN = "dtbert"
SDPA = "transformers sdpa"
SQUAD = "SQuAD windows"
# An aim against the fastest peer is judged where these were timed.
_RIVALS = {"fp32": ("ONNX Runtime", "OpenVINO"), "bf16": ("OpenVINO",), "int8": ("ONNX Runtime", "OpenVINO")}
# Times of the fastest peer over dtbert's, at least: at equal lengths, and on windows of SQuAD's lengths.
_SPEED_AIMS = {"fp32": (1.0, 1.1), "bf16": (1.1, 1.25), "int8": (1.2, 1.2)}
# Of int8 over dtbert's own: in bfloat16 where both have a matrix unit, else in float32.
_INT8_AIMS = {"bf16": 1.25, "fp32": 2.0}
# Questions a second with tokens and spans: over the fastest peer's, and at budget 0.25 over full length.
_ANSWERS_AIM, _BUDGET_AIM = 1.2, (0.25, 3.0)
# Saved time over executed MACs saved, at least.
_SAVING_AIMS = {
    ("6x768", "fp32", "8x384"): 0.95,
    ("6x384", "fp32", "8x384"): 0.95,
    ("6x768", "bf16", "8x384"): 0.85,
    ("6x384", "bf16", "8x384"): 0.85,
    ("6x768", "int8", "8x384"): 0.8,
    ("6x384", "int8", "8x384"): 0.8,
    ("6x768", "fp32", "1x384"): 0.8,
    ("6x768", "bf16", "1x384"): 0.8,
    ("6x384", "bf16", "1x384"): 0.6,
}
# Time of a layer that scores over that of one that does not, at most.
_SCORING_AIMS = {("received", "fp32"): 1.15, ("received", "bf16"): 1.3}

_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "int8": "int8"}


def aims(results: Results) -> list[Row]:
    """Each aim that the results can judge: ``work``, ``aim``, ``measured`` and whether it is ``met``."""
    return [*_speed_aims(results), *_int8_aims(results), *_saving_aims(results), *_answers_aims(results)]


def _speed_aims(results: Results) -> Iterator[Row]:
    emulated = results["device"]["bf16"] == "emulated"
    for row in results["comparisons"]:
        ms = {result["provider"]: result["ms"] for result in row["results"]}
        own = ms.pop(OWN, None)
        if own is None or not ms.keys() >= set(_RIVALS[row["dtype"]]) or (row["dtype"] == "bf16" and emulated):
            continue
        least = _SPEED_AIMS[row["dtype"]][row["workload"] == SQUAD]
        fastest = min(ms, key=ms.__getitem__)
        aim = f"at least {least} times as fast as the fastest peer ({fastest})"
        yield _judged(_title(row), aim, ms[fastest] / own, least)


def _int8_aims(results: Results) -> Iterator[Row]:
    other = "bf16" if "amx_int8" in results["device"]["flags"] else "fp32"
    own = {
        (row["model"], row["workload"], row["dtype"]): result["ms"]
        for row in results["comparisons"]
        for result in row["results"]
        if result["provider"] == OWN and result["computes_in"] == _DTYPES[row["dtype"]]
    }
    for (model, workload, dtype), ms in own.items():
        if dtype == "int8" and (reference := own.get((model, workload, other))):
            least = _INT8_AIMS[other]
            aim = f"at least {least} times as fast as dtbert in {_DTYPES[other]}"
            yield _judged(f"{model} int8 {workload}", aim, reference / ms, least)


def _answers_aims(results: Results) -> Iterator[Row]:
    for row in results.get("end_to_end", ()):
        own = {one["budget"]: one["questions_per_second"] for one in row["results"] if one["provider"] == OWN}
        peers = {one["provider"]: one["questions_per_second"] for one in row["results"] if one["provider"] != OWN}
        if None not in own:
            continue
        work = f"end to end {row['model']} {row['dtype']}"
        if peers.keys() >= set(_RIVALS[row["dtype"]]):
            fastest = max(peers, key=peers.__getitem__)
            aim = f"at least {_ANSWERS_AIM} times as fast as the fastest peer ({fastest})"
            yield _judged(work, aim, own[None] / peers[fastest], _ANSWERS_AIM)
        budget, least = _BUDGET_AIM
        if budget in own:
            aim = f"budget {budget} at least {least} times as fast as full length"
            yield _judged(work, aim, own[budget] / own[None], least)


def _saving_aims(results: Results) -> Iterator[Row]:
    for row in results["dropping"]:
        if least := _SAVING_AIMS.get((row["model"], row["dtype"], row["workload"])):
            aim = f"at least {least} of the executed MACs saved is time saved"
            yield _judged(f"{_title(row)}, dropping by {row['scorer']}", aim, row["ratio"], least)
    for row in results["scoring"]:
        if most := _SCORING_AIMS.get((row["scorer"], row["dtype"])):
            work = f"{_title(row)}, one layer scored by {row['scorer']}"
            yield _judged(work, f"at most {most} times as long as without scores", row["ratio"], most, largest=True)


def _judged(work: str, aim: str, measured: float, bound: float, largest: bool = False) -> Row:
    met = measured <= bound if largest else measured >= bound
    return {"work": work, "aim": aim, "measured": round(measured, 3), "met": met}


def _title(row: Row) -> str:
    return f"{row['model']} {row['dtype']} {row['workload']}"


def table(results: Results) -> str:
    """The results as text, ratios first."""
    lines = [caption(results)]
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
    for row in results.get("end_to_end", ()):
        lines += ["", f"end to end {row['model']} {row['dtype']}, {row['questions']} questions"]
        lines += [f"  {'a second':>8} {'ms':>10} {'quartiles':>21}  same answers"]
        for result in sorted(row["results"], key=lambda result: float(result["ms"])):
            quartiles = " - ".join(f"{value:.1f}" for value in result["quartiles_ms"])
            budget = "" if result["budget"] is None else f", budget {result['budget']}"
            figures = f"{result['questions_per_second']:8.1f} {result['ms']:10.1f} {quartiles:>21}"
            lines.append(f"  {figures}  {result['same_answers']:12.3f}  {_engine(result)}{budget}")
        lines += [f"  {'-':>8} {_engine(entry)}: {entry['reason']}" for entry in row["not_timed"]]
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


def caption(results: Results) -> str:
    """The machine, the day and the versions."""
    device, versions = results["device"], results["versions"]
    threads = f"{device['threads']} thread{'s' if device['threads'] > 1 else ''}"
    packages = ", ".join(f"{name} {versions[name]}" for name in ("torch", "transformers", "onnxruntime", "openvino"))
    return f"{device['cpu']} ({device['torch_capability']}), {threads}, {results['date'][:10]}, {packages}"
