"""`dtbert train`: a span head on any BERT, with LengthDrop, and with a teacher."""

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dtbert.cli.evaluate import spread
from dtbert.cli.options import SCHEDULE_HELP, describe_schedule, parse_schedule, positive
from dtbert.cli.output import print_json
from dtbert.cli.processes import agree, joined
from dtbert.files import text_sha256

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dtbert.model import BertConfig, BertForQuestionAnswering
    from dtbert.squad import SquadQuestion
    from dtbert.training import HeldOut, RunFolder, Teacher, Trainer, TrainingOptions, TrainingSet

SUMMARY = "train a model on SQuAD files, to answer with fewer tokens too"
DESCRIPTION = """\
Train a BERT, an encoder alone or one with a span head, on questions in SQuAD
1.1's format. With --length-drop it also learns to answer when tokens are
dropped between its layers; with --teacher it learns from a larger BERT.

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

{SCHEDULE_HELP}"""

# Options that say nothing without another one, and what they are by default.
_LENGTH_DROP = {
    "num_sandwich": 2,
    "ratio_bound": "0.2",
    "layer_dropout": 0.0,
    "scorers": "received",
    "answer_loss": 0.0,
    "sub_model_loss": "cross_entropy",
}
_TEACHER = {
    "teacher_revision": None,
    "distill": "prediction",
    "temperature": 1.0,
    "hard_label_weight": 0.0,
    "match_attention": "probabilities",
}
_DEV: dict[str, Any] = {"eval_every": 0, "eval_limit": None, "eval_schedule": []}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="SOURCE", required=True, help="where to start: a hub id, a folder or a file")
    parser.add_argument("--revision", metavar="R", help="branch, tag or commit of a hub id")
    files: dict[str, Any] = {"metavar": "FILE", "nargs": "+", "action": "extend"}
    parser.add_argument("--train", **files, required=True, help="questions, .json or .json.gz")
    parser.add_argument("--dev", **files, help="held-out questions, which decide what is best")
    parser.add_argument("--out", metavar="OUT", required=True, help="the run's folder")
    _add_optimisation(parser.add_argument_group("optimisation"))
    _add_length_drop(parser.add_argument_group("length drop"))
    _add_teacher(parser.add_argument_group("teacher"))
    group = parser.add_argument_group("evaluation and checkpoints")
    group.add_argument("--eval-every", type=int, metavar="N", help="steps (default: each epoch)")
    group.add_argument("--eval-limit", type=positive, metavar="N", help="N held-out questions, evenly spread")
    group.add_argument(
        "--eval-schedule",
        metavar="SPEC",
        action="append",
        help="also measure with tokens dropped; best is by the mean F1; may be repeated",
    )
    group.add_argument("--save-every", type=positive, default=100, metavar="N", help="steps between checkpoints (100)")
    group = parser.add_argument_group("machine and output")
    group.add_argument("--device", metavar="D", default="cpu", help="cpu, cuda, ... (default: cpu)")
    group.add_argument("--threads", type=positive, metavar="N", help="CPU threads (default: torch's choice)")
    group.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    group.add_argument("--strict", action="store_true", help="stop at questions that cannot be trained on")
    group.add_argument("--quiet", action="store_true", help="no progress bar (there is none outside a terminal)")
    group.add_argument("--json", action="store_true", help="print the last record as one JSON object")


def _add_optimisation(group: Any) -> None:
    group.add_argument("--epochs", type=float, default=2.0, metavar="X", help="passes over the data, 0.5: half (2)")
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
    group.add_argument("--num-sandwich", type=int, metavar="N", help="random sub-models a step (2)")
    group.add_argument(
        "--ratio-bound", metavar="X", help="most of its tokens that a layer drops; or one for each, A,B,... (0.2)"
    )
    group.add_argument("--layer-dropout", type=float, metavar="P", help="random sub-models leave a layer out (0)")
    group.add_argument(
        "--scorers", metavar="A,B", help="a sub-model draws one; NAME+question keeps the question first (received)"
    )
    group.add_argument(
        "--answer-loss",
        type=float,
        metavar="X",
        help="teach the span head to read every layer's states, with this weight, for answer and answer_overlap (0)",
    )
    group.add_argument(
        "--sub-model-loss",
        choices=("cross_entropy", "kl"),
        help="sub-models learn by cross-entropy of full against sub, or KL(sub || full) (cross_entropy)",
    )


