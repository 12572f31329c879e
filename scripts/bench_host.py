"""What the host costs where there is next to no arithmetic: Python, and the dispatch of small operations.

    python scripts/bench_host.py --output docs/bench_host.json

First a forward of 6 layers of 48 (12 heads, feed-forward of 192) over 16 tokens, in float32 on one thread, called as
``model(input_ids, attention_mask, token_type_ids)``, against transformers with sdpa and the same weights: all tokens
kept, and dropped by three scorers. A ratio is dtbert's time over that of transformers in the same round; times are the
thread's own on the processor, so that what else runs on the machine counts little.

Then the Python of a forward on a GPU: `forward_packed` of 32 x 384 tokens, 6 layers of 768 in bfloat16, backend
``triton``, with tensors that have a shape and no contents. The figure holds everything that dtbert does in Python: the
model, the books of dropping, the launchers with the arguments of their kernels, and of torch the modules' calls and
attributes, views, and the offsets made on the host. It does not hold what stands between Python and a GPU: a kernel's
launch by Triton (the binding of its arguments, and the driver), and torch's allocations, products, GELU and
``index_select``, which hand out tensors made before. A program on a GPU pays these too.

The JSON holds ``date``, ``commit``, ``device``, ``versions``, ``arguments``, ``rows``, and ``skipped`` with reasons. A
row: ``name``, ``ratio`` or ``microseconds`` (the median over the rounds), ``aim`` (at most), ``met``, ``spread`` (the
quartiles over the rounds) and ``rounds``; with a ratio also both times, ``own_us`` and ``peer_us``; without one, how
many calls were ``replaced``.
"""

import argparse
import datetime
import functools
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from bench.checkpoints import random_checkpoint, reason
from bench.provenance import commit, cpu_name, version
from host_bench.stand_ins import as_on_a_gpu, model_without_weights, recorded, replaying
from host_bench.timing import Contender, measure
from torch import Tensor

from dtbert.model import LengthSchedule, PackedBatch
from dtbert.weights import load_model

Row = dict[str, Any]

SMALL = {"num_hidden_layers": 6, "hidden_size": 48, "num_attention_heads": 12, "intermediate_size": 192}
RATIOS = (0.9, 0.8, 0.7, 0.5, 0.3, 0.2)
PEER, OWN = "transformers sdpa", "6 x 48, 16 tokens"
# At most these, of the peer's time.
AIM = 0.6
AIMS_WITH_DROPPING = {"received": 1.0, "answer": 1.1, "answer_overlap": 1.3}

SEQUENCES, TOKENS, QUESTION = 32, 384, 14
LENGTHS = (269, 253, 252, 202, 104, 34)
AIM_US = 250.0


