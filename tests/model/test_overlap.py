"""Which tokens stand near the question's words."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtbert.model import LengthSchedule, PackedBatch, pack_padded, question_overlap, register_scorer
from tests.model.test_agreement import oracle_overlap
from tests.peer import make_config, make_dtbert, make_peer

SEQUENCE = st.tuples(
    st.lists(st.integers(0, 9), max_size=8), st.lists(st.integers(0, 12), max_size=90)
)  # words of the question and of the text


def with_special_tokens(question: list[int], text: list[int]) -> tuple[list[int], list[int]]:
    return [98, *question, 99, *text, 99], [0] * (len(question) + 2) + [1] * (len(text) + 1)


def of_batch(*sequences: tuple[list[int], list[int]]) -> list[float]:
    ids, segments = zip(*sequences, strict=True)
    return question_overlap(PackedBatch.from_lists(ids, segments)).tolist()


@given(st.lists(SEQUENCE, min_size=1, max_size=4))
def test_agrees_with_the_definition_to_the_bit_in_any_batch(sequences: list[tuple[list[int], list[int]]]) -> None:
    made = [with_special_tokens(*sequence) for sequence in sequences]
    assert of_batch(*made) == [value for one in made for value in oracle_overlap(*one)]


def test_a_word_counts_in_full_where_it_stands_and_fades_around_it() -> None:
    overlap = of_batch(with_special_tokens([5], [1] * 40 + [5] + [2] * 40))
    place = 3 + 40
    assert overlap[place] == 1
    assert overlap[place - 16] == overlap[place + 16] == 0.5
    assert overlap[place - 32] == overlap[place + 32] == 0
    assert max(overlap) == 1


def test_a_word_that_is_everywhere_says_little() -> None:
    overlap = of_batch(with_special_tokens([5, 6], [5, 1, 1] * 30 + [6] + [1, 1, 5] * 30))
    assert overlap.index(max(overlap)) == 4 + 90
    assert overlap[4] < 0.5


@pytest.mark.parametrize("segments", [[0] * 6, [1] * 6, [0, 0, 1, 1, 1, 1]], ids=["one", "other", "no words"])
def test_without_a_question_nothing_is_near(segments: list[int]) -> None:
    assert of_batch(([1, 2, 1, 2, 1, 2], segments)) == [0] * 6


def test_later_layers_go_by_the_whole_text() -> None:
    # The question's word stands in the text's middle; layer 1 drops it, its neighbours stay near it.
    register_scorer("other_words", lambda view: (view.batch.input_ids != 5).float())
    model = make_dtbert(make_peer(make_config(layers=2, heads=3, head_size=8)))
    ids, segments = with_special_tokens([5], [1] * 30 + [5] + [1] * 60)
    batch = PackedBatch.from_lists([ids], [segments])
    schedule = LengthSchedule.ratios([0.9, 0.3], scorer=["other_words", "overlap"], keep_question=True)
    kept = model.encoder(batch, schedule, backend=model.backend).kept
    overlap = question_overlap(batch)
    first = kept[0].tolist()
    assert ids.index(5, 3) not in first
    count = schedule.lengths(len(ids))[1]
    in_question = [row for row in first if segments[row] == 0]
    ranked = sorted((row for row in first if segments[row]), key=lambda row: (-overlap[row].item(), row))
    assert kept[1].tolist() == sorted(in_question + ranked[: count - len(in_question)])


def test_padding_on_the_left_changes_nothing() -> None:
    ids, segments = with_special_tokens([5, 6], [1, 5, 1, 98, 1, 6, 1])
    padded = [torch.tensor([[0] * 7 + row]) for row in (ids, [1] * len(ids), segments)]
    batch, _ = pack_padded(*padded)
    assert question_overlap(batch).tolist() == of_batch((ids, segments))


def test_values_are_float32_on_the_batch_s_device() -> None:
    overlap = question_overlap(PackedBatch.from_lists([[98, 3, 99, 3]], [[0, 0, 0, 1]]))
    assert overlap.dtype == torch.float32
    assert overlap.tolist() == [29 / 32, 30 / 32, 31 / 32, 1]