def _add_teacher(group: Any) -> None:
    group.add_argument("--teacher", metavar="SOURCE", help="a BERT with a span head, of the same vocabulary")
    group.add_argument("--teacher-revision", metavar="R", help="branch, tag or commit of a hub id")
    group.add_argument(
        "--distill",
        choices=("intermediate", "prediction"),
        help="learn its hidden states and attention, or its predictions (prediction)",
    )
    group.add_argument("--temperature", type=float, metavar="X", help="of the predictions (1)")
    group.add_argument("--hard-label-weight", type=float, metavar="X", help="of the data's own labels (0)")
    group.add_argument(
        "--match-attention",
        choices=("probabilities", "scores"),
        help="intermediate: attention after the softmax, or before it as TinyBERT's code (probabilities)",
    )


def run(arguments: argparse.Namespace) -> int:
    from dtbert.training import Trainer

    with joined(arguments.device) as rank:
        parts = agree(lambda: _prepare(arguments, rank))
        trainer = Trainer(*parts)
        trained = _train(trainer, arguments, rank)
    if parts.folder is None:
        return 0
    record = parts.folder.last_record()
    if arguments.json:
        print_json(record)
    else:
        print(_summary(record, Path(arguments.out), trainer.num_steps, trained))
    return 0


def _options(arguments: argparse.Namespace) -> "TrainingOptions":
    from dtbert.training import Distillation, LengthDrop, TrainingOptions

    length_drop = distillation = None
    dropping = _dependent(arguments, _LENGTH_DROP, "--length-drop", arguments.length_drop)
    teacher = _dependent(arguments, _TEACHER, "--teacher", arguments.teacher is not None)
    held_out = _dependent(arguments, _DEV, "--dev", arguments.dev is not None)
    if arguments.length_drop:
        scorers = tuple(name.strip() for name in dropping["scorers"].split(","))
        length_drop = LengthDrop(
            num_sandwich=dropping["num_sandwich"],
            ratio_bound=_ratio_bound(dropping["ratio_bound"]),
            layer_dropout=dropping["layer_dropout"],
            scorers=scorers,
            answer_loss=dropping["answer_loss"],
        )
    if arguments.teacher is not None:
        _check_kind(arguments, teacher["distill"])
        names = ("distill", "temperature", "hard_label_weight", "match_attention")
        distillation = Distillation(*(teacher[name] for name in names))
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
        sub_model_loss=dropping["sub_model_loss"],
        distillation=distillation,
        save_every=arguments.save_every,
        eval_every=held_out["eval_every"],
        bf16=arguments.bf16,
    )


def _ratio_bound(spec: str) -> float | tuple[float, ...]:
    try:
        bounds = tuple(float(part) for part in spec.split(","))
    except ValueError:
        raise ValueError(f"--ratio-bound must be a number or one for each layer, A,B,..., not {spec!r}") from None
    return bounds if len(bounds) > 1 else bounds[0]


def _dependent(
    arguments: argparse.Namespace, defaults: Mapping[str, Any], needed: str, is_given: bool
) -> dict[str, Any]:
    """The values of options that mean something only together with another one."""
    given = [name for name in defaults if getattr(arguments, name) is not None]
    if given and not is_given:
        raise ValueError(f"--{given[0].replace('_', '-')} needs {needed}")
    return {name: getattr(arguments, name) if name in given else default for name, default in defaults.items()}


def _check_kind(arguments: argparse.Namespace, kind: str) -> None:
    other = {"prediction": "match_attention", "intermediate": "temperature"}[kind]
    if getattr(arguments, other) is not None:
        raise ValueError(f"--{other.replace('_', '-')} has no part in --distill {kind}: leave it out")


