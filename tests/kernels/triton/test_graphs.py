"""Padded batches and replays through the interpreted kernels: the bits of the batch alone."""

from collections.abc import Callable, Iterable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.model import BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.model.graphs import SMALL, Graphs
from dtbert.model.scorers import BUILT_IN_SCORERS
from tests.graphs import StandIn
from tests.peer import make_config, make_dtbert, make_peer

# Of one bucket each: the first is met, the second recorded, the third replayed.
ONE = ([57], [50], [63])
SEVERAL = ([5, 31, 9], [1, 60, 1, 1], [20, 20, 20])
PAIRS = ([5, 31], [1, 60], [20, 20])
RATIOS, ABSOLUTE = (0.6, 0.2), (40, 3)


@pytest.fixture(autouse=True)
def _products_row_by_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library rounds a row's product otherwise where there are more rows; dtbert's kernels must not."""
    linear: Callable[..., Tensor] = F.linear
    monkeypatch.setattr(F, "linear", lambda x, *layer: torch.cat([linear(row[None], *layer) for row in x]))


@pytest.fixture(scope="module")
def model() -> BertForQuestionAnswering:
    return make_dtbert(make_peer(make_config(layers=2, heads=2, head_size=16)), backend="triton")


def batch_of(lengths: list[int], seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 120, (n,), generator=generator).tolist() for n in lengths]
    return PackedBatch.from_lists(ids, [[int(3 * i >= n) for i in range(n)] for n in lengths])


def assert_same_bits(
    model: BertForQuestionAnswering, batches: Iterable[list[int]], schedule: LengthSchedule | None
) -> StandIn:
    recorder = StandIn()
    graphs = Graphs(model.encoder, model.span, SMALL, recorder)
    for seed, lengths in enumerate(batches):
        batch = batch_of(lengths, seed)
        got = graphs(model._forward, batch, schedule, model.backend)
        assert got is not None
        assert torch.equal(got, model._forward(batch, schedule, model.backend)), lengths
    return recorder


@pytest.mark.parametrize("batches", [ONE, SEVERAL], ids=["one", "several"])
def test_replays_have_the_bits_of_the_batch_alone(model: BertForQuestionAnswering, batches: tuple) -> None:
    recorder = assert_same_bits(model, batches, None)
    assert (recorder.recorded, recorder.replayed) == (1, 2)


@pytest.mark.parametrize("scorer", BUILT_IN_SCORERS)
def test_replays_that_drop_have_the_bits_of_the_batch_alone(model: BertForQuestionAnswering, scorer: str) -> None:
    recorder = assert_same_bits(model, PAIRS, LengthSchedule.ratios(RATIOS, scorer=scorer))
    assert (recorder.recorded, recorder.replayed) == (1, 2)


@pytest.mark.parametrize(
    ("batches", "kept"),
    [
        (ONE, {"keep_cls": True, "keep_question": True}),
        (([5, 41, 9], [1, 60, 1, 1], [2, 48, 2]), {"keep_cls": True}),
        (([5, 41], [1, 60], [48, 2]), {"keep_question": True}),
    ],
    ids=["one", "several-cls", "two-question"],
)
def test_absolute_schedules_and_kept_tokens_have_the_bits_of_the_batch_alone(
    model: BertForQuestionAnswering, batches: tuple, kept: dict
) -> None:
    recorder = assert_same_bits(model, batches, LengthSchedule.absolute(ABSOLUTE, **kept))
    assert (recorder.recorded, recorder.replayed) == (1, 2)


def test_a_full_bucket_has_the_bits_of_the_batch_alone(model: BertForQuestionAnswering) -> None:
    # 64 tokens without dropping leave no row of padding; with it, one more row is needed, and comes.
    for schedule in (None, LengthSchedule.ratios(RATIOS, keep_cls=True)):
        assert_same_bits(model, [[64], [64]], schedule)


@settings(max_examples=3)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5),
    ratios=st.lists(st.floats(0.02, 1), min_size=2, max_size=2),
    scorer=st.sampled_from(["received", "cls", "answer_overlap"]),
    keep_cls=st.booleans(),
)
def test_any_batches_have_the_bits_of_the_batch_alone(
    model: BertForQuestionAnswering, lengths: list[int], ratios: list[float], scorer: str, keep_cls: bool
) -> None:
    schedule = LengthSchedule.ratios(sorted(ratios, reverse=True), scorer=scorer, keep_cls=keep_cls)
    assert_same_bits(model, [lengths] * 3, schedule)
