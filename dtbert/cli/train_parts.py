"""What `dtbert train` makes a trainer of: model, data, what measures it, and a teacher; of questions, or of texts."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dtbert.cli.options import describe_schedule, resolved
from dtbert.cli.output import printable
from dtbert.cli.tasks import check_task_options, read_texts, warn
from dtbert.files import naming, text_sha256
from dtbert.training import TrainingOptions

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from dtbert.evaluation import SquadQuestion
    from dtbert.model import BertConfig, BertForQuestionAnswering, BertForSequenceClassification, Policy
    from dtbert.training.data import TrainingData
    from dtbert.training.distillation import SpanTeacher, TextTeacher
    from dtbert.training.loop import Measure


class TrainerParts(NamedTuple):
    """What a trainer is made of, beside its options, and what the run is known by."""

    model: "BertForQuestionAnswering | BertForSequenceClassification"
    data: "TrainingData"
    schedules: "Mapping[str, Policy]"
    evaluate: "Measure | None"
    teacher: "SpanTeacher | TextTeacher | None"
    known_by: dict[str, str]


def _eval_schedules(
    parsed: "Sequence[Policy]", options: TrainingOptions, config: "BertConfig", rank: int
) -> "Mapping[str, Policy]":
    """The schedules that the model is measured with, by their names; ValueError where one is for other layers."""
    if options.length_drop is not None:
        options.length_drop.bounds(config.num_hidden_layers)
    for schedule in parsed:
        schedule.check_layers(config.num_hidden_layers)
    return {describe_schedule(one): one for one in resolved(parsed, config.own_scorer, quiet=rank > 0)}


def _own_scorer(options: TrainingOptions, source: Path, config: "BertConfig") -> dict[str, Any]:
    """What the models of the run will drop by where a schedule names no scorer, as fields of their config.

    The one that they learn by; where they learn by none, or by several, that of the model they start from, or none.
    """
    from dtbert.qa.budgets import schedules_of
    from dtbert.training.length_drop import scorer_and_layers

    if options.length_drop is None:
        front = schedules_of(source, config.num_hidden_layers)
        return {} if front is None or front.own_scorer is None else front.own_scorer._asdict()
    learnt = {scorer_and_layers(name) for name in options.length_drop.scorers}
    scorer, layers = learnt.pop() if len(learnt) == 1 else (None, 0)
    return {"scorer": scorer, "keep_question": layers != 0}


def question_parts(
    arguments: argparse.Namespace,
    options: TrainingOptions,
    source: Path,
    parsed: "Sequence[Policy]",
    rank: int,
) -> TrainerParts:
    import torch

    from dtbert.evaluation import PreparedQuestions, evenly_spaced
    from dtbert.qa import QuestionAnswerer, load_tokenizer
    from dtbert.training.data import TrainingSet
    from dtbert.training.evaluation import held_out_scores
    from dtbert.weights import load_trainable, model_folder

    train, dev = (_read(files or []) for files in (arguments.train, arguments.dev))
    both = {one.id for one in train} & {one.id for one in dev}
    if both:
        raise ValueError(f"{len(both)} questions are in --train and in --dev, such as {min(both)!r}: hold them out")
    generator = torch.Generator().manual_seed(options.seed)
    model = load_trainable(source, device=arguments.device, generator=generator)
    model.config = replace(model.config, **_own_scorer(options, source, model.config))
    schedules = _eval_schedules(parsed, options, model.config, rank)
    tokenizer = load_tokenizer(model_folder(source))
    size = {"window": arguments.window, "stride": arguments.stride}
    data = TrainingSet.from_questions(train, tokenizer, model.config, **size)
    if data.unusable and arguments.strict:
        raise ValueError(f"{len(data.unusable)} questions cannot be trained on, such as {data.unusable[0]}")
    data.check_fits(options.batch_tokens)
    held_out = evaluate = None
    if dev:
        answerer = QuestionAnswerer(model, tokenizer, **size)
        held_out = PreparedQuestions(answerer, evenly_spaced(dev, arguments.eval_limit))
        evaluate = partial(held_out_scores, held_out, schedules)
    teacher = _span_teacher(arguments, options, model.config, tokenizer)
    if rank == 0:
        _warn_of_all(data.unusable, held_out.unreadable if held_out else {})
    known_by = {"train_sha256": text_sha256(repr(train)), "dev_sha256": text_sha256(repr(dev))}
    return TrainerParts(model, data, schedules, evaluate, teacher, known_by)


def text_parts(
    arguments: argparse.Namespace,
    options: TrainingOptions,
    source: Path,
    parsed: "Sequence[Policy]",
    rank: int,
) -> TrainerParts:
    import torch

    from dtbert.evaluation import PreparedTexts
    from dtbert.model import LengthSchedule
    from dtbert.model.scorers import scorer_named
    from dtbert.qa import load_tokenizer
    from dtbert.text import TextClassifier
    from dtbert.training.evaluation import held_out_text_scores
    from dtbert.training.texts import TextTrainingSet
    from dtbert.weights import load_trainable_classifier, model_folder

    check_task_options(arguments)
    if options.length_drop is not None and options.length_drop.answer_loss:
        raise ValueError("--answer-loss is of a span head: it has no part in --task")
    train = read_texts(arguments.train, arguments.task, None)
    dev = read_texts(arguments.dev, arguments.task, train.labels, arguments.eval_limit) if arguments.dev else None
    generator = torch.Generator().manual_seed(options.seed)
    labels = train.labels or ("LABEL_0",)
    model = load_trainable_classifier(source, labels, device=arguments.device, generator=generator)
    model.config = replace(model.config, **_own_scorer(options, source, model.config))
    own = LengthSchedule.ratios([1] * model.config.num_hidden_layers).resolve(model.config.own_scorer)
    if any(scorer_named(name).needs_span_head for name in own.scorers):
        model.config = replace(model.config, scorer=None, keep_question=False)
    schedules = _eval_schedules(parsed, options, model.config, rank)
    classifier = TextClassifier(model, load_tokenizer(model_folder(source)))
    data = TextTrainingSet.from_texts(train, classifier.reader, model.labels)
    if (train.damaged or data.unusable) and arguments.strict:
        unusable = [*train.damaged, *data.unusable]
        raise ValueError(f"{len(unusable)} texts cannot be trained on, such as {unusable[0]}")
    data.check_fits(options.batch_tokens)
    teacher = _text_teacher(arguments, options, model, classifier.tokenizer, max(data.lengths))
    evaluate = None
    if dev is not None:
        held_out = PreparedTexts(classifier, dev)
        evaluate = partial(held_out_text_scores, held_out, schedules)
    if rank == 0:
        warn("--train", "left out: they cannot be trained on", data.unusable)
        unreadable = held_out.unreadable if dev is not None else {}
        warn("--dev", "counted as wrong", [f"line {one}: {why}" for one, why in unreadable.items()])
    known_by = {"train_sha256": text_sha256(repr(train)), "dev_sha256": text_sha256(repr(dev))}
    return TrainerParts(model, data, schedules, evaluate, teacher, known_by)


def _read(files: Sequence[str]) -> "list[SquadQuestion]":
    """The questions of all files."""
    from dtbert.evaluation import read_squad

    found: dict[str, SquadQuestion] = {}
    for file in files:
        for one in read_squad(file):
            if one.id in found:
                raise ValueError(f"{file}: the question {one.id!r} is in a file before it, too: give each file once")
            found[one.id] = one
    return list(found.values())


def _warn_of_all(unusable: list[str], unreadable: dict[str, str]) -> None:
    for what, found in (
        ("are left out: they cannot be trained on", unusable),
        ("of --dev count as wrong: they cannot be answered", [f"{one}: {why}" for one, why in unreadable.items()]),
    ):
        lines = [f"{len(found)} questions {what}", *(f"  {line}" for line in found[:20])] if found else []
        for line in [*lines, f"  and {len(found) - 20} more"] if len(found) > 20 else lines:
            print(printable(f"dtbert: {line}"), file=sys.stderr)


def _span_teacher(
    arguments: argparse.Namespace, options: TrainingOptions, student: "BertConfig", tokenizer: "Tokenizer"
) -> "SpanTeacher | None":
    if options.distillation is None:
        return None
    from dtbert.training.distillation import SpanTeacher
    from dtbert.weights import load_model

    model = load_model(_teacher_source(arguments, tokenizer), device=arguments.device, backend="reference")
    _check_positions(model.config, f"a window {arguments.window}", arguments.window, "a smaller --window")
    return SpanTeacher(model, options.distillation, student)


def _text_teacher(
    arguments: argparse.Namespace,
    options: TrainingOptions,
    student: "BertForSequenceClassification",
    tokenizer: "Tokenizer",
    longest: int,
) -> "TextTeacher | None":
    if options.distillation is None:
        return None
    from dtbert.training.distillation import TextTeacher
    from dtbert.weights import load_classifier

    model = load_classifier(_teacher_source(arguments, tokenizer), device=arguments.device, backend="reference")
    _check_positions(model.config, f"the longest text {longest}", longest, "shorter texts, or another teacher")
    with naming(f"--teacher {arguments.teacher}"):
        if model.config.type_vocab_size < student.config.type_vocab_size:
            raise ValueError("it has 1 segment, the student 2: choose one that was trained on pairs, too")
        return TextTeacher(model, options.distillation, student)


def _check_positions(teacher: "BertConfig", what: str, tokens: int, advice: str) -> None:
    if teacher.max_position_embeddings < tokens:
        raise ValueError(f"the teacher has {teacher.max_position_embeddings} positions, {what} tokens: give {advice}")


def _teacher_source(arguments: argparse.Namespace, tokenizer: "Tokenizer") -> Path:
    """Where the teacher is; ValueError where its tokens are not the student's, one by one."""
    from dtbert.qa import load_tokenizer
    from dtbert.weights import model_folder, resolve_source

    source = resolve_source(arguments.teacher, arguments.teacher_revision)
    own, other = (one.get_vocab(with_added_tokens=True) for one in (tokenizer, load_tokenizer(model_folder(source))))
    if own != other:
        differing = min(token for token, _ in own.items() ^ other.items())
        raise ValueError(
            f"the teacher's vocabulary is not the student's: they differ in {differing!r}, id {own.get(differing)} in "
            f"the student's and {other.get(differing)} in the teacher's; choose a teacher with the same vocab.txt"
        )
    return source
