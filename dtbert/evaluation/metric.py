"""The official metric of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, section 6.1; 2018): exact match and F1."""

import math
import re
import string
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

from dtbert.evaluation.reader import SquadQuestion

_DROP_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")

Measure = Literal["exact_match", "f1"]


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
        has_answer, no_answer: the means over the questions that have answers, and over those that have none, in
            percent; None where there are no such questions.
    """

    exact_match: float
    f1: float
    per_question: dict[str, Score]
    missing: tuple[str, ...]
    has_answer: Score | None = None
    no_answer: Score | None = None


class BestThreshold(NamedTuple):
    """The threshold of `dtbert.Answer.margin` below which "no answer" scores best, and the mean in percent."""

    score: float
    threshold: float


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
    parts: dict[bool, list[Score]] = {True: [], False: []}
    for question, answers in _with_answers(questions):
        if question.id in predictions:
            per_question[question.id] = score_prediction(predictions[question.id], answers)
        else:
            per_question[question.id] = Score(0.0, 0.0)
            missing.append(question.id)
        parts[question.is_impossible].append(per_question[question.id])
    means = _mean(per_question.values())
    if means is None:
        raise ValueError("questions is empty: there is nothing to score")
    return Evaluation(*means, per_question, tuple(missing), _mean(parts[False]), _mean(parts[True]))


def _with_answers(questions: Iterable[SquadQuestion]) -> Iterator[tuple[SquadQuestion, list[str]]]:
    """Each question and the texts of its answers; as SQuAD 2.0's script counts, those with words, if one has none."""
    questions = list(questions)
    second = any(question.is_impossible for question in questions)
    for question in questions:
        yield question, [text for text, _ in question.answers if not second or normalize_answer(text)]


def _mean(scores: Collection[Score]) -> Score | None:
    if not scores:
        return None
    return Score(*(100 * sum(values) / len(scores) for values in zip(*scores, strict=True)))


def best_threshold(
    questions: Iterable[SquadQuestion],
    predictions: Mapping[str, str],
    margins: Mapping[str, float],
    measure: Measure = "f1",
) -> BestThreshold:
    """The threshold with the best mean, as SQuAD 2.0's official script looks for it.

    A question whose prediction has a margin below the threshold counts as answered with "no answer".

    Args:
        questions: of `read_squad`.
        predictions: the best span of each question, whatever its margin. A question without one counts as not answered.
        margins: of each prediction.
        measure: what shall be best.

    Raises:
        ValueError: there are no questions.
    """
    changes: list[tuple[float, float]] = []
    count, answered_by_nothing = 0, 0.0
    for question, answers in _with_answers(questions):
        count += 1
        nothing = getattr(score_prediction("", answers), measure)
        answered_by_nothing += nothing
        if question.id in predictions:
            score = getattr(score_prediction(predictions[question.id], answers), measure)
            changes.append((margins[question.id], score - nothing))
    if not count:
        raise ValueError("questions is empty: there is nothing to score")
    changes.sort(reverse=True)
    # Above all margins: no question is answered.
    best = current = answered_by_nothing
    threshold = math.nextafter(changes[0][0], math.inf) if changes else 0.0
    for index, (margin, change) in enumerate(changes):
        current += change
        if current > best and (index + 1 == len(changes) or changes[index + 1][0] < margin):
            best, threshold = current, margin
    return BestThreshold(100 * best / count, threshold)
