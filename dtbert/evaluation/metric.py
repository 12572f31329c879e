"""The official metric of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, section 6.1; 2018): exact match and F1."""

import re
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dtbert.evaluation.reader import SquadQuestion

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


class Score(NamedTuple):
    """How well one prediction meets a question's answers, each from 0 to 1."""

    exact_match: float
    f1: float


@dataclass(frozen=True)
class Evaluation:
    """The metric over a data set: means in percent, and each question's part.

    Attributes:
        exact_match: percent of the questions.
        f1: percent, mean over the questions.
        per_question: by id, in the data set's order; a question without a prediction has 0.
        missing: ids without a prediction.
    """

    exact_match: float
    f1: float
    per_question: dict[str, Score]
    missing: tuple[str, ...]


def normalize_answer(text: str) -> str:
    """The text as the metric compares it: lower case, without ASCII punctuation and articles, single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_DROP_PUNCTUATION)).split())


def exact_match(prediction: str, answer: str) -> float:
    """1 if both texts are the same once normalised, else 0."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of precision and recall over the words of the normalised texts, each as often as it occurs."""
    predicted, expected = normalize_answer(prediction).split(), normalize_answer(answer).split()
    common = (Counter(predicted) & Counter(expected)).total()
    # Two texts without words have nothing in common: 0, as the official script counts.
    return 2 * common / (len(predicted) + len(expected)) if common else 0.0


def score_prediction(prediction: str, answers: Sequence[str]) -> Score:
    """The best exact match and the best F1 over the accepted answers, each on its own.

    Where there are no answers, the right prediction is one without words, as SQuAD 2.0 counts.
    """
    if not answers:
        nothing = float(not normalize_answer(prediction))
        return Score(nothing, nothing)
    return Score(
        max(exact_match(prediction, answer) for answer in answers), max(f1(prediction, answer) for answer in answers)
    )


def evaluate(questions: Iterable[SquadQuestion], predictions: Mapping[str, str]) -> Evaluation:
    """Score predictions for a data set.

    Args:
        questions: of `read_squad`.
        predictions: the text of the answer by question id. A question without one counts as 0; predictions for other
            ids are not looked at.

    Raises:
        ValueError: there are no questions.
    """
    per_question, missing = {}, []
    for question in questions:
        if question.id in predictions:
            answers = [answer.text for answer in question.answers]
            per_question[question.id] = score_prediction(predictions[question.id], answers)
        else:
            per_question[question.id] = Score(0.0, 0.0)
            missing.append(question.id)
    if not per_question:
        raise ValueError("questions is empty: there is nothing to score")
    scores, count = per_question.values(), len(per_question)
    return Evaluation(
        100 * sum(score.exact_match for score in scores) / count,
        100 * sum(score.f1 for score in scores) / count,
        per_question,
        tuple(missing),
    )
