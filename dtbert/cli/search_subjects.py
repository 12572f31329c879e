"""What `dtbert search` searches on: a model with questions, or with labelled texts; and thresholds to start from."""

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dtbert.cli.options import holds_many, load_answerer, parse_schedule, placement
from dtbert.cli.tasks import check_task_options, load_text_model, read_texts

if TYPE_CHECKING:
    from dtbert.evaluation import SquadQuestion
    from dtbert.model import Policy
    from dtbert.model.bert import Bert
    from dtbert.search import Evaluator, KeepQuestion, Search

SCORERS = "received,cls,from_question,value_norm,answer,answer_overlap"
TEXT_SCORERS = "received,cls,value_norm"

_KEEP_QUESTION = {"yes": (True,), "no": (False,), "both": (False, True)}


def keep_question(text: str) -> str:
    """The text of ``--keep-question``, checked as far as it can be before the model's layers are known."""
    if any(part not in _KEEP_QUESTION and not part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(
            f"expected yes, no, both, or in how many of the first layers, or several such as 3,4,yes, not {text!r}"
        )
    return text


def kept_questions(text: str, num_layers: int) -> "tuple[KeepQuestion, ...]":
    """The choices of `keep_question`'s text, for a model; ValueError where it has fewer layers."""
    from dtbert.model.policy import in_first_layers

    found: list[KeepQuestion] = []
    for part in text.split(","):
        if part in _KEEP_QUESTION:
            found += _KEEP_QUESTION[part]
        elif 0 < (first := int(part)) < num_layers:
            found.append(in_first_layers(first, num_layers))
        else:
            raise ValueError(f"--keep-question {text}: {part} of {num_layers} layers; expected 1 to {num_layers - 1}")
    return tuple(dict.fromkeys(found))


class Subject(NamedTuple):
    """What is searched on: a model and its questions or texts, in search order, and what a study is named by."""

    model: "Bert"
    questions: list[Any]
    evaluator: "Callable[[], Evaluator]"
    about: dict[str, Any]
    scorers: str
    keep_question: str


def questions_of(arguments: argparse.Namespace) -> Subject:
    from dtbert.evaluation import read_squad
    from dtbert.search import QuestionEvaluator, in_search_order

    questions = in_search_order(read_squad(arguments.file))[: arguments.limit]
    answerer = load_answerer(arguments, with_schedules=False)
    evaluator = partial(QuestionEvaluator, answerer, questions)
    return Subject(answerer.model, questions, evaluator, {"window": answerer.window}, SCORERS, "both")


def texts_of(arguments: argparse.Namespace) -> Subject:
    from dtbert.evaluation import PreparedTexts
    from dtbert.search import TextEvaluator, in_search_order
    from dtbert.text import TextClassifier

    check_task_options(arguments)
    if arguments.published is not None:
        raise ValueError("--published is of answers to questions: it has no part in --task")
    if arguments.learn:
        raise ValueError("--learn learns of the full model's answers to questions: it has no part in --task")
    model = load_text_model(arguments, with_schedules=False)
    if not isinstance(model, TextClassifier):
        raise ValueError("--task searches the schedules of a classifier: train one with `dtbert train --task`")
    data = read_texts([arguments.file], arguments.task, model.labels)
    texts = PreparedTexts(model, data._replace(examples=in_search_order(data.examples)[: arguments.limit]))
    keep = "no" if texts.data.examples[0].pair is None else "both"
    about = {"task": arguments.task}
    return Subject(model.model, texts.data.examples, partial(TextEvaluator, texts), about, TEXT_SCORERS, keep)


def learnt(arguments: argparse.Namespace, search: "Search", questions: "list[SquadQuestion]") -> "list[Policy]":
    """Thresholds that the model learns on the questions, once a study, for each scorer and each weight."""
    from dtbert.model import PackedBatch, Policy, Threshold
    from dtbert.search import QuestionEvaluator, ThresholdSpace, drops_by
    from dtbert.training.learnt_thresholds import ThresholdLearning, learn_thresholds
    from dtbert.weights import load_model

    evaluator = search.evaluator
    (space,) = (one for one in search.space.parts if isinstance(one, ThresholdSpace))
    assert isinstance(evaluator, QuestionEvaluator)
    # Gradients need the plain steps, and weights that are laid out for no processor.
    model = load_model(**{**placement(arguments), "dtype": None}, source=arguments.model, backend="reference")
    windows = [
        PackedBatch.from_lists([window.input_ids], [window.token_type_ids], model.device)
        for one in questions
        for window in evaluator.answerer.windows(one.question, one.context)
    ]
    found: list[Policy] = []
    for scorer, keep, weight in product(space.scorers, space.keep_question, arguments.learn):
        key = f"learnt {scorer} {keep} {weight:g}"
        if key not in search.study.user_attrs:
            start = Threshold((0.0,) * space.num_layers, **drops_by(scorer, keep))
            thresholds = learn_thresholds(model, windows, start, ThresholdLearning(weight))
            search.study.set_user_attr(key, space.nearest(thresholds).to_dict())
        found.append(Policy.from_dict(search.study.user_attrs[key]))
    return found


def starts_of(specs: list[str]) -> "list[Policy]":
    """The schedules that ``--start`` names."""
    from dtbert.qa import read_schedules

    schedules = []
    for spec in specs:
        if spec.endswith(".json") and holds_many(Path(spec).read_text("utf-8")):
            schedules += [entry.schedule for entry in read_schedules(spec).schedules if entry.schedule is not None]
        else:
            schedules.append(parse_schedule(spec, "--start"))
    return schedules
