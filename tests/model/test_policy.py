"""Policies by which the text decides, scores that remember, and layers that are left out."""

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels.reference import attention_logits, split_heads
from dtbert.model import (
    AdaptivePolicy,
    BertConfig,
    BertForQuestionAnswering,
    LayerView,
    LengthSchedule,
    PackedBatch,
    Policy,
    Threshold,
    TopP,
    register_scorer,
)
from dtbert.model.scorers import BUILT_IN_SCORERS
from tests.peer import make_config, make_dtbert, make_peer

LAYERS = 3
PEER = make_peer(make_config(layers=LAYERS, heads=3, head_size=8))
MODEL = make_dtbert(PEER)
REFERENCE = make_dtbert(PEER, backend="reference")
CONFIG = BertConfig(hidden_size=24, num_attention_heads=3, intermediate_size=32, num_hidden_layers=LAYERS)
# Rounding may differ with the number of rows in a product.
ROUNDING = {"atol": 2e-6, "rtol": 2e-6}

SEQLENS = st.lists(st.integers(1, 40), min_size=1, max_size=4)
SEEDS = st.integers(0, 2**16)
SCORERS = st.sampled_from(BUILT_IN_SCORERS)
BOUNDS = st.tuples(st.floats(0, 0.6), st.floats(0.01, 1)).map(sorted)
# About the share of a token: thresholds at which some of 1 to 40 tokens go.
THRESHOLDS = st.lists(st.sampled_from([0, 1e-3, 0.01, 0.03, 0.06, 0.3]), min_size=LAYERS, max_size=LAYERS)
PARTS = st.lists(st.sampled_from([1e-6, 0.2, 0.6, 0.9, 0.99, 1]), min_size=LAYERS, max_size=LAYERS)

KEEP_QUESTION = st.booleans() | st.lists(st.booleans(), min_size=LAYERS, max_size=LAYERS)


@st.composite
def policies(draw: Any, scorers: st.SearchStrategy[str] = SCORERS) -> AdaptivePolicy:
    low, high = draw(BOUNDS)
    options = {"floor": low, "ceiling": high, "scorer": draw(scorers)}
    options |= {"keep_cls": draw(st.booleans()), "keep_question": draw(KEEP_QUESTION)}
    return Threshold(draw(THRESHOLDS), **options) if draw(st.booleans()) else TopP(draw(PARTS), **options)


