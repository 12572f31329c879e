"""`dtbert train`: a span head on any BERT, with LengthDrop, and with a teacher."""

import argparse
import hashlib
import sys
from collections.abc import Callable
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from dtbert.cli.options import (
    QUIET_HELP,
    REVISION_HELP,
    SCHEDULE_HELP,
    THREADS_HELP,
    add_window_options,
    known_scorers,
    parse_schedule,
    positive,
    threads,
)
from dtbert.cli.output import print_json
from dtbert.cli.processes import agree, joined
from dtbert.cli.tasks import TASK_HELP, add_task_option
from dtbert.cli.train_parts import question_parts, text_parts
from dtbert.files import first_line
from dtbert.training import Distillation, LengthDrop, TrainingOptions
from dtbert.training.options import ABOVE_0

if TYPE_CHECKING:
    from dtbert.model import BertForQuestionAnswering, BertForSequenceClassification
    from dtbert.training.checkpoint import RunFolder
    from dtbert.training.loop import Trainer

SUMMARY = "train a model on SQuAD files or texts, to do with fewer tokens too"
DESCRIPTION = """\
Train a BERT, an encoder alone or one with a span head, on questions in SQuAD
1.1's format. With --length-drop it also learns to answer when tokens are
dropped between its layers; with --teacher it learns from a larger BERT. With
--task it learns to label texts: a classifier of the same labels is gone on
with, else a new one is put on the encoder.

OUT is the run's folder: `best` and `last` are models for the other commands,
metrics.jsonl has a line per step. The same command goes on where an
interrupted one stopped, even after kill -9.
"""
EXAMPLES = f"""\
examples:
  dtbert train --model bert-folder --train train.json --dev dev.json --out run
  dtbert train --model run/best --train train.json --dev dev.json \\
      --length-drop --eval-schedule 1,0.9,0.6,0.4,0.2,0.1 --out dropping
  dtbert train --model tinybert --teacher bert-base-squad \\
      --distill intermediate --train train.json --out distilled
  torchrun --nproc-per-node 4 -m dtbert.cli train ... --device cuda
  dtbert train --task sst2 --model tinybert --teacher bert-base-sst2 \\
      --train train.tsv --out distilled
  dtbert train --task sst2 --model bert-folder --train train.tsv --dev dev.tsv \\
      --length-drop --eval-schedule 1,1,0.8,0.6,0.4,0.2 --out classifier

{TASK_HELP}
{SCHEDULE_HELP}"""


def _name(one: "Field[Any]") -> str:
    return one.metadata.get("flag", one.name)


