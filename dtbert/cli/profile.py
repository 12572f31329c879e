"""`dtbert profile`: where the time of a forward goes, step by step and layer by layer."""

import argparse
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dtbert.cli.options import (
    QUIET_HELP,
    SCHEDULE_HELP,
    add_model_options,
    add_schedule_options,
    placement,
    positive,
    resolved,
    schedule_of,
)
from dtbert.cli.output import check_output, print_json

if TYPE_CHECKING:
    from dtbert.model import BertForQuestionAnswering, OwnScorer, PackedBatch, Policy

SUMMARY = "time each step of a model against the limit of the device"
DESCRIPTION = """\
Time each step of a forward over random tokens, next to what the device can do
at the most: the rates of a large product and of a large copy, measured on the
spot. With a schedule, the same batch with nothing dropped stands beside it.

columns:
  ms, p10-p90   median over the repeats, 10th and 90th percentile
  share         of the time of all steps
  GFLOP         two for each multiply-add of a product; nothing else counts
  MB            inputs read once and outputs written once: what must move
  GFLOP/s, GB/s these over the median time
  bound         compute or memory: which ceiling is the lower one for the step
  of it         share of that ceiling reached; above 100% where data stays in
                a cache, which the large copy outgrows
  all ms        the same step or layer with nothing dropped
  ratio         ms with the schedule over ms with nothing dropped

"other" is time between the steps: checks, index lists, gathers. "peak MB" is
what tensors of one forward take beside the weights. The time of a GPU is the
one between events in its stream, waits for the next launch included.
"""
EXAMPLES = f"""\
examples:
  dtbert profile
  dtbert profile --batch 1 --length 128 --threads 1 --json
  dtbert profile --size 6x768 --schedule 269,253,252,202,104,34 \\
    --plot profile.png --trace trace.json

{SCHEDULE_HELP}"""

_BATCH, _LENGTH = 8, 384
_MOST_TOKENS = 2**31 - 1  # as far as kernels count rows


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("batch")
    group.add_argument("--batch", type=positive, metavar="B", help=f"sequences (default: {_BATCH})")
    group.add_argument("--length", type=positive, metavar="N", help=f"tokens of each (default: {_LENGTH})")
    group.add_argument("--lengths", metavar="FILE", help="instead: a file with the tokens of a sequence on each line")
    parser.add_argument("--repeats", type=positive, default=10, metavar="N", help="how often to measure (default: 10)")
    parser.add_argument("--plot", metavar="FILE", help="draw a roofline and a bar per layer: .png, .pdf or .svg")
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace in JSON; ui.perfetto.dev opens it")
    parser.add_argument("--json", action="store_true", help="print one JSON object: seconds, bytes, FLOPs")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    add_model_options(parser)
    parser.add_argument("--size", type=_size, metavar="LxH", help="random weights: L layers, hidden size H")
    parser.add_argument("--backend", metavar="NAME", help="the kernels: reference, cpu, ... (default: by device)")
    add_schedule_options(parser)


def run(arguments: argparse.Namespace) -> int:
    from dtbert.profiling.plot import check_plot

    for option, path in (("--plot", arguments.plot), ("--trace", arguments.trace)):
        if path is not None:
            check_output(option, Path(path), arguments.lengths, arguments.schedule, model=arguments.model)
    if arguments.plot is not None:
        check_plot(Path(arguments.plot))
    if arguments.size is not None and (arguments.model, arguments.revision) != (None, None):
        raise ValueError("--size makes random weights, --model and --revision name trained ones: give one or the other")
    seqlens = _seqlens(arguments)
    schedule = schedule_of(arguments)
    # The profiler's library reads this when torch is loaded; without it, it reports its own start on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    model, batch = _prepare(arguments, seqlens)
    if schedule is not None:
        schedule.check_layers(model.config.num_hidden_layers)
        (schedule,) = resolved([schedule], _own_scorer(arguments, model))
    _profile(arguments, model, batch, schedule)
    return 0