def random_batch(seqlens: list[int], seed: int) -> PackedBatch:
    drawn = random.Random(seed)
    ids = [[drawn.randrange(120) for _ in range(n)] for n in seqlens]
    return PackedBatch.from_lists(ids, [[int(i >= n // 3) for i in range(n)] for n in seqlens])


def one_of(batch: PackedBatch, index: int) -> PackedBatch:
    rows = batch.packing.slices[index]
    return PackedBatch.from_lists([batch.input_ids[rows].tolist()], [batch.token_type_ids[rows].tolist()])


def run(
    model: BertForQuestionAnswering, batch: PackedBatch, policy: Policy | None
) -> tuple[Tensor, tuple[tuple[int, ...], ...]]:
    start, end, kept = model.forward_packed(batch, policy, output_kept=True)
    return torch.stack([start, end], 1), tuple(layer.lengths for layer in kept)


def kept_by_hand(policy: AdaptivePolicy, weights: list[float], segments: list[int]) -> list[list[int]]:
    """The places that each layer keeps of one text whose tokens weigh the same in each layer; in plain floats."""
    places, layers = list(range(len(weights))), []
    for layer in range(policy.num_layers):
        total = sum(weights[place] for place in places) or 1.0
        keep_question = policy.keeps_question[layer]
        forced = {p for p in places if (policy.keep_cls and p == 0) or (keep_question and segments[p] == 0)}
        ranked = sorted(places, key=lambda p: (p not in forced, p in forced or -weights[p], p))
        least, most = policy.bounds(layer, len(weights))
        count = len(places)
        if isinstance(policy, Threshold):
            shares = [weights[p] / total for p in places]
            assume(all(abs(share - policy.thresholds[layer]) > 1e-9 for share in shares))
            count = sum(weights[p] / total >= policy.thresholds[layer] or p in forced for p in places)
        elif policy.parts[layer] < 1:  # type: ignore[attr-defined]
            held = 0.0
            for count, place in enumerate(ranked, 1):
                held += weights[place] / total
                assume(abs(held - policy.parts[layer]) > 1e-9)  # type: ignore[attr-defined]
                if held > policy.parts[layer] and count >= len(forced):  # type: ignore[attr-defined]
                    break
        places = sorted(ranked[: max(least, min(most, count))])
        layers.append(places)
    return layers


def _weights(view: LayerView) -> Tensor:
    return view.batch.input_ids + 1


register_scorer("weights", _weights)
register_scorer("log_weights", lambda view: _weights(view).double().log(), logarithmic=True)


@given(SEQLENS, policies(st.sampled_from(["weights", "log_weights"])), SEEDS)
def test_kept_tokens_are_those_that_shares_by_hand_keep(seqlens: list[int], policy: AdaptivePolicy, seed: int) -> None:
    batch = random_batch(seqlens, seed)
    wanted = []
    for index, rows in enumerate(batch.packing.slices):
        alone = one_of(batch, index)
        by_hand = kept_by_hand(policy, (alone.input_ids + 1).tolist(), alone.token_type_ids.tolist())
        wanted.append([[place + rows.start for place in places] for places in by_hand])
    encoding = MODEL.encoder(batch, policy, backend=MODEL.backend)
    for layer, rows in enumerate(encoding.kept):
        got = list(range(sum(seqlens))) if rows is None else rows.tolist()
        assert got == [place for places in wanted for place in places[layer]]


@given(SEQLENS, policies(), SEEDS)
def test_a_sequence_sees_neither_batch_mates_nor_padding(seqlens: list[int], policy: AdaptivePolicy, seed: int) -> None:
    batch = random_batch(seqlens, seed)
    together, lengths = run(MODEL, batch, policy)
    for index, logits in enumerate(together.split(seqlens)):
        alone, own = run(MODEL, one_of(batch, index), policy)
        assert [layer[index] for layer in lengths] == [layer[0] for layer in own]
        torch.testing.assert_close(logits, alone, **ROUNDING)
    rows = [batch.input_ids.split(seqlens), [torch.ones(n) for n in seqlens], batch.token_type_ids.split(seqlens)]
    padded = [torch.nn.utils.rnn.pad_sequence([*one, torch.zeros(45)], batch_first=True)[:-1] for one in rows]
    start, end = MODEL(*(one.long() for one in padded), policy)
    assert torch.equal(torch.stack([start, end], 2)[padded[1].bool()], together)


@given(SEQLENS, policies(), SEEDS)
def test_a_text_is_answered_as_by_the_schedule_of_its_own_lengths(
    seqlens: list[int], policy: AdaptivePolicy, seed: int
) -> None:
    batch = one_of(random_batch(seqlens, seed), 0)
    got, lengths = run(MODEL, batch, policy)
    options = {name: getattr(policy, name) for name in ("scorer", "keep_cls", "keep_question")}
    want, _ = run(MODEL, batch, LengthSchedule.absolute([length for (length,) in lengths], **options))
    # Where a layer scores and then drops nothing, its context comes another way.
    torch.testing.assert_close(got, want, **ROUNDING)


@given(st.integers(2, 40), st.sampled_from([0.01, 0.02, 0.03, 0.05]), SEEDS)
def test_threshold_compares_the_mean_attention_over_heads_and_queries(length: int, threshold: float, seed: int) -> None:
    batch = random_batch([length], seed)
    states = REFERENCE.backend.embed(batch.ids, REFERENCE.encoder.embeddings)
    query, key, _ = split_heads(REFERENCE.backend.linear(states, REFERENCE.encoder.layers[0].qkv), 3)
    importance = attention_logits(query, key).softmax(-1).mean((0, 1))
    assume((importance - threshold).abs().min() > 1e-6)
    _, lengths = run(REFERENCE, batch, Threshold([threshold, 0, 0]))
    assert lengths[0] == (max(1, int((importance >= threshold).sum())),)


@given(SEQLENS, policies(), SEEDS)
def test_backends_keep_the_same(seqlens: list[int], policy: AdaptivePolicy, seed: int) -> None:
    batch = random_batch(seqlens, seed)
    (got, lengths), (want, wanted) = run(MODEL, batch, policy), run(REFERENCE, batch, policy)
    # A share that lies within rounding of the threshold may fall on either side.
    assume(lengths == wanted)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def received(states: Tensor, layer: int) -> Tensor:
    """By hand, of all tokens of one text."""
    query, key, _ = split_heads(REFERENCE.backend.linear(states, REFERENCE.encoder.layers[layer].qkv), 3)
    return attention_logits(query, key).softmax(-1).sum((0, 1))


@given(st.integers(3, 40), st.floats(0.1, 0.9), st.booleans(), SEEDS)
def test_accumulated_significance_is_the_sum_over_the_layers_so_far(
    length: int, ratio: float, adaptive: bool, seed: int
) -> None:
    batch = random_batch([length], seed)
    states = REFERENCE.encoder(batch, backend=REFERENCE.backend, keep_hidden_states=True).hidden_states
    summed = torch.stack([received(states[layer], layer) for layer in range(LAYERS)]).sum(0)
    order = summed.sort(descending=True, stable=True)
    assume((order.values.diff().abs() > 1e-4).all())
    policy: Policy = LengthSchedule.ratios([1, 1, ratio], accumulate=True)
    if adaptive:
        policy = TopP([1, 1, ratio], accumulate=True)
        assume(((order.values.cumsum(0) / summed.sum() - ratio).abs() > 1e-5).all())
    rows = REFERENCE.encoder(batch, policy, backend=REFERENCE.backend).kept[2]
    assume(rows is not None)
    assert rows.tolist() == sorted(order.indices[: len(rows)].tolist())
    if adaptive:
        shares = order.values / summed.sum()
        assert shares[: len(rows) - 1].sum() < ratio <= shares[: len(rows)].sum()


register_scorer(
    "summed",
    lambda view: view.attention("received") + (view.earlier_scores[-1] if view.earlier_scores else 0),
    remembers=True,
)
register_scorer("forgetful", lambda view: view.accumulated)


@given(SEQLENS, st.lists(st.floats(0.05, 1), min_size=LAYERS, max_size=LAYERS), SEEDS)
def test_a_scorer_sees_what_was_said_of_the_tokens_that_are_left(
    seqlens: list[int], ratios: list[float], seed: int
) -> None:
    batch, ratios = random_batch(seqlens, seed), sorted(ratios, reverse=True)
    own, built_in = LengthSchedule.ratios(ratios, scorer="summed"), LengthSchedule.ratios(ratios, accumulate=True)
    (got, lengths), (want, wanted) = run(MODEL, batch, own), run(MODEL, batch, built_in)
    assert lengths == wanted
    torch.testing.assert_close(got, want, **ROUNDING)


@pytest.mark.parametrize("dtype", [torch.int64, torch.float64, torch.bool, torch.bfloat16])
def test_any_number_may_be_a_score(dtype: torch.dtype) -> None:
    def odd(view: LayerView) -> Tensor:
        return (view.position_ids % 2 if dtype == torch.bool else view.position_ids + 2).to(dtype)

    register_scorer("odd", odd)
    batch, options = random_batch([12, 7], 0), {"scorer": "odd", "keep_question": True, "accumulate": True}
    for policy in (LengthSchedule.ratios([0.9, 0.6, 0.6], **options), TopP([0.9, 0.6, 0.6], **options)):
        *_, last = MODEL.forward_packed(batch, policy, output_kept=True).kept
        left = batch.position_ids[last.mask & (batch.token_type_ids == 1)]
        if dtype == torch.bool:
            assert (left % 2 == 1).sum() >= len(left) // 2
        else:
            assert left.tolist()[-1:] == [6]
    assert last.significance is None or last.significance.dtype == torch.float32


def test_a_scorer_that_does_not_remember_is_told_how_to() -> None:
    with pytest.raises(ValueError, match="remembers=True"):
        run(MODEL, random_batch([9], 0), LengthSchedule.ratios([0.5] * LAYERS, scorer="forgetful"))


@given(SEQLENS, st.sets(st.integers(0, LAYERS - 1), max_size=LAYERS - 1), SCORERS, st.booleans(), SEEDS)
def test_a_layer_left_out_is_as_if_the_model_had_none(
    seqlens: list[int], skipped: set[int], scorer: str, adaptive: bool, seed: int
) -> None:
    batch, layers = random_batch(seqlens, seed), [layer for layer in range(LAYERS) if layer not in skipped]
    config = MODEL.config.to_dict() | {"num_hidden_layers": len(layers)}
    smaller = BertForQuestionAnswering(BertConfig.from_dict(config)).requires_grad_(False)
    smaller.encoder.embeddings, smaller.span = MODEL.encoder.embeddings, MODEL.span
    for layer, module in zip(layers, smaller.encoder.layers, strict=True):
        module.load_state_dict(MODEL.encoder.layers[layer].state_dict())

    def policy(kept: list[float], **options: Any) -> Policy:
        # `random` draws by the layer's number.
        options["scorer"] = "cls" if scorer == "random" else scorer
        return TopP(kept, **options) if adaptive else LengthSchedule.ratios(kept, **options)

    kept = [0.9, 0.6, 0.3]
    whole, alone = policy(kept, skip_layers=sorted(skipped)), policy([kept[layer] for layer in layers])
    (got, lengths), (want, wanted) = run(MODEL, batch, whole), run(smaller, batch, alone)
    torch.testing.assert_close(got, want, **ROUNDING)
    assert tuple(lengths[layer] for layer in layers) == wanted
    for own, left in zip(zip(*lengths, strict=True), zip(*wanted, strict=True), strict=True):
        tokens = max(*own, 40)
        macs = whole.macs_of_kept(MODEL.config, tokens, [own[layer] for layer in range(LAYERS)])
        if 0 not in skipped:
            assert macs == alone.macs_of_kept(smaller.config, tokens, left)


@given(policies())
def test_json_round_trips(policy: AdaptivePolicy) -> None:
    again = Policy.from_json(policy.to_json())
    assert (again, hash(again), type(again)) == (policy, hash(policy), type(policy))


def test_json_says_what_is_there_and_old_files_still_read() -> None:
    old = {"kind": "ratios", "length_config": [1.0, 0.5], "scorer": "cls", "keep_cls": False, "keep_question": True}
    schedule = Policy.from_dict(old)
    assert schedule == LengthSchedule.ratios([1, 0.5], scorer="cls", keep_question=True)
    assert schedule.to_dict() == old
    new = {"kind": "top_p", "parts": [0.5], "floor": 0.1, "accumulate": True}
    assert Policy.from_dict(new) == TopP([0.5], floor=0.1, accumulate=True)
    assert LengthSchedule.thresholds([0.1, 0], floor=0.2) == Threshold([0.1, 0], floor=0.2)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Threshold([]), "thresholds is empty"),
        (lambda: Threshold([1]), "thresholds holds 1: .* below 1"),
        (lambda: Threshold([-0.1]), "holds -0.1"),
        (lambda: Threshold([float("nan")]), "holds nan"),
        (lambda: Threshold(0.5), "thresholds must be a list"),
        (lambda: Threshold([True]), "holds True"),
        (lambda: TopP([0]), "parts holds 0: .* above 0"),
        (lambda: TopP([1.5]), "parts holds 1.5"),
        (lambda: TopP(["much"]), "holds 'much'"),
        (lambda: TopP([0.5], floor=0.6, ceiling=0.5), "layer 0 would keep at least 0.6 and at most 0.5"),
        (lambda: TopP([0.5], ceiling=0), "layer 0 would keep"),
        (lambda: TopP([0.5, 0.5], floor=[0.1]), "1 entries of floor for 2 layers"),
        (lambda: TopP([0.5], floor="low"), "floor must be a list"),
        (lambda: TopP([0.5], scorer="loudest"), "'loudest'"),
        (lambda: TopP([0.5, 0.5], skip_layers=[2]), "skip_layers holds 2: .* 0 to 1"),
        (lambda: TopP([0.5, 0.5], skip_layers=[0, 1]), "leave one"),
        (lambda: LengthSchedule.ratios([1, 1], skip_layers=[0, 0]), "each layer once"),
        (lambda: Policy.from_dict({"kind": "fate"}), "absolute, ratios, threshold, top_p, not 'fate'"),
        (lambda: LengthSchedule.from_dict({"kind": "top_p", "parts": [1]}), "absolute, ratios, not 'top_p'"),
        (lambda: Policy.from_dict({"kind": "threshold"}), r"missing \['thresholds'\]"),
        (lambda: TopP([0.5]).macs_of_kept(CONFIG, 9, [9]), "1 entries, the model 3 layers"),
        (lambda: TopP([0.5] * 3).macs_of_kept(CONFIG, 9, [9, 4, 5]), "cannot keep"),
    ],
)
def test_bad_policies_are_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("score", [-1.0, float("inf")])
def test_scores_without_shares_are_refused(score: float) -> None:
    register_scorer("shareless", lambda view: torch.full((len(view.hidden_states),), score))
    with pytest.raises(ValueError, match=r"'shareless' in layer 1 cannot be shared out.*LengthSchedule"):
        run(MODEL, random_batch([9, 4], 0), Threshold([0, 0.1, 0], scorer="shareless"))


def test_scores_of_nothing_are_equal_shares() -> None:
    register_scorer("nothing", lambda view: torch.zeros(len(view.hidden_states)))
    _, lengths = run(MODEL, random_batch([10, 4], 0), TopP([1, 0.45, 0.5], scorer="nothing"))
    assert lengths == ((10, 4), (5, 2), (3, 1))


def test_layers_that_choose_nothing_score_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    register_scorer("counted", lambda view: asked.append(view.layer) or torch.ones(len(view.hidden_states)))
    policy = TopP([1, 0.5, 0.4], scorer="counted", floor=[0, 0.5, 0.5])
    _, lengths = run(MODEL, random_batch([12, 8], 0), policy)
    assert (lengths[1:], asked) == (((6, 4), (6, 4)), [1])


@pytest.mark.parametrize(
    ("policy", "waits"),
    [
        (Threshold([0.02, 0, 0.02]), 2),
        (TopP([0.9] * LAYERS, accumulate=True, scorer="answer"), 3),
        # What does not choose by shares asks the device nothing.
        (Threshold([0, 0, 0], ceiling=[1, 0.5, 0.4]), 0),
    ],
)
def test_the_device_is_waited_for_once_a_layer_that_chooses(
    policy: AdaptivePolicy, waits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, found = random_batch([30, 20], 0), []
    to_list = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda self: found.append(self) or to_list(self))
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("waited for the device"))
    MODEL.forward_packed(batch, policy)
    assert len(found) == waits


def test_work_counts_scores_that_drop_nothing_and_is_that_of_a_schedule_otherwise() -> None:
    options = {"scorer": "answer_overlap", "keep_question": True}
    policy, schedule = Threshold([0.1] * 3, **options), LengthSchedule.absolute([20, 20, 6], **options)
    got, want = policy.macs_of_kept(CONFIG, 30, [20, 20, 6]), schedule.macs(CONFIG, 30)
    assert (got.published, got.executed - want.executed) == (want.published, 2 * 20 * CONFIG.hidden_size)
    summed = replace(schedule, accumulate=True).macs(CONFIG, 30)
    assert summed == got
    assert replace(policy, floor=(0, 0.6, 0)).macs_of_kept(CONFIG, 30, [20, 20, 6]).executed == got.executed
    assert replace(policy, floor=(0, 0.7, 0)).macs_of_kept(CONFIG, 30, [20, 20, 6]) == want


def test_what_the_text_decides_is_not_exported(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = random_batch([9], 0)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    with pytest.raises(ValueError, match="no export holds: give a LengthSchedule"):
        TopP([0.5] * LAYERS).targets(batch.packing)
