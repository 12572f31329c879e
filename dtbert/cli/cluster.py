"""`dtbert answer --input --output --engine ray`: more questions than one process, or one machine, can answer."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from dtbert.cli.answering import asking, settings_of
from dtbert.cli.batch import CHARACTERS_PER_TOKEN, model_settings
from dtbert.cli.options import load_for_schedule, positive
from dtbert.cli.stream import STREAM
from dtbert.jobs.folder import FORMATS
from dtbert.jobs.lines import model_sha256

if TYPE_CHECKING:
    from dtbert.model import Policy

# A block of these takes minutes of one CPU thread, or seconds of a GPU: long beside what Ray needs for each.
_BLOCK_TOKENS = 1_000_000
_ONLY_HERE = ("address", "workers", "block_tokens", "format")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of a job."""
    group = parser.add_argument_group("many questions on a cluster")
    group.add_argument("--engine", choices=["ray"], help="answer by Ray Data: pip install 'dtbert[ray]'")
    group.add_argument(
        "--address",
        metavar="A",
        help="of a Ray cluster, or auto, that of this machine (default: one of this machine alone, for this job)",
    )
    each = "one a GPU with --device cuda, else one for --threads CPUs, 1 by default"
    group.add_argument("--workers", type=positive, metavar="N", help=f"processes with a model ({each})")
    tokens = f"size of a block: an interruption costs no more for each worker ({_BLOCK_TOKENS:,})"
    group.add_argument("--block-tokens", type=positive, metavar="N", help=tokens)
    group.add_argument("--format", choices=FORMATS, help="of the parts of --output (default: jsonl)")


def check_arguments(arguments: argparse.Namespace) -> None:
    """Raise ValueError for options of a job without one."""
    given = [name for name in _ONLY_HERE if getattr(arguments, name) is not None]
    if arguments.engine is None and given:
        raise ValueError(f"--{given[0].replace('_', '-')} is for a cluster: give --engine ray with it")
    if arguments.engine is not None and (arguments.input is None or arguments.output is None):
        raise ValueError("--engine ray answers many questions: give --input and --output")


def run(arguments: argparse.Namespace) -> int:
    """Run the job; the exit status."""
    from dtbert.jobs.blocks import input_files
    from dtbert.jobs.cluster import Cluster, check_ray, run_job
    from dtbert.jobs.folder import OutputFolder
    from dtbert.jobs.places import Place
    from dtbert.jobs.worker import Answering
    from dtbert.weights import resolve_source

    if STREAM in (arguments.input, arguments.output):
        raise ValueError("--engine ray reads and writes files: - is for a pipe")
    if arguments.budget == "auto" or arguments.agreement is not None:
        raise ValueError("--engine ray knows no cascade.json: give a number to --budget, and no --agreement")
    if arguments.device is not None and arguments.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {arguments.device}: Ray gives each worker a device of its own: give cpu or cuda")
    check_ray()
    output = OutputFolder(Place.of(arguments.output), arguments.format or FORMATS[0])
    files = input_files(arguments.input)
    for file in files:
        if f"{file.name}/".startswith(f"{output.place.name.rstrip('/')}/"):
            raise ValueError(f"--output {arguments.output} holds the input {file.name}: name another folder")
    path = resolve_source(arguments.model, arguments.revision)
    # Here it only says what the options mean: for the model's schedules, its threshold, its digest.
    here = {"device": None, "dtype": None, "model": path, "revision": None}
    given = argparse.Namespace(**{**vars(arguments), **here})
    answerer, schedule = load_for_schedule(given, static=arguments.device == "cuda")
    _check_scorers(schedule)
    digest = model_sha256(path, answerer)
    block_tokens = arguments.block_tokens or _BLOCK_TOKENS
    answering = Answering(
        model=str(Path(arguments.model).absolute())
        if arguments.model and Path(arguments.model).exists()
        else arguments.model,
        revision=arguments.revision,
        model_sha256=digest,
        device=arguments.device,
        dtype=arguments.dtype,
        threads=arguments.threads or 1,
        reading={
            "window": arguments.window,
            "stride": arguments.stride,
            "max_answer_tokens": arguments.max_answer_tokens,
            "threshold": answerer.threshold,
        },
        asking=asking(arguments, schedule),
        top=arguments.top,
    )
    settings = {
        **model_settings(arguments, digest),
        **settings_of(arguments, schedule, answerer.threshold),
        "block_tokens": block_tokens,
        "format": output.format,
    }
    del answerer
    cluster = Cluster(arguments.address, arguments.workers, arguments.quiet)
    records = run_job(settings, files, CHARACTERS_PER_TOKEN * block_tokens, answering, output, cluster)
    failed, total = (sum(getattr(record, name) for record in records) for name in ("failed", "rows"))
    if failed:
        print(f'dtbert: {failed} of {total} lines failed: see "error" in {arguments.output}', file=sys.stderr)
    return 1 if failed else 0


def _check_scorers(schedule: "Policy | None") -> None:
    scorer = None if schedule is None else schedule.scorer
    for name in (scorer,) if isinstance(scorer, str) else scorer or ():
        if ":" in name:
            raise ValueError(f"--engine ray knows the scorers of dtbert alone, not {name}: workers cannot import it")
