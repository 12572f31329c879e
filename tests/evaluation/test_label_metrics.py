"""The metrics of labelled texts against their definitions, pair by pair and count by count."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtbert.evaluation.label_metrics import score

LABELS = st.integers(2, 4).flatmap(
    lambda count: st.tuples(
        st.just(count), st.lists(st.tuples(st.integers(-1, count - 1), st.integers(0, count - 1)), min_size=1)
    )
)
NUMBERS = st.lists(
    st.tuples(st.integers(-5, 5).map(lambda x: x / 2), st.integers(-9999, 9999).map(lambda x: x / 1000)),
    min_size=2,
    max_size=30,
)


def arrays(pairs: list[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    predicted, gold = np.array(pairs, float).T
    return predicted, gold


def f1_of(label: int, pairs: list[tuple[int, int]]) -> float:
    right = sum(own == other == label for own, other in pairs)
    said, there = (sum(pair[side] == label for pair in pairs) for side in (0, 1))
    precision, recall = right / said if said else 0, right / there if there else 0
    return 2 * precision * recall / (precision + recall) if right else 0.0


@given(LABELS)
def test_accuracy_and_f1_count_what_is_right(case: tuple[int, list[tuple[int, int]]]) -> None:
    count, pairs = case
    accuracy = sum(own == other for own, other in pairs) / len(pairs)
    assert score("accuracy", *arrays(pairs), count) == pytest.approx(100 * accuracy)
    labels = [1] if count == 2 else range(count)
    expected = sum(f1_of(label, pairs) for label in labels) / len(labels)
    assert score("f1", *arrays(pairs), count) == pytest.approx(100 * expected)


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 1)), min_size=1))
def test_matthews_of_two_labels_is_the_textbooks(pairs: list[tuple[int, int]]) -> None:
    tp, tn, fp, fn = (pairs.count(pair) for pair in ((1, 1), (0, 0), (1, 0), (0, 1)))
    below = math.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn))
    expected = (tp * tn - fp * fn) / below if below else 0.0
    assert score("matthews", *arrays(pairs), 2) == pytest.approx(100 * expected)


@given(NUMBERS)
def test_correlations_are_those_of_numpy_and_of_ranks(pairs: list[tuple[float, float]]) -> None:
    predicted, gold = arrays(pairs)

    def ranks(values: np.ndarray) -> np.ndarray:
        # By counting: those below, and half of its equals, itself among them.
        return np.array([(values < one).sum() + ((values == one).sum() + 1) / 2 for one in values])

    for metric, own, other in (("pearson", predicted, gold), ("spearman", ranks(predicted), ranks(gold))):
        varies = np.ptp(own) > 0 and np.ptp(other) > 0
        expected = np.corrcoef(own, other)[0, 1] if varies else 0.0
        assert score(metric, predicted, gold, 0) == pytest.approx(100 * expected, abs=1e-6)


@given(st.lists(st.integers(-5, 5), min_size=3, max_size=8, unique=True))
def test_spearman_goes_by_order_alone(values: list[int]) -> None:
    numbers = np.array(values, float)
    assert score("spearman", np.exp(numbers), numbers, 0) == pytest.approx(100)
    assert score("spearman", -numbers, numbers, 0) == pytest.approx(-100)