# Options that say nothing without another one.
_DEPENDENT = {
    "length_drop": (*map(_name, fields(LengthDrop)), "sub_model_loss"),
    "teacher": ("teacher_revision", *map(_name, fields(Distillation))),
    "dev": ("eval_every", "eval_limit", "eval_schedule"),
}
# ... and those of a teacher that have no part in one kind of distillation.
_NO_PART = {"prediction": "match_attention", "intermediate": "temperature"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    start = "where to start: a hub id, a folder or a file (default: the one inside dtbert)"
    parser.add_argument("--model", metavar="SOURCE", help=start)
    parser.add_argument("--revision", metavar="R", help=REVISION_HELP)
    add_task_option(parser)
    files: dict[str, Any] = {"metavar": "FILE", "nargs": "+", "action": "extend"}
    parser.add_argument("--train", **files, required=True, help="questions, .json or .json.gz")
    parser.add_argument("--dev", **files, help="held-out questions, which decide what is best")
    parser.add_argument("--out", metavar="OUT", required=True, help="the run's folder")
    group = parser.add_argument_group("optimisation")
    _add_fields(group, TrainingOptions, "epochs", "batch_tokens", "learning_rate", "warmup", "weight_decay")
    _add_fields(group, TrainingOptions, "max_grad_norm", "hidden_dropout", "attention_dropout")
    add_window_options(group)
    _add_fields(group, TrainingOptions, "seed")
    group = parser.add_argument_group("length drop")
    group.add_argument("--length-drop", action="store_true", help="train sub-models that drop tokens, too")
    _add_fields(group, LengthDrop)
    _add_fields(group, TrainingOptions, "sub_model_loss")
    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher", metavar="SOURCE", help="a larger BERT with the same head and vocabulary")
    group.add_argument("--teacher-revision", metavar="R", help=REVISION_HELP)
    _add_fields(group, Distillation)
    group = parser.add_argument_group("evaluation and checkpoints")
    _add_fields(group, TrainingOptions, "eval_every")
    group.add_argument("--eval-limit", type=positive, metavar="N", help="N held-out questions, evenly spread")
    group.add_argument(
        "--eval-schedule",
        metavar="SPEC",
        action="append",
        help="also measure with tokens dropped; best is by the mean F1; may be repeated",
    )
    _add_fields(group, TrainingOptions, "save_every")
    group = parser.add_argument_group("machine and output")
    group.add_argument("--device", metavar="D", default="cpu", help="cpu, cuda, ... (default: cpu)")
    group.add_argument("--threads", type=threads, metavar="N", help=THREADS_HELP)
    _add_fields(group, TrainingOptions, "bf16")
    group.add_argument("--strict", action="store_true", help="stop at questions that cannot be trained on")
    group.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    group.add_argument("--json", action="store_true", help="print the last record as one JSON object")


def _add_fields(group: Any, described: type, *names: str) -> None:
    """Make options of the fields of a dataclass, which keeps the defaults: an option that is not given is None."""
    for one in (one for one in fields(described) if one.name in names or not names):
        flag, meaning = f"--{_name(one).replace('_', '-')}", one.metadata["meaning"]
        if one.type is bool:
            group.add_argument(flag, action="store_true", default=None, help=meaning)
            continue
        kind: Any = one.type if one.type in (int, float) else str
        if kind is int and one.metadata["must_be"] == ABOVE_0:
            kind = positive
        shown = one.metadata.get("shown") or (one.default if isinstance(one.default, str) else f"{one.default:g}")
        group.add_argument(
            flag,
            type=kind,
            choices=get_args(one.type) if get_origin(one.type) is Literal else None,
            metavar=one.metadata["letter"],
            help=f"{meaning} ({shown})".lstrip(),
        )


def _given(arguments: argparse.Namespace, described: type) -> dict[str, Any]:
    """The fields of a dataclass that the command line has a value for."""
    values = {one.name: getattr(arguments, _name(one)) for one in fields(described) if "meaning" in one.metadata}
    return {name: value for name, value in values.items() if value is not None}


def run(arguments: argparse.Namespace) -> int:
    with joined(arguments.device) as rank:
        make_trainer, folder = agree(lambda: _prepare(arguments, rank))
        trainer = make_trainer()
        trained = _train(trainer, arguments, rank)
    if folder is None:
        return 0
    record = folder.last_record()
    if arguments.json:
        print_json(record)
    else:
        print(_summary(record, Path(arguments.out), trainer.num_steps, trained))
    return 0


def _options(arguments: argparse.Namespace) -> TrainingOptions:
    _check_dependent(arguments)
    length_drop = distillation = None
    if arguments.length_drop:
        dropping = _given(arguments, LengthDrop)
        if "scorers" in dropping:
            dropping["scorers"] = tuple(known_scorers("--scorers", arguments.scorers))
        if "policies" in dropping:
            dropping["policies"] = tuple(dropping["policies"].split(","))
        if "ratio_bound" in dropping:
            dropping["ratio_bound"] = _ratio_bound(arguments.ratio_bound)
        length_drop = LengthDrop(**dropping)
    if arguments.teacher is not None:
        distillation = Distillation(**_given(arguments, Distillation))
        if getattr(arguments, other := _NO_PART[distillation.kind]) is not None:
            raise ValueError(f"--{other.replace('_', '-')} has no part in --distill {distillation.kind}: leave it out")
    return TrainingOptions(**_given(arguments, TrainingOptions), length_drop=length_drop, distillation=distillation)


def _check_dependent(arguments: argparse.Namespace) -> None:
    for needed, names in _DEPENDENT.items():
        given = [name for name in names if getattr(arguments, name) is not None]
        if given and getattr(arguments, needed) in (None, False):
            raise ValueError(f"--{given[0].replace('_', '-')} needs --{needed.replace('_', '-')}")


def _ratio_bound(spec: str) -> float | tuple[float, ...]:
    try:
        bounds = tuple(float(part) for part in spec.split(","))
    except ValueError:
        raise ValueError(f"--ratio-bound must be a number or one for each layer, A,B,..., not {spec!r}") from None
    return bounds if len(bounds) > 1 else bounds[0]


def _prepare(arguments: argparse.Namespace, rank: int) -> "tuple[Callable[[], Trainer], RunFolder | None]":
    """What makes the trainer, of parts that are checked already, and its folder; the first process alone has one."""
    import torch

    from dtbert.training.checkpoint import RunFolder
    from dtbert.training.loop import Trainer
    from dtbert.weights import model_folder, resolve_source

    options = _options(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    parsed = [parse_schedule(spec, "--eval-schedule") for spec in arguments.eval_schedule or []]
    source = resolve_source(arguments.model, arguments.revision)
    make = question_parts if arguments.task is None else text_parts
    parts = make(arguments, options, source, parsed, rank)
    folder = None
    if rank == 0:
        run = {
            **_identity(arguments, options),
            **parts.known_by,
            "eval_schedule": [schedule.to_dict() for schedule in parts.schedules.values()],
            "model_sha256": _weights_digest(parts.model),
            "teacher_sha256": None if parts.teacher is None else _weights_digest(parts.teacher.model),
        }
        folder = RunFolder(Path(arguments.out), run)
    rest = model_folder(source), parts.evaluate, parts.teacher
    return partial(Trainer, parts.model, parts.data, options, folder, *rest), folder


def _identity(arguments: argparse.Namespace, options: TrainingOptions) -> dict[str, Any]:
    """What a run's folder is compared by: all options that have a part in what the run makes."""
    names = ("model", "revision", "task", "teacher", "teacher_revision", "window", "stride", "eval_limit")
    fields = {**{name: getattr(arguments, name) for name in names}, **options.to_dict()}
    # How often a run is saved changes nothing in what it makes.
    del fields["save_every"]
    return fields


def _weights_digest(model: "BertForQuestionAnswering | BertForSequenceClassification") -> str:
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode("utf-8"))
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def _train(trainer: "Trainer", arguments: argparse.Namespace, rank: int) -> bool:
    """Train to the end, with a progress bar; False where there was nothing left to do."""
    import torch
    from tqdm import tqdm

    from dtbert.training.memory import keep_freed_memory

    if trainer.model.device.type == "cpu":
        keep_freed_memory()
    if rank == 0 and 0 < trainer.step < trainer.num_steps:
        print(f"dtbert: going on after step {trainer.step} of {trainer.num_steps}", file=sys.stderr)
    hide = True if arguments.quiet or rank else None
    with tqdm(total=trainer.num_steps, initial=trainer.step, unit="step", disable=hide) as bar:

        def report(record: dict[str, Any]) -> None:
            loss, rate = f"{record['loss']:.3f}", f"{record['tokens'] / record['seconds']:,.0f}"
            bar.set_postfix({"loss": loss, "tokens/s": rate}, refresh=False)
            bar.update()
            step = record["step"]
            if bar.disable and not hide and step % trainer.options.save_every == 0:  # outside a terminal
                print(f"step {step:,} of {trainer.num_steps:,}: loss {loss}, {rate} tokens/s", file=sys.stderr)
            if "main" in record:
                # Of answers F1 alone, which says more in less.
                shown = [name for name in _measured(record) if not name.startswith("exact_match")]
                measured = [f"{name} {record[name]:.2f}" for name in shown]
                bar.write(f"step {step}: {', '.join(measured)}", file=sys.stderr)

        try:
            return trainer.run(report)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                f"a step of {trainer.options.batch_tokens} tokens: {first_line(error)}; give fewer --batch-tokens"
            ) from error


def _measured(record: dict[str, Any]) -> list[str]:
    """The names of the metrics in a record, at full length and with schedules."""
    metrics = ("f1", "exact_match", "accuracy", "matthews", "pearson", "spearman")
    return [name for name in record if name.partition(" ")[0] in metrics]


def _summary(record: dict[str, Any], out: Path, num_steps: int, trained: bool) -> str:
    models = f"{out / 'last'}" + (f" and {out / 'best'}" if "main" in record else "")
    if trained:
        lines = [f"trained {num_steps:,} steps; models in {models}"]
    else:
        lines = [f"nothing to do: this run of {num_steps:,} steps has ended; models in {models}"]
    measured = _measured(record)
    width = max(map(len, measured), default=0)
    lines += [f"  {name:<{width}} {record[name]:8.2f}" for name in measured]
    return "\n".join(lines)
