"""`dtbert train`: a span head on any BERT, with LengthDrop."""

import argparse
import hashlib
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.cli.evaluate import spread
from dtbert.cli.options import SCHEDULE_HELP, parse_schedule, positive
from dtbert.cli.output import print_json

if TYPE_CHECKING:
    from dtbert.model import BertForQuestionAnswering
    from dtbert.squad import SquadQuestion
    from dtbert.training import TrainingOptions, TrainingSet

SUMMARY = "train a model on SQuAD files, to answer with fewer tokens too"
DESCRIPTION = """\
Train a BERT, an encoder alone or one with a span head, on questions in SQuAD
1.1's format. With --length-drop it also learns to answer when tokens are
dropped between its layers.

OUT is the run's folder: `best` and `last` are models for the other commands,
metrics.jsonl has a line per step. The same command goes on where an
interrupted one stopped, even after kill -9.
"""
EXAMPLES = f"""\
examples:
  dtbert train --model bert-folder --train train.json --dev dev.json --out run
  dtbert train --model run/best --train train.json --dev dev.json \\
      --length-drop --eval-schedule 1,0.9,0.6,0.4,0.2,0.1 --out dropping
  torchrun --nproc-per-node 4 -m dtbert.cli train ... --device cuda

{SCHEDULE_HELP}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="SOURCE", required=True, help="where to start: a hub id, a folder or a file")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    parser.add_argument("--train", metavar="FILE", nargs="+", required=True, help="questions, .json or .json.gz")
    parser.add_argument("--dev", metavar="FILE", nargs="+", help="held-out questions, which decide what is best")
    parser.add_argument("--out", metavar="OUT", required=True, help="the run's folder")
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_length_drop(parser.add_argument_group("length drop"))
    group = parser.add_argument_group("evaluation and checkpoints")
    group.add_argument("--eval-every", type=int, default=0, metavar="N", help="steps (default: each epoch)")
    group.add_argument("--eval-limit", type=positive, metavar="N", help="N held-out questions, evenly spread")
    group.add_argument(
        "--eval-schedule",
        metavar="SPEC",
        action="append",
        default=[],
        help="also measure with tokens dropped; best is by the mean F1; may be repeated",
    )
    group.add_argument("--save-every", type=int, default=100, metavar="N", help="steps between checkpoints (100)")
    group = parser.add_argument_group("machine and output")
    group.add_argument("--device", metavar="D", default="cpu", help="cpu, cuda, ... (default: cpu)")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    group.add_argument("--strict", action="store_true", help="stop at questions that cannot be trained on")
    group.add_argument("--quiet", action="store_true", help="no progress bar (there is none outside a terminal)")
    group.add_argument("--json", action="store_true", help="print the last record as one JSON object")


def _add_optimisation(group: Any) -> None:
    group.add_argument("--epochs", type=float, default=2.0, help="passes over the data, 0.5 for half of one (2)")
    group.add_argument("--batch-tokens", type=positive, default=6144, metavar="N", help="tokens of a step (6144)")
    group.add_argument("--learning-rate", type=float, default=3e-5, metavar="X", help="the highest (3e-5)")
    group.add_argument("--warmup", type=float, default=0.06, metavar="X", help="part of the steps (0.06)")
    group.add_argument("--weight-decay", type=float, default=0.01, metavar="X", help="(0.01)")
    group.add_argument("--max-grad-norm", type=float, default=1.0, metavar="X", help="(1)")
    group.add_argument("--hidden-dropout", type=float, default=0.1, metavar="P", help="(0.1)")
    group.add_argument("--attention-dropout", type=float, default=0.1, metavar="P", help="(0.1)")
    group.add_argument("--window", type=positive, default=384, metavar="N", help="tokens (384)")
    group.add_argument("--stride", type=int, default=128, metavar="N", help="tokens that windows share (128)")
    group.add_argument("--seed", type=int, default=0, metavar="N", help="(0)")


def _add_length_drop(group: Any) -> None:
    group.add_argument("--length-drop", action="store_true", help="train sub-models that drop tokens, too")
    group.add_argument("--num-sandwich", type=int, default=2, metavar="N", help="random sub-models a step (2)")
    group.add_argument(
        "--ratio-bound", type=float, default=0.2, metavar="X", help="largest part of its tokens a layer drops (0.2)"
    )
    group.add_argument(
        "--layer-dropout", type=float, default=0.0, metavar="P", help="random sub-models leave a layer out (0)"
    )
    group.add_argument(
        "--scorers",
        default="received",
        metavar="NAMES",
        help="a sub-model draws one; NAME+question keeps the question first (received)",
    )
    group.add_argument(
        "--distillation",
        choices=("cross_entropy", "kl"),
        default="cross_entropy",
        help="sub-models learn by cross-entropy of full against sub, or KL(sub || full) (cross_entropy)",
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from dtbert.training import RunFolder, Trainer
    from dtbert.weights import load_trainable, resolve_source

    options = _options(arguments)
    schedules = {spec: parse_schedule(spec) for spec in arguments.eval_schedule}
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rank = _join(arguments.device)
    questions, dev = _read(arguments)
    device = f"cuda:{os.environ['LOCAL_RANK']}" if arguments.device == "cuda" and rank is not None else arguments.device
    source = resolve_source(arguments.model, arguments.revision)
    model = load_trainable(source, device=device, generator=torch.Generator().manual_seed(arguments.seed))
    for schedule in schedules.values():
        schedule.check_layers(model.config.num_hidden_layers)
    tokenizer_folder = source if source.is_dir() else source.parent
    data, tokenizer = _training_set(questions, tokenizer_folder, model, arguments)

    def evaluate(current: "BertForQuestionAnswering") -> Mapping[str, float]:
        return _measure(current, tokenizer, dev, schedules, arguments)

    identity = _identity(arguments, options, questions)
    if rank:
        torch.distributed.barrier()
    folder = RunFolder(Path(arguments.out), identity)
    if rank == 0:
        torch.distributed.barrier()
    trainer = Trainer(model, data, options, folder, tokenizer_folder, evaluate if dev else None)
    record = _run(trainer, arguments.quiet or bool(rank))
    if rank is not None:
        torch.distributed.destroy_process_group()
    if not rank:
        if arguments.json:
            print_json(record)
        else:
            print(_summary(record, Path(arguments.out), trainer.num_steps))
    return 0


def _options(arguments: argparse.Namespace) -> "TrainingOptions":
    from dtbert.training import LengthDrop, TrainingOptions

    length_drop = None
    if arguments.length_drop:
        scorers = tuple(name.strip() for name in arguments.scorers.split(","))
        length_drop = LengthDrop(arguments.num_sandwich, arguments.ratio_bound, arguments.layer_dropout, scorers)
    return TrainingOptions(
        epochs=arguments.epochs,
        batch_tokens=arguments.batch_tokens,
        learning_rate=arguments.learning_rate,
        warmup=arguments.warmup,
        weight_decay=arguments.weight_decay,
        max_grad_norm=arguments.max_grad_norm,
        hidden_dropout=arguments.hidden_dropout,
        attention_dropout=arguments.attention_dropout,
        seed=arguments.seed,
        length_drop=length_drop,
        distillation=arguments.distillation,
        save_every=arguments.save_every,
        eval_every=arguments.eval_every,
        bf16=arguments.bf16,
    )


def _join(device: str) -> int | None:
    """This process's rank among those that torchrun started, or None."""
    if "RANK" not in os.environ:
        return None
    import torch

    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    return int(torch.distributed.get_rank())