def main(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    results = describe(options)
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        results["rows"] = [*on_a_cpu(Path(folder), options.rounds)]
        try:
            results["rows"] += python_of_a_gpu(options.rounds)
        except (ImportError, RuntimeError) as error:
            results["skipped"].append({"name": "Python of a forward on a GPU", "reason": reason(error)})
    save(results, options.output)
    print(table(results))
    if results["skipped"]:
        sys.exit("some figures are missing: the reasons are above")


def on_a_cpu(folder: Path, rounds: int) -> Iterator[Row]:
    """Forwards with next to no arithmetic, as ratios to transformers'."""
    checkpoint = random_checkpoint(folder, **SMALL)
    peer, model = checkpoint.transformers("sdpa"), load_model(folder)
    inputs = few_tokens(model.config.vocab_size)
    theirs, own = peer(*inputs), model(*inputs)
    torch.testing.assert_close(own.start_logits, theirs.start_logits, rtol=1e-4, atol=1e-4)
    calls = {PEER: functools.partial(peer, *inputs), OWN: functools.partial(model, *inputs)}
    aims = {OWN: AIM}
    for scorer, aim in AIMS_WITH_DROPPING.items():
        schedule = LengthSchedule.ratios(RATIOS, scorer=scorer, keep_question=scorer == "answer_overlap")
        aims[name := f"{OWN}, dropping by {scorer}"] = aim
        calls[name] = functools.partial(model, *inputs, schedule)
    seconds = measure([Contender(name, call) for name, call in calls.items()], rounds, OWN)
    for name, aim in aims.items():
        ratios = [mine / other for mine, other in zip(seconds[name], seconds[PEER], strict=True)]
        times = {"own_us": seconds[name], "peer_us": seconds[PEER]}
        yield judged(name, "ratio", ratios, aim) | {key: microseconds(values) for key, values in times.items()}


def few_tokens(vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and segments ``[1, 16]``: a question of 4 words, and a text that speaks of two of them."""
    words = torch.randint(1000, vocab_size, (14,), generator=torch.Generator().manual_seed(0)).tolist()
    ids = [101, *words[:4], 102, *words[4:8], words[1], words[8], words[2], *words[9:11], 102]
    return torch.tensor([ids]), torch.ones(1, 16, dtype=torch.int64), torch.tensor([[0] * 6 + [1] * 10])


def python_of_a_gpu(rounds: int) -> list[Row]:
    """Microseconds of Python a forward, launches and the rest of the device's work stood in for."""
    windows = [list(range(1000, 1000 + TOKENS))] * SEQUENCES
    segments = [[0] * QUESTION + [1] * (TOKENS - QUESTION)] * SEQUENCES
    batch = PackedBatch.from_lists(windows, segments, "meta")
    work = f"Python of a forward on a GPU, {SEQUENCES} x {TOKENS}"
    lengths = ",".join(map(str, LENGTHS))
    schedules = {work: None, f"{work} at {lengths}": LengthSchedule.absolute(LENGTHS, scorer="received")}
    contenders, replaced = [], {}
    with as_on_a_gpu():
        model = model_without_weights(num_hidden_layers=len(LENGTHS))
        for name, schedule in schedules.items():
            call = functools.partial(model.forward_packed, batch, schedule)
            made, replaced[name] = recorded(call)
            contenders.append(Contender(name, call, functools.partial(replaying, made)))
        seconds = measure(contenders, rounds, "Python of a GPU's forward")
    return [
        judged(name, "microseconds", [1e6 * value for value in values], AIM_US) | {"replaced": replaced[name]}
        for name, values in seconds.items()
    ]


def judged(name: str, unit: str, values: Sequence[float], aim: float) -> Row:
    """A row, without its further fields."""
    median, ends = float(f"{statistics.median(values):.4g}"), [values[0], values[0]]
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        ends = [low, high]
    spread = [float(f"{end:.4g}") for end in ends]
    return {
        "name": name,
        unit: median,
        "aim": aim,
        "met": median <= aim,
        "spread": spread,
        "rounds": len(values),
    }


def microseconds(seconds: Sequence[float]) -> float:
    return float(f"{1e6 * statistics.median(seconds):.4g}")


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """What the figures belong to: date, commit, device, versions and arguments."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": {
            "cpu": cpu_name(),
            "torch_capability": torch.backends.cpu.get_cpu_capability(),
            "threads": torch.get_num_threads(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "triton", "transformers")},
        },
        "arguments": {"rounds": options.rounds},
        "rows": [],
        "skipped": [],
    }


def save(results: dict[str, Any], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")


def table(results: dict[str, Any]) -> str:
    """One line a row, under what they belong to."""
    device, versions = results["device"], results["versions"]
    packages = ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "triton", "transformers"))
    lines = [f"{device['cpu']}, 1 thread, {packages}, {results['date'][:10]}, commit {results['commit'][:12]}", ""]
    for row in results["rows"]:
        value, unit = (row["ratio"], "") if "ratio" in row else (row["microseconds"], " us")
        low, high = row["spread"]
        times = f" ({row['own_us']:.0f} / {row['peer_us']:.0f} us)" if "ratio" in row else ""
        verdict = "met" if row["met"] else "NOT MET"
        lines.append(
            f"{verdict:7} {value:6.4g}{unit} [{low:.4g} - {high:.4g}], aim {row['aim']:g}: {row['name']}{times}"
        )
    return "\n".join([*lines, *(f"not run: {entry['name']}: {entry['reason']}" for entry in results["skipped"])])


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Time what the host costs where there is next to no arithmetic, on a CPU and before a GPU.",
        epilog="example: python scripts/bench_host.py --rounds 100",
    )
    parser.add_argument("--output", type=Path, default=Path("bench_host.json"), help="JSON to write (%(default)s)")
    parser.add_argument("--rounds", type=int, default=40, help="blocks of each contender (%(default)s)")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error(f"--rounds must be at least 1, not {options.rounds}")
    return options


if __name__ == "__main__":
    main(arguments())