class _Parts(NamedTuple):
    """What a `Trainer` takes, in its order."""

    model: "BertForQuestionAnswering"
    data: "TrainingSet"
    options: "TrainingOptions"
    folder: "RunFolder | None"
    tokenizer_folder: Path
    evaluate: "HeldOut | None"
    teacher: "Teacher | None"


def _prepare(arguments: argparse.Namespace, rank: int) -> _Parts:
    """All that a run needs, checked before it starts; the first process alone writes and warns."""
    import torch

    from dtbert.qa import QuestionAnswerer, load_tokenizer
    from dtbert.training import HeldOut, RunFolder, TrainingSet
    from dtbert.weights import load_trainable, model_folder, resolve_source

    options = _options(arguments)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    schedules = {}
    for spec in arguments.eval_schedule or []:
        schedule = parse_schedule(spec, "--eval-schedule")
        schedules[describe_schedule(schedule)] = schedule
    questions, misplaced = _read(arguments.train, None if arguments.strict else [])
    dev, dev_misplaced = _read(arguments.dev or [], None if arguments.strict else [])
    for files, found, left_out in ((arguments.train, questions, misplaced), (arguments.dev, dev, dev_misplaced)):
        if left_out and not found:
            raise ValueError(
                f"{', '.join(files)}: all {len(left_out)} questions have an answer that the context does not have at "
                f"its place, such as {left_out[0]}"
            )
    both = {one.id for one in questions} & {one.id for one in dev}
    if both:
        raise ValueError(f"{len(both)} questions are in --train and in --dev, such as {min(both)!r}: hold them out")
    source = resolve_source(arguments.model, arguments.revision)
    generator = torch.Generator().manual_seed(options.seed)
    model = load_trainable(source, device=arguments.device, generator=generator)
    if options.length_drop is not None:
        options.length_drop.bounds(model.config.num_hidden_layers)
    tokenizer_folder = model_folder(source)
    tokenizer = load_tokenizer(tokenizer_folder)
    size = {"window": arguments.window, "stride": arguments.stride}
    data = TrainingSet.from_questions(questions, tokenizer, model.config, **size)
    if data.unusable and arguments.strict:
        raise ValueError(f"{len(data.unusable)} questions cannot be trained on, such as {data.unusable[0]}")
    data.check_fits(options.batch_tokens)
    held_out = None
    if dev:
        answerer = QuestionAnswerer(model, tokenizer, **size)
        held_out = HeldOut(answerer, spread(dev, arguments.eval_limit), schedules)
    teacher = _teacher(arguments, options, model.config, tokenizer)
    folder = None
    if rank == 0:
        _warn("are left out: they have an answer that the context does not have at its place", misplaced)
        _warn("of --dev are left out: they have an answer that the context does not have at its place", dev_misplaced)
        _warn("are left out: they cannot be trained on", data.unusable)
        _warn("of --dev count as wrong: they cannot be answered", held_out.unanswerable if held_out else [])
        run = _identity(arguments, options)
        run |= {"train_sha256": text_sha256(repr(questions)), "dev_sha256": text_sha256(repr(dev))}
        run["eval_schedule"] = [schedule.to_dict() for schedule in schedules.values()]
        run["model_sha256"] = _weights_digest(model)
        run["teacher_sha256"] = None if teacher is None else _weights_digest(teacher.model)
        folder = RunFolder(Path(arguments.out), run)
    return _Parts(model, data, options, folder, tokenizer_folder, held_out, teacher)


def _read(files: Sequence[str], misplaced: list[str] | None) -> "tuple[list[SquadQuestion], list[str]]":
    """The questions of all files; those with an answer out of place are listed, or an error without a list."""
    from dtbert.squad import read_squad

    found: dict[str, SquadQuestion] = {}
    for file in files:
        for one in read_squad(file, misplaced=misplaced):
            if one.id in found:
                raise ValueError(f"{file}: the question {one.id!r} is in a file before it, too: give each file once")
            found[one.id] = one
    return list(found.values()), misplaced or []