def _read(arguments: argparse.Namespace) -> "tuple[list[SquadQuestion], list[SquadQuestion]]":
    from dtbert.squad import read_squad

    misplaced: list[str] | None = None if arguments.strict else []
    questions = [one for file in arguments.train for one in read_squad(file, misplaced=misplaced)]
    _warn("have an answer that the context does not have at its place", misplaced or [])
    dev = [one for file in arguments.dev or [] for one in read_squad(file)]
    both = {one.id for one in questions} & {one.id for one in dev}
    if both:
        raise ValueError(f"{len(both)} questions are in --train and in --dev, such as {min(both)!r}: hold them out")
    return questions, spread(dev, arguments.eval_limit)


def _warn(what: str, found: list[str]) -> None:
    if not found:
        return
    print(f"dtbert: {len(found)} questions are left out: they {what}", file=sys.stderr)
    for line in found[:20]:
        print(f"dtbert:   {line}", file=sys.stderr)
    if len(found) > 20:
        print(f"dtbert:   and {len(found) - 20} more", file=sys.stderr)


def _training_set(
    questions: "list[SquadQuestion]", folder: Path, model: "BertForQuestionAnswering", arguments: argparse.Namespace
) -> "tuple[TrainingSet, Any]":
    from dtbert.qa import load_tokenizer
    from dtbert.training import TrainingSet

    tokenizer = load_tokenizer(folder)
    data = TrainingSet.from_questions(
        questions, tokenizer, model.config, window=arguments.window, stride=arguments.stride
    )
    if data.unusable and arguments.strict:
        raise ValueError(f"{len(data.unusable)} questions cannot be trained on, such as {data.unusable[0]}")
    _warn("cannot be trained on", data.unusable)
    return data, tokenizer


