"""The metrics of GLUE (Wang et al. 2018, table 1), in percent: of labels by number, and of numbers."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
Values = NDArray[np.float64]


def score(metric: Metric, predicted: Values, gold: Values, num_labels: int) -> float:
    """A metric of predictions, in percent.

    Args:
        predicted, gold: ``[n]``, labels by number or, for the correlations, numbers. A prediction of -1 is none, and
            wrong.
        num_labels: of two F1 is that of label 1, of more the mean over the labels.
    """
    if metric == "accuracy":
        return 100 * float((predicted == gold).mean())
    if metric == "f1":
        labels = [1] if num_labels == 2 else range(num_labels)
        return 100 * float(np.mean([_f1(predicted == label, gold == label) for label in labels]))
    if metric == "matthews":
        return 100 * _matthews(predicted, gold)
    return 100 * _correlation(*((_ranks(predicted), _ranks(gold)) if metric == "spearman" else (predicted, gold)))


def _f1(predicted: NDArray[np.bool_], gold: NDArray[np.bool_]) -> float:
    """2 TP / (2 TP + FP + FN); 0 where that is 0 / 0."""
    found = int(predicted.sum() + gold.sum())
    return 2 * int((predicted & gold).sum()) / found if found else 0.0


def _matthews(predicted: Values, gold: Values) -> float:
    """The correlation of indicators over all labels (Gorodkin 2004), of two that of Matthews (1975)."""
    labels = np.union1d(predicted, gold)
    own, other = (values[:, None] == labels for values in (predicted, gold))
    return _correlation(own.astype(np.float64), other.astype(np.float64))


def _correlation(first: Values, second: Values) -> float:
    """Pearson's; 0 where one of them does not vary, and there is none."""
    if any((values == values[0]).all() for values in (first, second)):
        return 0.0
    own, other = (values - values.mean(0) for values in (first, second))
    return float((own * other).sum() / np.sqrt((own**2).sum() * (other**2).sum()))


def _ranks(values: Values) -> NDArray[np.float64]:
    """Ranks, equals at the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (counts.cumsum() - (counts - 1) / 2)[places]
