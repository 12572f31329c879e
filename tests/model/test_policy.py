"""Policies by which the text decides, scores that remember, and layers that are left out."""

import random
from typing import Any

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


@st.composite
def policies(draw: Any, scorers: st.SearchStrategy[str] = SCORERS) -> AdaptivePolicy:
    low, high = draw(BOUNDS)
    options = {"floor": low, "ceiling": high, "scorer": draw(scorers)}
    options |= {name: draw(st.booleans()) for name in ("keep_cls", "keep_question")}
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
        forced = {p for p in places if (policy.keep_cls and p == 0) or (policy.keep_question and segments[p] == 0)}
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