def _identity(
    arguments: argparse.Namespace, options: "TrainingOptions", questions: "list[SquadQuestion]"
) -> dict[str, Any]:
    from dtbert.training.loop import describe

    ids = hashlib.sha256("\n".join(one.id for one in questions).encode()).hexdigest()
    fields = describe(options)
    # How often a run is saved changes nothing in what it makes.
    fields.pop("save_every")
    return {
        "model": arguments.model,
        "questions": len(questions),
        "question_ids_sha256": ids,
        "window": arguments.window,
        "stride": arguments.stride,
        **fields,
    }


def _measure(
    model: "BertForQuestionAnswering",
    tokenizer: Any,
    dev: "list[SquadQuestion]",
    schedules: Mapping[str, Any],
    arguments: argparse.Namespace,
) -> dict[str, float]:
    """F1 and exact match at full length, F1 at each schedule, and their mean F1 as ``main``."""
    import torch

    from dtbert.qa import QuestionAnswerer
    from dtbert.squad import evaluate

    answerer = QuestionAnswerer(model, tokenizer, window=arguments.window, stride=arguments.stride)
    pairs = [(one.question, one.context) for one in dev]
    measured: dict[str, float] = {}
    with torch.no_grad():
        for spec, schedule in {"": None, **schedules}.items():
            answers = answerer.answer_many(pairs, schedule=schedule)
            scores = evaluate(dev, {one.id: answer.text for one, answer in zip(dev, answers, strict=True)})
            suffix = f" {spec}" if spec else ""
            measured |= {f"f1{suffix}": scores.f1, f"exact_match{suffix}": scores.exact_match}
    f1 = [value for name, value in measured.items() if name.startswith("f1")]
    return {**measured, "main": sum(f1) / len(f1)}


def _run(trainer: Any, quiet: bool) -> dict[str, Any]:
    from tqdm import tqdm

    last: dict[str, Any] = {}
    with tqdm(total=trainer.num_steps, unit="step", disable=quiet or None) as bar:

        def report(record: dict[str, Any]) -> None:
            last.update(record)
            # A run that goes on starts past the first step.
            bar.update(record["step"] - bar.n)
            rate = record["tokens"] / record["seconds"]
            bar.set_postfix({"loss": f"{record['loss']:.3f}", "tokens/s": f"{rate:,.0f}"}, refresh=False)
            if "f1" in record:
                measured = [f"{name} {value:.2f}" for name, value in record.items() if name.startswith("f1")]
                bar.write(f"step {record['step']}: {', '.join(measured)}", file=sys.stderr)

        trainer.run(report)
    return last


def _summary(record: dict[str, Any], out: Path, num_steps: int) -> str:
    lines = [f"trained {num_steps:,} steps; models in {out}/last" + (f" and {out}/best" if "f1" in record else "")]
    lines += [f"  {name:<12} {record[name]:8.2f}" for name in record if name.startswith(("f1", "exact_match"))]
    return "\n".join(lines)
