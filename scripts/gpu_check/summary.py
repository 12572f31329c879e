"""What a run found, in 60 lines: failures first."""

from collections import Counter
from collections.abc import Iterator, Sequence
from textwrap import shorten, wrap

from gpu_bench.report import GRAPHS, OWN, aims, caption, results_of, verdicts

from gpu_check.pool import NO_TIME
from gpu_check.records import Record, of_kind

LINES, WIDTH = 60, 170
# The last lines of a part's output in a failure, and failures that are shown at the least.
_TAIL, _FEWEST_FAILURES = 2, 14


def failed(records: Sequence[Record], broken: int) -> bool:
    return bool(failures(records, broken))


def failures(records: Sequence[Record], broken: int) -> list[str]:
    """Everything that is wrong, a line each; what was left out for want of time is none."""
    return [shorten(line, WIDTH) for line in (*_failures(records), *_broken(broken))]


def _failures(records: Sequence[Record]) -> Iterator[str]:
    records = list(records)
    for record in of_kind(records, "smoke"):
        if record["error"] not in ("", NO_TIME):
            yield f"smoke, {record['ptxas']} ptxas: {record['kernel']}, {record['dtype']}: {record['error']}"
    for kernel, dtype in bits(records)[1]:
        yield f"bits differ between Triton's ptxas and the machine's: {kernel}, {dtype}"
    for record in tests(records).values():
        if record["outcome"] == "failed":
            yield f"test {record['name']}: {record['reason']}"
    wrong = [record for record in of_kind(records, "candidate") if record["error"] not in ("", NO_TIME)]
    for (kernel, dtype, size, variant, error), count in Counter(map(_of_candidate, wrong)).items():
        yield f"{count} configurations of {kernel} {dtype} {size} {variant}: {error}"
    for record in of_kind(records, "skipped"):
        if record["reason"] != NO_TIME:
            yield f"no figures of {record['section']}: {record['reason']}"
    for record in of_kind(records, "row"):
        for entry in record["not_timed"]:
            if entry["provider"] in (OWN, GRAPHS):
                yield f"not timed, {record['section']} {record['work']}: {entry['provider']}: {entry['reason']}"
    for record in of_kind(records, "part"):
        if record["verdict"] != "ok" and not _left_out(record):
            yield f"part {record['part']}: {record['verdict']}: {' | '.join(record['tail'][-_TAIL:])}"


def _broken(lines: int) -> Iterator[str]:
    if lines:
        yield f"{lines} lines of the records are cut off: their processes were killed while they wrote"


def _of_candidate(record: Record) -> tuple[str, ...]:
    fields = (str(record[name]) for name in ("kernel", "dtype", "size", "variant", "error"))
    return tuple(shorten(field, 80) for field in fields)


def _left_out(part: Record) -> bool:
    return bool(part["verdict"].startswith("left out"))


def bits(records: Sequence[Record]) -> tuple[int, list[tuple[str, str]]]:
    """Over kernels and dtypes that both ptxas assembled: how many have the same bits, and which have not."""
    digests: dict[tuple[str, str], dict[str, str]] = {}
    for record in of_kind(list(records), "smoke"):
        if "digest" in record:
            digests.setdefault((record["kernel"], record["dtype"]), {})[record["ptxas"]] = record["digest"]
    both = {key: set(found.values()) for key, found in digests.items() if len(found) == 2}
    return sum(len(found) == 1 for found in both.values()), [key for key, found in both.items() if len(found) == 2]


def tests(records: Sequence[Record]) -> dict[str, Record]:
    """The outcome of each test; of one that was run twice, the worse."""
    found: dict[str, Record] = {}
    for record in of_kind(list(records), "test"):
        before = found.get(record["name"])
        # Its own failure says more than that its worker went away.
        if before is None or before["outcome"] != "failed":
            found[record["name"]] = record
    return found


def counts(records: Sequence[Record]) -> list[str]:
    """How much of everything was done."""
    records = list(records)
    smoke, candidates = (_verdicts(of_kind(records, kind)) for kind in ("smoke", "candidate"))
    same, other = bits(records)
    lengths = [str(record["tokens"]) for record in of_kind(records, "memcheck")]
    outcomes = Counter(record["outcome"] for record in tests(records).values())
    left_out = [record["part"] for record in of_kind(records, "part") if _left_out(record)]
    left_out += [
        f"the rest of {record['section']}" for record in of_kind(records, "skipped") if record["reason"] == NO_TIME
    ]
    parts = [f"{record['part']} {record['seconds']:.0f}" for record in of_kind(records, "part") if record["seconds"]]
    lines = [
        f"smoke: {smoke}; bits equal under both ptxas: {same} of "
        f"{same + len(other)}; memcheck walked {', '.join(lengths) or 'no'} tokens",
        f"configurations: {candidates}; "
        f"tests: {', '.join(f'{count} {name}' for name, count in sorted(outcomes.items())) or 'none'}",
        *wrap(f"seconds: {', '.join(parts) or 'none'}", WIDTH),
    ]
    return lines + ([f"left out for want of time: {', '.join(left_out)}"] if left_out else [])


def _verdicts(checked: Iterator[Record]) -> str:
    """How many checks were right, wrong, and not reached in time."""
    found = Counter({"": "right", NO_TIME: "not reached"}.get(record["error"], "wrong") for record in checked)
    return ", ".join(f"{found[name]} {name}" for name in ("right", "wrong", "not reached"))


def tuned(records: Sequence[Record]) -> list[str]:
    """Each kernel's fastest configuration, and the default's time over its own."""
    lines = []
    for record in of_kind(list(records), "tuned"):
        name = f"{record['kernel']} {record['dtype']} {record['size']} {record['variant']}".rstrip()
        default = record["default_us"]
        gain = "" if default is None else f", default / this {default / record['median_us']:.2f}"
        config = ",".join(str(value) for value in record["config"].values())
        lines.append(f"tuned {name}: {config} {record['median_us']:.1f} us of {record['tried']} tried{gain}")
    return lines


def summary(records: Sequence[Record], broken: int, seconds: float) -> list[str]:
    """At most `LINES` lines of at most `WIDTH` characters; where there are too many, the least telling go."""
    results = results_of(list(records))
    wrong = failures(records, broken)
    head = [f"{len(wrong)} FAILURES" if wrong else "no failures"]
    tail = [
        *wrap(caption(results), WIDTH),
        *counts(records),
        f"{seconds:.0f} s in all; log.txt and results.jsonl have everything",
    ]
    found = aims(results)
    order = {False: 0, True: 1, None: 2}
    judged = verdicts(sorted(found, key=lambda aim: order[aim.met]))
    room = LINES - len(head) - len(tail)
    kept_wrong = _most(wrong, max(_FEWEST_FAILURES, room - len(judged)))
    kept_aims = _most(judged, room - len(kept_wrong))
    kept_tuned = _most(tuned(records), room - len(kept_wrong) - len(kept_aims))
    return [shorten_line(line) for line in (*head, *kept_wrong, *kept_aims, *kept_tuned, *tail)]


def _most(lines: list[str], room: int) -> list[str]:
    if len(lines) <= room:
        return lines
    return [*lines[: room - 1], f"... and {len(lines) - room + 1} more"] if room > 0 else []


def shorten_line(line: str) -> str:
    """Cut at the width; unlike `textwrap.shorten` it leaves columns as they are."""
    return line if len(line) <= WIDTH else line[: WIDTH - 4] + " ..."
