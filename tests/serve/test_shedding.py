"""Smaller budgets under load: by how much waits, and not to and fro."""

from hypothesis import given
from hypothesis import strategies as st

from dtbert.serve.shedding import Shedding


def test_budgets_fall_as_the_queue_fills_and_come_back_when_it_is_short() -> None:
    shedding = Shedding((0.7, 0.5), 120)
    fills = [(0, None), (39, None), (40, 0.7), (79, 0.7), (80, 0.5), (120, 0.5)]
    empties = [(60, 0.5), (40, 0.5), (39, 0.7), (20, 0.7), (19, None), (39, None), (40, 0.7)]
    assert [(waiting, shedding.budget(waiting)) for waiting, _ in fills + empties] == fills + empties


def test_without_budgets_nothing_is_shed() -> None:
    assert Shedding((), 10).budget(10) is None


@given(st.lists(st.integers(0, 130), max_size=30), st.integers(0, 130))
def test_an_empty_queue_sheds_nothing_and_a_full_one_all_that_it_may(before: list[int], now: int) -> None:
    shedding = Shedding((0.8, 0.5, 0.3), 100)
    for waiting in before:
        shedding.budget(waiting)
    found = shedding.budget(now)
    assert now or found is None
    assert now < 75 or found == 0.3
    assert shedding.budget(now) == found