def _warn(what: str, found: list[str]) -> None:
    if not found:
        return
    print(f"dtbert: {len(found)} questions {what}", file=sys.stderr)
    for line in found[:20]:
        print(f"dtbert:   {line}", file=sys.stderr)
    if len(found) > 20:
        print(f"dtbert:   and {len(found) - 20} more", file=sys.stderr)


def _teacher(
    arguments: argparse.Namespace, options: "TrainingOptions", student: "BertConfig", tokenizer: "Tokenizer"
) -> "Teacher | None":
    if options.distillation is None:
        return None
    from dtbert.qa import load_tokenizer
    from dtbert.training import Teacher
    from dtbert.weights import load_model, model_folder, resolve_source

    source = resolve_source(arguments.teacher, arguments.teacher_revision)
    # Its tokens must be the student's, one by one.
    own, other = (one.get_vocab(with_added_tokens=True) for one in (tokenizer, load_tokenizer(model_folder(source))))
    if own != other:
        differing = min(token for token, _ in own.items() ^ other.items())
        raise ValueError(
            f"the teacher's vocabulary is not the student's: they differ in {differing!r}, id {own.get(differing)} in "
            f"the student's and {other.get(differing)} in the teacher's; choose a teacher with the same vocab.txt"
        )
    model = load_model(source, device=arguments.device, backend="reference")
    if model.config.max_position_embeddings < arguments.window:
        raise ValueError(
            f"the teacher has {model.config.max_position_embeddings} positions, a window {arguments.window} tokens: "
            "give a smaller --window"
        )
    return Teacher(model, options.distillation, student)


def _identity(arguments: argparse.Namespace, options: "TrainingOptions") -> dict[str, Any]:
    """What a run's folder is compared by: all options that have a part in what the run makes."""
    names = ("model", "revision", "teacher", "teacher_revision", "window", "stride", "eval_limit")
    fields = {**{name: getattr(arguments, name) for name in names}, **options.to_dict()}
    # How often a run is saved changes nothing in what it makes.
    del fields["save_every"]
    return fields


def _weights_digest(model: "BertForQuestionAnswering") -> str:
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

    if rank == 0 and 0 < trainer.step < trainer.num_steps:
        print(f"dtbert: going on after step {trainer.step} of {trainer.num_steps}", file=sys.stderr)
    hide = True if arguments.quiet or rank else None
    with tqdm(total=trainer.num_steps, initial=trainer.step, unit="step", disable=hide) as bar:

        def report(record: dict[str, Any]) -> None:
            loss, rate = f"{record['loss']:.3f}", f"{record['tokens'] / record['seconds']:,.0f}"
            bar.set_postfix({"loss": loss, "tokens/s": rate}, refresh=False)
            bar.update()
            step = record["step"]
            if bar.disable and not hide and step % arguments.save_every == 0:  # outside a terminal
                print(f"step {step:,} of {trainer.num_steps:,}: loss {loss}, {rate} tokens/s", file=sys.stderr)
            if "f1" in record:
                measured = [f"{name} {value:.2f}" for name, value in record.items() if name.startswith("f1")]
                bar.write(f"step {step}: {', '.join(measured)}", file=sys.stderr)

        try:
            return trainer.run(report)
        except torch.OutOfMemoryError as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"a step of {arguments.batch_tokens} tokens: {reason}; give fewer --batch-tokens"
            ) from error


def _summary(record: dict[str, Any], out: Path, num_steps: int, trained: bool) -> str:
    models = f"{out / 'last'}" + (f" and {out / 'best'}" if "f1" in record else "")
    if trained:
        lines = [f"trained {num_steps:,} steps; models in {models}"]
    else:
        lines = [f"nothing to do: this run of {num_steps:,} steps has ended; models in {models}"]
    measured = [name for name in record if name.startswith(("f1", "exact_match"))]
    width = max(map(len, measured), default=0)
    lines += [f"  {name:<{width}} {record[name]:8.2f}" for name in measured]
    return "\n".join(lines)
