"""What `dtbert search` searches on: a model with questions, or with labelled texts."""

import argparse
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from dtbert.cli.options import load_answerer
from dtbert.cli.tasks import check_task_options, load_text_model, read_texts

if TYPE_CHECKING:
    from dtbert.model.bert import Bert
    from dtbert.search import Evaluator

SCORERS = "received,cls,from_question,value_norm,answer,answer_overlap"
TEXT_SCORERS = "received,cls,value_norm"


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
    model = load_text_model(arguments, with_schedules=False)
    if not isinstance(model, TextClassifier):
        raise ValueError("--task searches the schedules of a classifier: train one with `dtbert train --task`")
    data = read_texts([arguments.file], arguments.task, model.labels)
    texts = PreparedTexts(model, data._replace(examples=in_search_order(data.examples)[: arguments.limit]))
    keep = "no" if texts.data.examples[0].pair is None else "both"
    about = {"task": arguments.task}
    return Subject(model.model, texts.data.examples, partial(TextEvaluator, texts), about, TEXT_SCORERS, keep)
