"""Which configuration launches each kernel the fastest here: `dtbert.kernels.triton.configs` says which are tried.

    python -m gpu_check.tune check --records FILE     compile them all, and hold each to exact integers
    python -m gpu_check.tune time --records FILE      time those that passed, and write tables of the fastest

The first compiles on all cores and times nothing; the second needs the device for itself. Kernels are replayed from a
CUDA graph over 32 sequences of 384 tokens and 64 windows of SQuAD, together.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench.provenance import commit
from gpu_bench.attention import Inputs
from gpu_bench.machine import describe_device, package_versions
from gpu_bench.setting import FULL, TINY, Setting
from gpu_bench.timing import Contender, Effort, compare
from torch import Tensor

from dtbert.kernels.triton import Triton
from dtbert.kernels.triton.configs import (
    Config,
    Table,
    Tuned,
    candidates,
    default_for,
    dtype_name,
    forcing,
    padded_size,
    variants,
    write_table,
)
from dtbert.kernels.triton.launch import architecture
from dtbert.kernels.triton.linear import fused_linear
from gpu_check import records
from gpu_check.pool import NO_TIME, Answer, Job, answer_jobs, run_jobs
from gpu_check.records import Record
from gpu_check.turn import add_part_arguments, wait_for_turn, worker_command
from tests.gpu.exact import exact_score, exact_sequence, question_of

_WORKERS, _JOB_S = 12, 60.0
_REPEATS = 5
# The default stays where the fastest is no faster than that.
_WORTH = 0.98
_SCORE_TOLERANCE = 1e-5
_NOT_HELD = "no configuration is known to be exact: `gpu_check.tune check` finds these, with the same file of records"


class Key(NamedTuple):
    """What has a configuration of its own; ``size`` is a head's, or a product's inputs."""

    kernel: str
    dtype: torch.dtype
    size: int
    variant: str

    @property
    def fields(self) -> Record:
        return {"kernel": self.kernel, "dtype": dtype_name(self.dtype), "size": self.size, "variant": self.variant}

    def configs(self, arch: str) -> tuple[Config, ...]:
        default = default_for(arch, self.kernel, self.dtype, self.size)
        return tuple(dict.fromkeys([default, *candidates(self.kernel, self.dtype, self.size, self.variant)]))


def keys(tiny: bool) -> list[Key]:
    """The commonest first; float16 takes what was measured in bfloat16."""
    sizes = [
        ("attention", torch.bfloat16, 64),
        ("attention", torch.bfloat16, 32),
        ("fused_linear", torch.bfloat16, 768),
    ]
    sizes += [("attention", torch.float32, 64), ("fused_linear", torch.bfloat16, 384), ("attention", torch.float32, 32)]
    sizes += [("attention", torch.bfloat16, 128), ("fused_linear", torch.float32, 768)]
    if tiny:
        sizes = [("attention", torch.bfloat16, 32), ("fused_linear", torch.bfloat16, 48)]
    return [Key(*size, variant) for size in sizes for variant in variants(size[0])]


def key_of(record: Record) -> Key:
    return Key(record["kernel"], getattr(torch, record["dtype"]), record["size"], record["variant"])


def check(job: Job, device: torch.device, tiny: bool) -> Answer:
    """``error``, empty where the configuration is exact, and ``seconds`` with compiling."""
    begin, key = time.monotonic(), key_of(job)
    config = next(config for config in key.configs(architecture(device)) if list(config) == job["config"])
    exact = _exact_attention if key.kernel == "attention" else _exact_linear
    error = ""
    with forcing(key.kernel, config):
        for run in exact(key, device, tiny):
            for _ in range(1 if tiny else _REPEATS):
                error = error or run()
    return {"error": error, "seconds": round(time.monotonic() - begin, 2)}


def _exact_attention(key: Key, device: torch.device, tiny: bool) -> Iterator[Callable[[], str]]:
    generator, heads, backend = torch.Generator(device).manual_seed(0), 2 if tiny else 12, Triton()
    lengths = [1, 20] if tiny else [1, 16, 100, 200, 384]
    sequences = [exact_sequence(length, heads, key.size, generator) for length in lengths]
    qkv = torch.cat([sequence.qkv.flatten(1) for sequence in sequences]).to(key.dtype)
    context = torch.cat([sequence.context.flatten(1) for sequence in sequences]).to(key.dtype)
    setting = setting_for(device, tiny)
    packing = setting.packing(lengths)
    segments = torch.cat([torch.arange(length) >= question_of(length) for length in lengths]).long().to(device)

    def scores(kind: str) -> Tensor:
        parts = [exact_score(kind, s.probabilities, question_of(len(s.qkv))) for s in sequences]
        return torch.cat(parts).float()

    def run() -> str:
        if key.variant == "context":
            return _differs(backend.attention(qkv, packing, heads), context, 0)
        if key.variant == "received":
            got, significance = backend.scored_attention(qkv, packing, heads, "received")
            return _differs(got, context, 0) or _differs(significance, scores("received"), _SCORE_TOLERANCE)
        significance = backend.significance(qkv, packing, heads, "from_question", segments)
        return _differs(significance, scores("from_question"), _SCORE_TOLERANCE)

    yield run


def _exact_linear(key: Key, device: torch.device, tiny: bool) -> Iterator[Callable[[], str]]:
    generator = torch.Generator().manual_seed(0)

    def integers(*shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=generator).to(device, key.dtype)

    weight, bias = integers(4 * key.size, key.size), integers(4 * key.size)
    for tokens in (20,) if tiny else (1, 127, 1000):
        x = integers(tokens, key.size)
        want = (x.double() @ weight.double().T + bias.double()).relu().to(key.dtype)
        yield lambda x=x, want=want: _differs(fused_linear(x, weight, bias, "relu"), want, 0)  # type: ignore[misc]


def _differs(got: Tensor, want: Tensor, tolerance: float) -> str:
    """What is wrong with a result; NaN is."""
    wrong = ~((got.double() - want.double()).abs() <= tolerance * (1 + want.double().abs()))
    return f"{int(wrong.sum())} of {got.numel()} values are wrong" if wrong.any() else ""


def time_key(key: Key, configs: list[Config], setting: Setting) -> dict[str, Any]:
    """`compare` of the configurations; contenders are named by their place in the list."""
    setting = replace(setting, dtype=key.dtype, backend=Triton())
    launch, sets = (_attention if key.kernel == "attention" else _linear)(key, setting)

    def forced(config: Config) -> Callable[[int], Tensor]:
        def run(index: int) -> Tensor:
            with forcing(key.kernel, config):
                return launch(index)

        return run

    contenders = [Contender(str(place), forced(config)) for place, config in enumerate(configs)]
    return compare(contenders, setting.device, setting.effort, sets=sets, launch="replayed")


def _attention(key: Key, setting: Setting) -> tuple[Callable[[int], Tensor], int]:
    sizes = setting.sizes
    setting = replace(setting, sizes=sizes._replace(head_size=key.size, windows=sizes.tuned_windows))
    inputs = [Inputs(setting, lengths) for lengths in setting.works.values() if lengths]

    def launch(index: int) -> Tensor:
        for each in inputs:
            place = index % each.sets
            if key.variant == "context":
                out = each.attend(place)
            elif key.variant == "received":
                out = each.attend_and_score("received", place)[0]
            else:
                out = each.score("from_question", place)
        return out

    return launch, max(each.sets for each in inputs)


def _linear(key: Key, setting: Setting) -> tuple[Callable[[int], Tensor], int]:
    tokens, wide = setting.sizes.equal[0] * setting.sizes.equal[1], 4 * key.size
    sets = setting.sets(tokens * (key.size + wide) * key.dtype.itemsize)
    x = [setting.randn(tokens, key.size, seed=seed) for seed in range(sets)]
    weight, bias = setting.randn(wide, key.size) / key.size**0.5, setting.randn(wide)
    return lambda index: fused_linear(x[index], weight, bias, "gelu"), sets


def choose(key: Key, configs: list[Config], timed: dict[str, Any]) -> Record | None:
    """The fastest, or the default where that is as fast; None where nothing could be timed."""
    results = {configs[int(result["provider"])]: result for result in timed["results"]}
    if not results:
        return None
    fastest = min(results, key=lambda config: float(results[config]["ms"]))
    default = configs[0]
    if default in results and results[fastest]["ms"] > _WORTH * results[default]["ms"]:
        fastest = default
    result = results[fastest]
    return {
        **key.fields,
        "size": padded_size(key.size),
        "config": fastest._asdict(),
        "median_us": round(1e3 * result["ms"], 3),
        "quartiles_us": [round(1e3 * quartile, 3) for quartile in result["quartiles_ms"]],
        "default_us": round(1e3 * results[default]["ms"], 3) if default in results else None,
        "tried": len(results),
    }


def tuned_row(record: Record, kind: Callable[..., Config]) -> Tuned:
    """A row of the table from its record."""
    low, high = record["quartiles_us"]
    kernel, dtype, size, variant = (record[name] for name in ("kernel", "dtype", "size", "variant"))
    return Tuned(kernel, dtype, size, variant, kind(**record["config"]), record["median_us"], (low, high))


def setting_for(device: torch.device, tiny: bool, deadline: float = float("inf")) -> Setting:
    return Setting.on(device, TINY if tiny else FULL, Effort(1 if tiny else 9, 1e-4 if tiny else 8e-3, deadline))


def check_all(options: argparse.Namespace, device: torch.device) -> int:
    deadline, arch = wait_for_turn(options.await_turn), architecture(device)
    # The first configuration of a key is the default: it is always tried.
    jobs = [
        {**key.fields, "config": list(config)}
        for key in keys(options.tiny)
        for config in key.configs(arch)[: 2 if options.tiny else None]
    ]
    wrong = []

    def done(job: Job, answer: Answer) -> None:
        records.append(options.records, "candidate", {**job, **answer})
        if answer["error"] not in ("", NO_TIME):
            wrong.append(job)
            print(f"{job}: {answer['error']}", flush=True)

    command = worker_command("gpu_check.tune", options, "check")
    workers = 2 if options.tiny else _WORKERS
    run_jobs(jobs, command, done, workers=workers, job_s=_JOB_S, deadline=deadline)
    return 1 if wrong else 0


def time_all(options: argparse.Namespace, device: torch.device) -> int:
    setting = setting_for(device, options.tiny, wait_for_turn(options.await_turn))
    arch, rows = architecture(device), []
    found, _ = records.read(options.records)
    held = list(records.of_kind(found, "candidate"))
    passed = [record for record in held if not record.get("error")]
    if not passed:
        late = any(record["error"] == NO_TIME for record in held)
        records.append(options.records, "skipped", {"section": "tune", "reason": NO_TIME if late else _NOT_HELD})
        return 0 if late else 1
    for key in keys(options.tiny):
        if setting.effort.seconds_left < 0:
            records.append(options.records, "skipped", {"section": "tune", "reason": NO_TIME})
            break
        exact = [record["config"] for record in passed if key_of(record) == key]
        configs = [config for config in key.configs(arch) if list(config) in exact]
        timed = time_key(key, configs, setting)
        record = choose(key, configs, timed)
        if record is None:
            continue
        records.append(options.records, "tuned", {**record, "not_timed": timed["not_timed"]})
        rows.append(tuned_row(record, type(configs[0])))
        device_name = describe_device(device)["name"]
        table = Table(arch, device_name, package_versions(), options.commit or commit(), tuple(rows))
        for folder in options.tables:
            write_table(table, folder)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=("check", "time"))
    add_part_arguments(parser)
    parser.add_argument("--tables", type=Path, nargs="+", default=[], help="folders to write <architecture>.json into")
    parser.add_argument("--commit", help="what the table belongs to, where there is no repository to ask")
    options = parser.parse_args()
    device = torch.device(options.device)
    with torch.inference_mode():
        if options.worker:
            answer_jobs(lambda job: check(job, device, options.tiny))
            return 0
        return (check_all if options.step == "check" else time_all)(options, device)


if __name__ == "__main__":
    raise SystemExit(main())
