"""What must hold of the whole network for any input."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.model import (
    BertConfig,
    BertEncoder,
    BertForQuestionAnswering,
    LayerView,
    LengthSchedule,
    PackedBatch,
    register_scorer,
)
from dtbert.model.scorers import BUILT_IN_SCORERS
from tests.peer import make_config, make_dtbert, make_peer

PEER = make_peer(make_config(layers=4, heads=3, head_size=8))
MODEL = make_dtbert(PEER)
PLAIN = make_dtbert(PEER, blocked=False)
# Rounding may differ with the number of rows in a product.
ROUNDING = {"atol": 2e-6, "rtol": 2e-6}

SEQLENS = st.lists(st.integers(1, 40), min_size=1, max_size=4)
RATIOS = st.lists(st.floats(0.02, 1), min_size=4, max_size=4).map(lambda x: sorted(x, reverse=True))
SCORERS = st.sampled_from(BUILT_IN_SCORERS)


def random_ids(seqlens: list[int], seed: int) -> tuple[list[list[int]], list[list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 120, (n,), generator=generator).tolist() for n in seqlens]
    return ids, [[int(i >= n // 3) for i in range(n)] for n in seqlens]


def scores(model: BertForQuestionAnswering, batch: PackedBatch, schedule: LengthSchedule | None) -> Tensor:
    return torch.stack(model.forward_packed(batch, schedule), 1)


@given(SEQLENS, SCORERS, st.integers(0, 2**16))
def test_schedule_without_drops_is_exactly_the_plain_model(seqlens: list[int], scorer: str, seed: int) -> None:
    batch = PackedBatch.from_lists(*random_ids(seqlens, seed))
    want = scores(MODEL, batch, None)
    for schedule in (LengthSchedule.ratios([1] * 4, scorer=scorer), LengthSchedule.absolute([40] * 4, scorer=scorer)):
        assert torch.equal(scores(MODEL, batch, schedule), want)


@given(SEQLENS, RATIOS, SCORERS, st.integers(0, 2**16))
def test_a_sequence_does_not_see_its_batch_mates(
    seqlens: list[int], ratios: list[float], scorer: str, seed: int
) -> None:
    ids, segments = random_ids(seqlens, seed)
    schedule = LengthSchedule.ratios(ratios, scorer=scorer)
    together = scores(PLAIN, PackedBatch.from_lists(ids, segments), schedule).split(seqlens)
    backwards = scores(PLAIN, PackedBatch.from_lists(ids[::-1], segments[::-1]), schedule).split(seqlens[::-1])
    for i, alone in enumerate(zip(ids, segments, strict=True)):
        want = scores(PLAIN, PackedBatch.from_lists([alone[0]], [alone[1]]), schedule)
        torch.testing.assert_close(together[i], want, **ROUNDING)
        torch.testing.assert_close(backwards[len(ids) - 1 - i], want, **ROUNDING)


@given(st.integers(1, 30), st.integers(0, 20), RATIOS, SCORERS, st.integers(0, 2**16))
def test_padding_changes_nothing(length: int, padding: int, ratios: list[float], scorer: str, seed: int) -> None:
    (ids,), (segments,) = random_ids([length], seed)
    schedule = LengthSchedule.ratios(ratios, scorer=scorer)
    want = MODEL(torch.tensor([ids]), None, torch.tensor([segments]), schedule)
    padded = [torch.tensor([row + [0] * padding]) for row in (ids, [1] * length, segments)]
    got = MODEL(*padded, schedule)
    for mine, expected in zip(got, want, strict=True):
        assert torch.equal(mine[:, :length], expected)
        assert (mine[:, length:] == -torch.inf).all()
        # A softmax over the row gives padding nothing.
        assert mine.softmax(1)[:, length:].sum() == 0


@given(SEQLENS, RATIOS, SCORERS, st.booleans(), st.booleans(), st.integers(0, 2**16))
def test_kept_sets_are_sorted_unique_nested_and_of_the_scheduled_size(
    seqlens: list[int], ratios: list[float], scorer: str, keep_cls: bool, keep_question: bool, seed: int
) -> None:
    batch = PackedBatch.from_lists(*random_ids(seqlens, seed))
    schedule = LengthSchedule.ratios(ratios, scorer=scorer, keep_cls=keep_cls, keep_question=keep_question)
    encoding = MODEL.encoder(batch, schedule, backend=MODEL.backend, span_head=lambda states: states[:, :2])
    bounds = batch.packing.cu_seqlens.tolist()
    before = set(range(sum(seqlens)))
    for layer, rows in enumerate(encoding.kept):
        kept = list(range(sum(seqlens))) if rows is None else rows.tolist()
        assert kept == sorted(set(kept))
        assert set(kept) <= before
        before = set(kept)
        for begin, end, length in zip(bounds, bounds[1:], seqlens, strict=False):
            mine = [row - begin for row in kept if begin <= row < end]
            count = schedule.lengths(length)[layer]
            assert len(mine) == count
            # [CLS] lies in the question's segment: keep_cls shows where the question is not kept whole.
            if keep_cls:
                assert mine[0] == 0
            if keep_question:
                question = max(1, length // 3) if length >= 3 else 0
                assert mine[: min(count, question)] == list(range(min(count, question)))


@given(SEQLENS, RATIOS, SCORERS, st.integers(0, 2**16))
def test_restored_rows_hold_the_states_that_entered_the_dropping_layer(
    seqlens: list[int], ratios: list[float], scorer: str, seed: int
) -> None:
    batch = PackedBatch.from_lists(*random_ids(seqlens, seed))
    schedule = LengthSchedule.ratios(ratios, scorer=scorer)
    options = {"backend": MODEL.backend, "span_head": lambda states: states[:, :2]}
    encoding = MODEL.encoder(batch, schedule, keep_hidden_states=True, **options)
    expected = torch.full_like(encoding.states, torch.nan)
    rows = torch.arange(sum(seqlens))
    for states, kept in zip(encoding.hidden_states, (*encoding.kept, None), strict=True):
        expected[rows] = states
        rows = rows if kept is None else kept
    assert torch.equal(encoding.states, expected)
    assert torch.equal(MODEL.encoder(batch, schedule, **options).states, expected)


def test_random_scorer_is_the_same_every_time_and_differs_by_layer() -> None:
    batch = PackedBatch.from_lists(*random_ids([40], 0))
    schedule = LengthSchedule.ratios([0.8, 0.6, 0.4, 0.2], scorer="random")
    first, second = (MODEL.encoder(batch, schedule, backend=MODEL.backend).kept for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first[0].tolist() != list(range(32))


def test_registered_scorer_decides_what_stays() -> None:
    seen: list[LayerView] = []

    def last_first(view: LayerView) -> Tensor:
        seen.append(view)
        return view.position_ids.float()

    register_scorer("last_first", last_first)
    batch = PackedBatch.from_lists(*random_ids([10, 6], 0))
    schedule = LengthSchedule.ratios([0.5, 0.5, 0.5, 0.5], scorer=["last_first", "cls", "cls", "cls"])
    kept = MODEL.encoder(batch, schedule, backend=MODEL.backend).kept
    assert kept[0].tolist() == [5, 6, 7, 8, 9, 13, 14, 15]
    assert len(seen) == 1
    assert seen[0].attention("received").shape == (16,)
    assert seen[0].hidden_states.shape == (16, 24)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool], ids=["int64", "float64", "bool"])
def test_scores_that_float32_would_round_keep_their_order(dtype: torch.dtype) -> None:
    def score(view: LayerView) -> Tensor:
        return view.position_ids >= 5 if dtype == torch.bool else (view.position_ids + 2**30).to(dtype)

    register_scorer("exact", score)
    batch = PackedBatch.from_lists(*random_ids([10, 8], 0))
    schedule = LengthSchedule.ratios([0.5] * 4, scorer="exact")
    kept = MODEL.encoder(batch, schedule, backend=MODEL.backend).kept[0].tolist()
    assert kept == ([5, 6, 7, 8, 9, 10, 15, 16, 17] if dtype == torch.bool else [5, 6, 7, 8, 9, 14, 15, 16, 17])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (lambda view: view.hidden_states, "nonsense.* one float per token"),
        (lambda view: [1.0], "nonsense.* one float per token.*not list"),
        (lambda view: view.position_ids.float() * torch.nan, "nonsense.* NaN for 6 of 6"),
        (lambda view: view.span_logits().amax(1), "does not have"),
    ],
)
def test_registered_scorer_that_returns_nonsense_is_named(result: object, message: str) -> None:
    register_scorer("nonsense", result)  # type: ignore[arg-type]
    batch = PackedBatch.from_lists(*random_ids([6], 0))
    with pytest.raises(ValueError, match=message):
        MODEL.encoder(batch, LengthSchedule.ratios([0.5] * 4, scorer="nonsense"), backend=MODEL.backend)


@pytest.mark.parametrize(
    ("ids", "segments", "message"),
    [
        ([[1, 120]], None, "input_ids run from 1 to 120, .* 119"),
        ([[-1, 3]], None, "input_ids run from -1 to 3"),
        ([[1, 2]], [[0, 2]], "token_type_ids run from 0 to 2, .* 1"),
        ([[1] * 513], None, "positions run from 0 to 512, .* 511.*windows"),
    ],
)
def test_ids_outside_their_tables_are_refused(
    ids: list[list[int]], segments: list[list[int]] | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        MODEL(torch.tensor(ids), None, None if segments is None else torch.tensor(segments))
    with pytest.raises(ValueError, match=message):
        MODEL.forward_packed(PackedBatch.from_lists(ids, segments))


def test_schedule_of_another_depth_is_refused() -> None:
    with pytest.raises(ValueError, match="3 entries, the model 4 layers"):
        MODEL(torch.ones(1, 4, dtype=torch.int64), schedule=LengthSchedule.ratios([1, 1, 1]))


def test_backend_is_a_visible_choice_and_gradients_take_the_reference() -> None:
    model = BertForQuestionAnswering(
        BertConfig(vocab_size=9, hidden_size=8, num_attention_heads=2, intermediate_size=8)
    )
    model.reset_parameters()
    assert model.backend_name == "reference"
    with torch.no_grad():
        assert model.backend_name == "cpu"
    schedule = LengthSchedule.ratios([1, 1, 0.8, 0.6, 0.4, 0.2])
    sum(logits.sum() for logits in model(torch.arange(8)[None], schedule=schedule)).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.prepare()
    assert model.backend_name == "cpu"
    assert not any(p.requires_grad for p in model.parameters())
    assert BertForQuestionAnswering(model.config, backend="reference").backend_name == "reference"
    with pytest.raises(ValueError, match=r"gradients .* 'cpu'"):
        BertForQuestionAnswering(model.config, backend="cpu")(torch.arange(8)[None])


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_trace_that_would_keep_one_mask_is_refused() -> None:
    ids = torch.ones(1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"torch\.jit\.trace .* attention_mask"):
        torch.jit.trace(MODEL, (ids, ids), strict=False)


def test_choice_of_backend_follows_the_model() -> None:
    model = BertForQuestionAnswering(MODEL.config).requires_grad_(False)
    assert model.backend_name == "cpu"
    assert model.to("meta").backend_name == "reference"
    with pytest.raises(ValueError, match=r"'cpu' .* not on meta"):
        BertForQuestionAnswering(MODEL.config, backend="cpu").to("meta").backend  # noqa: B018


def test_encoder_gives_hidden_states_where_tokens_are_and_zeros_elsewhere() -> None:
    encoder = BertEncoder(MODEL.config, pooler=True)
    encoder.reset_parameters()
    encoder.prepare()
    ids, mask = torch.randint(0, 120, (2, 9)), torch.ones(2, 9, dtype=torch.int64)
    mask[1, 5:] = 0
    schedule = LengthSchedule.absolute([9, 4, 4, 2], keep_cls=True)
    output = encoder(ids, mask, schedule=schedule, output_hidden_states=True)
    assert output.last_hidden_state.shape == (2, 9, 24)
    assert output.pooler_output is not None
    assert output.pooler_output.shape == (2, 24)
    assert [(states[0] != 0).any(-1).sum().item() for states in output.hidden_states] == [9, 9, 4, 4, 2]
    assert (output.last_hidden_state[1, 5:] == 0).all()
    assert (output.last_hidden_state[mask.bool()] != 0).any(-1).all()
    assert encoder(ids, mask).hidden_states == ()