def _profile(
    arguments: argparse.Namespace,
    model: "BertForQuestionAnswering",
    batch: "PackedBatch",
    schedule: "Policy | None",
) -> None:
    from tqdm import tqdm

    from dtbert import profiling

    schedules = [None] if schedule is None else [schedule, None]
    with tqdm(total=arguments.repeats, unit="repeat", disable=arguments.quiet or None) as bar:
        forwards = profiling.profile_forwards(model, batch, schedules, arguments.repeats, bar.update)
    profile = profiling.Profile(
        profiling.describe("random weights" if arguments.size else arguments.model or "shipped model", model, batch),
        profiling.measure_ceilings(model.device, model.dtype, model.product_dtype),
        forwards[-1],
        None if schedule is None else forwards[0],
    )
    if arguments.trace is not None:
        profiling.write_trace(model, batch, schedules, Path(arguments.trace))
    if arguments.plot is not None:
        profiling.save_plot(profile, Path(arguments.plot))
    if arguments.json:
        print_json(profile.to_dict())
    else:
        print(profiling.table(profile))


def _own_scorer(arguments: argparse.Namespace, model: "BertForQuestionAnswering") -> "OwnScorer":
    from dtbert.qa.budgets import own_scorer, schedules_of
    from dtbert.weights import resolve_source

    if arguments.size is not None:
        return model.config.own_scorer
    source = resolve_source(arguments.model, arguments.revision)
    return own_scorer(schedules_of(source, model.config.num_hidden_layers), model.config)


def _prepare(arguments: argparse.Namespace, seqlens: list[int]) -> "tuple[BertForQuestionAnswering, PackedBatch]":
    place = placement(arguments)
    from dtbert.profiling import check_device, random_batch, random_model
    from dtbert.weights import load_model

    if arguments.size is None:
        model = load_model(arguments.model, **place, backend=arguments.backend)
    else:
        device, dtype = place["device"], place["dtype"]
        model = random_model(*arguments.size, device=device, dtype=dtype, backend=arguments.backend)
    check_device(model.device)
    if arguments.dtype not in ("int8", "float8_e4m3fn") and place["dtype"] not in (None, model.dtype):
        print(
            f"dtbert: this CPU has no matrix instructions for {arguments.dtype}: it computes in float32",
            file=sys.stderr,
        )
    return model, random_batch(model.config, seqlens, model.device)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d{0,2})x([1-9]\d{0,4})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected layers x hidden size, such as 6x768, got {text!r}")
    layers, hidden = int(match[1]), int(match[2])
    if hidden % 12:
        raise argparse.ArgumentTypeError(f"a hidden size of 12 heads is a multiple of 12, such as 768, got {text!r}")
    return layers, hidden


def _seqlens(arguments: argparse.Namespace) -> list[int]:
    if arguments.lengths is None:
        length, sequences = arguments.length or _LENGTH, arguments.batch or _BATCH
        if length * sequences > _MOST_TOKENS:
            raise ValueError(f"--batch {sequences} of --length {length} are more than {_MOST_TOKENS:,} tokens")
        return [length] * sequences
    if (arguments.batch, arguments.length) != (None, None):
        raise ValueError("--lengths gives every sequence its own length: leave out --batch and --length")
    return read_lengths(Path(arguments.lengths))


def read_lengths(path: Path) -> list[int]:
    """The whole numbers of a file, one on each line; blank lines are passed over.

    Raises:
        ValueError: a line that is no whole number of at least 1, or no line at all; the message names it.
        OSError: the file cannot be read.
    """
    lengths = []
    for number, line in enumerate(path.read_bytes().decode("utf-8", "backslashreplace").splitlines(), start=1):
        text = line.strip()
        if not text:
            continue
        if not (text.isascii() and text.isdecimal() and len(text) < 10) or int(text) < 1:
            raise ValueError(f"{path}, line {number}: expected a whole number of at least 1, got {text[:40]!r}")
        lengths.append(int(text))
    if not lengths:
        raise ValueError(f"{path}: no lengths in it: give the tokens of one sequence on each line")
    return lengths
