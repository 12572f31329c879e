"""Schedules as people and their searches write them."""

import csv
import io
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtbert.model import LengthSchedule
from dtbert.model.store import is_store, read_store

LENGTHS = st.lists(st.integers(1, 512), min_size=1, max_size=12).map(lambda found: tuple(sorted(found, reverse=True)))
FORMS = {
    "tuple": str,
    "list": lambda lengths: str(list(lengths)),
    "bare": lambda lengths: ",".join(map(str, lengths)),
    "spaced": lambda lengths: "  ( " + " , ".join(f"{length:3d}" for length in lengths) + " )\n",
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@given(lengths=LENGTHS)
def test_lists_are_read_in_any_form(form, lengths: tuple[int, ...]) -> None:  # type: ignore[no-untyped-def]
    expected = LengthSchedule.absolute(lengths) if set(lengths) != {1} else LengthSchedule.ratios(lengths)
    assert LengthSchedule.parse(form(lengths)) == expected


@given(ratios=st.lists(st.floats(0.001, 1), min_size=1, max_size=12).map(lambda found: sorted(found, reverse=True)))
def test_ratios_are_read_in_brackets_too(ratios: list[float]) -> None:
    for form in (str, lambda values: str(tuple(values)), lambda values: LengthSchedule.ratios(values).to_json()):
        assert LengthSchedule.parse(form(ratios)) == LengthSchedule.ratios(ratios)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a number"),
        ("()", "'' is not a number"),
        ("(269, 253", r"'\(269' is not a number"),
        ("[269, 253)", r"'\[269' is not a number"),
        ("269,,253", "'' is not a number"),
        ("((269, 253), 1)", r"'\(269' is not a number"),
        ("269.5, 2", "above 0 and at most 1"),
        ("__import__('os')", "is not a number"),
        ("(2, 3)", "grows from 2 to 3"),
    ],
)
def test_what_is_no_list_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LengthSchedule.parse(text)


STORE = {(269, 253, 34): (3_000, 87.5, 0, None), (100, 50, 20): (1_000, 80.25, 2, ((269, 253, 34), (9, 8, 7)))}


def written(store: dict[tuple[int, ...], tuple[object, ...]]) -> str:
    """As Length-Adaptive Transformer's search writes it: rows without a head, MACs, score, method, parents."""
    file = io.StringIO()
    writer = csv.writer(file, delimiter="\t")
    for lengths, values in store.items():
        writer.writerow([str(lengths), *map(str, values)])
    return file.getvalue()


@pytest.mark.parametrize("head", ["", "length_config\tmacs\tf1\n", "gene\tmacs\tscore\tmethod\n"])
def test_store_of_a_search_is_read(head: str) -> None:
    text = head + written(STORE)
    assert is_store(text)
    rows = read_store(text)
    assert [(row.schedule.length_config, row.macs, row.f1) for row in rows] == [
        (lengths, macs, score) for lengths, (macs, score, *_) in STORE.items()
    ]
    assert [row.line for row in rows] == ([2, 3] if head else [1, 2])


def test_published_table_is_read(shared_data: Path) -> None:
    rows = read_store((shared_data / "la-minilmv2-pareto.tsv").read_text("utf-8"))
    assert len(rows) == 13
    assert rows[1].schedule == LengthSchedule.absolute([269, 253, 252, 202, 104, 34])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("length_config\tmacs\tf1\n", "no rows"),
        ("lengths\tf1\tmacs\n3,2\t1\t2\n", "expected the columns length_config, macs and f1"),
        ("3,2\t5\n", "line 1: expected lengths, MACs and F1"),
        ("3,2\t5\t1\n2,3\t5\t1\n", "line 2: .* grows"),
        ("3,2\tmany\t1\n", "line 1: .*'many'"),
    ],
)
def test_what_is_no_store_is_refused_by_line(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_store(text)


def test_one_schedule_is_no_store() -> None:
    for text in ("(269, 253)", LengthSchedule.ratios([1, 0.5]).to_json(), '{\n\t"kind": "ratios"\n}'):
        assert not is_store(text)
