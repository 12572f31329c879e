"""Heads of whole texts against transformers, with and without dropping tokens; what they do without."""

import copy
from dataclasses import replace

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.kernels import Backend
from dtbert.model import (
    AdaptivePolicy,
    BertConfig,
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    LengthSchedule,
    PackedBatch,
    SequenceModel,
    Threshold,
    TopP,
)
from dtbert.model.scorers import BUILT_IN_SCORERS
from dtbert.profiling.watch import Clock, Stopwatch, watched_forward
from tests.model.test_agreement import SHAPES, exactly, oracle_states, random_batch
from tests.peer import make_config, make_peer, translate
from tests.tolerances import assert_as_right_as_peer

# The span head's scorers are of no use here; `random` is held by the last layer of every classifier.
SCORERS = [name for name in BUILT_IN_SCORERS if not name.startswith("answer") and name != "random"]


def classifier_peer(config: transformers.BertConfig, num_labels: int, seed: int) -> transformers.BertModel:
    """transformers' model with the encoder of `make_peer`, and heads far from 0."""
    config = copy.deepcopy(config)
    config.num_labels = num_labels
    torch.manual_seed(seed)
    peer = transformers.BertForSequenceClassification._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in (*peer.bert.pooler.parameters(), *peer.classifier.parameters()):
            parameter.normal_(0, 0.4)
    span = make_peer(config, seed)
    encoder = {name: value for name, value in span.bert.state_dict().items() if not name.startswith("pooler")}
    peer.bert.load_state_dict(encoder, strict=False)
    return peer.requires_grad_(False)


def with_weights(model: SequenceModel, peer: transformers.BertForSequenceClassification) -> SequenceModel:
    theirs = {**peer.state_dict(), "qa_outputs.weight": torch.empty(0), "qa_outputs.bias": torch.empty(0)}
    ours = translate(theirs, peer.config.num_hidden_layers)
    for part in ("weight", "bias"):
        ours[f"pooler.{part}"] = theirs[f"bert.pooler.dense.{part}"]
        ours[f"classifier.{part}"] = theirs[f"classifier.{part}"]
    model.load_state_dict({name: ours[name] for name in model.state_dict()})
    model.prepare()
    return model.eval()


def classifier(peer: transformers.BertForSequenceClassification, backend: str | None = None) -> SequenceModel:
    config, labels = BertConfig.from_dict(peer.config.to_dict()), [str(index) for index in range(peer.num_labels)]
    return with_weights(BertForSequenceClassification(config, labels, backend=backend), peer)


def sentence_encoder(
    peer: transformers.BertForSequenceClassification, pooling: str, backend: str | None = None
) -> SequenceModel:
    config = BertConfig.from_dict(peer.config.to_dict())
    return with_weights(BertForSentenceEmbedding(config, pooling, backend=backend), peer)


def pooled_by(peer: torch.nn.Module, pooling: str, ids: Tensor, mask: Tensor, segments: Tensor) -> Tensor:
    """Embeddings by the recipe of sentence-transformers' model cards."""
    states = peer.bert(ids, mask, segments).last_hidden_state
    if pooling == "cls":
        return torch.stack([one[real.bool()][0] for one, real in zip(states, mask, strict=True)])
    return (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)


@settings(max_examples=12)
@given(
    config=SHAPES,
    num_labels=st.integers(1, 5),
    batch=st.integers(1, 4),
    length=st.integers(1, 60),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from([None, "reference"]),
)
def test_heads_agree_with_transformers_on_odd_shapes(
    config: transformers.BertConfig, num_labels: int, batch: int, length: int, seed: int, backend: str | None
) -> None:
    peer = classifier_peer(config, num_labels, seed)
    ids, mask, segments = random_batch(config, batch, length, seed)
    # transformers' pooler reads the first column.
    mask[:, 0] = 1
    truth = exactly(peer)
    got = [classifier(peer, backend)(ids, mask, segments)]
    theirs, exact = ([one(ids, mask, segments).logits] for one in (peer, truth))
    for pooling in ("mean", "cls"):
        got.append(sentence_encoder(peer, pooling, backend)(ids, mask, segments))
        theirs.append(pooled_by(peer, pooling, ids, mask, segments))
        exact.append(pooled_by(truth, pooling, ids, mask, segments))
    assert_as_right_as_peer(got, theirs, exact)


def draw_schedule(data: st.DataObject, layers: int, scorer: str, least: int = 1) -> LengthSchedule:
    keeps = {"keep_cls": data.draw(st.booleans()), "keep_question": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        lengths = data.draw(st.lists(st.integers(least, 50), min_size=layers, max_size=layers))
        return LengthSchedule.absolute(sorted(lengths, reverse=True), scorer=scorer, **keeps)
    ratios = data.draw(st.lists(st.floats(0.01, 1), min_size=layers, max_size=layers))
    return LengthSchedule.ratios(sorted(ratios, reverse=True), scorer=scorer, **keeps)


def draw_texts(data: st.DataObject, seed: int) -> tuple[list[Tensor], list[Tensor]]:
    seqlens = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 120, (n,), generator=generator) for n in seqlens]
    return ids, [(torch.arange(n) >= n // 3).long() for n in seqlens]


@settings(max_examples=16)
@given(
    scorer=st.sampled_from(SCORERS),
    data=st.data(),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from([None, "reference"]),
)
def test_dropping_agrees_with_an_oracle_of_transformers_modules(
    scorer: str, data: st.DataObject, seed: int, backend: str | None
) -> None:
    layers = data.draw(st.integers(1, 4))
    peer = classifier_peer(make_config(layers=layers, heads=3, head_size=8), 3, seed)
    schedule = draw_schedule(data, layers, scorer)
    texts, segments = draw_texts(data, seed)
    batch = PackedBatch.from_lists([x.tolist() for x in texts], [x.tolist() for x in segments])

    def shown(model: torch.nn.Module, own: LengthSchedule) -> tuple[list[Tensor], list[Tensor], float]:
        """By the oracle, the first state and the mean state of the tokens that are left."""
        model.qa_outputs = None
        found = [oracle_states(model, *pair, own) for pair in zip(texts, segments, strict=True)]
        gap = min(gap for *_, gap in found)
        return [left[0] for _, left, _, _ in found], [left.mean(0) for _, left, _, _ in found], gap

    # A head of [CLS] keeps it, whether it is asked to or not.
    kept = replace(schedule, keep_cls=True)
    truth = exactly(peer)
    first, _, first_gap = shown(truth, kept)
    _, mean, mean_gap = shown(truth, schedule)
    # Two scores closer than rounding may swap.
    assume(min(first_gap, mean_gap) > 1e-5)
    by_peer = torch.stack(shown(peer, kept)[0]), torch.stack(shown(peer, schedule)[1])
    exact = torch.stack(first), torch.stack(mean)
    got = [
        classifier(peer, backend).forward_packed(batch, schedule),
        *(sentence_encoder(peer, pooling, backend).forward_packed(batch, schedule) for pooling in ("cls", "mean")),
    ]
    logits = (
        one.classifier(torch.tanh(one.bert.pooler.dense(states)))
        for one, states in ((peer, by_peer[0]), (truth, exact[0]))
    )
    theirs, right = ([one, *states] for one, states in zip(logits, (by_peer, exact), strict=True))
    assert_as_right_as_peer(got, theirs, right)


PEER = classifier_peer(make_config(layers=4, heads=3, head_size=8), 3, 0)
MODEL, MEAN = classifier(PEER), sentence_encoder(PEER, "mean")


@settings(max_examples=8)
@given(data=st.data(), seed=st.integers(0, 2**16), last=st.integers(1, 50))
def test_what_the_last_layer_keeps_beside_cls_changes_no_label(data: st.DataObject, seed: int, last: int) -> None:
    schedule = draw_schedule(data, 4, "cls")
    ids, segments = draw_texts(data, seed)
    batch = PackedBatch.from_lists([x.tolist() for x in ids], [x.tolist() for x in segments])
    want = MODEL.forward_packed(batch, schedule)
    whole = schedule.length_config[2]
    lengths = (*schedule.length_config[:3], min(whole, last if schedule.kind == "absolute" else last / 50))
    other = replace(schedule, length_config=lengths, keep_cls=True)
    assert torch.equal(MODEL.forward_packed(batch, other), want)


@settings(max_examples=8)
@given(data=st.data(), seed=st.integers(0, 2**16))
def test_a_text_does_not_see_its_batch_mates_nor_padding(data: st.DataObject, seed: int) -> None:
    schedule = draw_schedule(data, 4, "received")
    ids, segments = draw_texts(data, seed)
    batch = PackedBatch.from_lists([x.tolist() for x in ids], [x.tolist() for x in segments])
    for model in (MODEL, MEAN):
        together = model.forward_packed(batch, schedule)
        for row, one, segment in zip(together, ids, segments, strict=True):
            alone = model(one[None], None, segment[None], schedule)[0]
            torch.testing.assert_close(alone, row, atol=2e-6, rtol=2e-6)
            pad = torch.zeros(1, 7).long()
            mask = torch.cat([torch.ones_like(one[None]), pad], 1)
            padded = model(
                *(torch.cat([x[None], pad], 1) for x in (one,)), mask, torch.cat([segment[None], pad], 1), schedule
            )
            assert torch.equal(padded[0], alone)


class WithoutScatter(Backend):
    def scatter(self, *_: object) -> Tensor:
        raise AssertionError("a head of whole texts restores nothing")


@pytest.mark.parametrize("model", [MODEL, MEAN], ids=["classifier", "mean"])
@settings(max_examples=8)
@given(data=st.data(), length=st.integers(1, 40), count=st.integers(1, 3), scorer=st.sampled_from([*SCORERS, "random"]))
def test_nothing_is_restored_and_what_runs_is_what_is_counted(
    model: SequenceModel, data: st.DataObject, length: int, count: int, scorer: str
) -> None:
    schedule = data.draw(st.none() | st.just(draw_schedule(data, 4, scorer)))
    # Of one length: where only some sequences of a batch drop, the others are scored too, which no schedule counts.
    question = max(1, length // 3)
    batch = PackedBatch.from_lists([[5] * length] * count, [[0] * question + [1] * (length - question)] * count)
    model.forward_packed(batch, schedule, backend=WithoutScatter())
    watch = Stopwatch(Clock(model.device))
    with torch.inference_mode():
        watched_forward(model, batch, schedule, watch)
    flops = sum(timed.work().flops for timed in watch.timed)
    assert "restore" not in {timed.name for timed in watch.timed}
    counted = model.macs(schedule, length, question_length=question)
    run = model.executed(schedule) or LengthSchedule.ratios([1] * 4)
    lengths = [length, *run.lengths(length)]
    # LayerNorm is in the count and in no product.
    norms = length + sum(before + kept for before, kept in zip(lengths, lengths[1:], strict=False))
    assert flops == 2 * count * (counted.executed - 24 * norms)


def test_published_macs_are_those_of_the_schedule_with_this_head() -> None:
    config = BertConfig()
    with torch.device("meta"):
        model = BertForSequenceClassification(config, ["a", "b"])
        mean = BertForSentenceEmbedding(config)
    for schedule in (None, LengthSchedule.ratios([1, 0.9, 0.7, 0.5, 0.3, 0.1])):
        span = (schedule or LengthSchedule.ratios([1] * 6)).macs(config, 100).published - 2 * 769 * 100
        assert model.macs(schedule, 100).published == span + 768 * 768 + 2 * 768
        assert mean.macs(schedule, 100).published == span
    # Of the last layer's 100 tokens [CLS] alone needs a query, an output and a feed-forward; all need keys and values.
    whole = mean.macs(None, 100).executed
    saved = 99 * (768 * 768 + 2 * 768 * 3072 + 768) + 2 * 99 * 100 * 768
    assert model.macs(None, 100).executed == whole + 768 * 770 - saved


def test_half_precision_rounds_like_the_model() -> None:
    ids = torch.randint(0, 120, (3, 20))
    for model in (MODEL, MEAN):
        half = copy.deepcopy(model).to(torch.bfloat16)
        got = half(ids)
        assert got.dtype == torch.bfloat16
        torch.testing.assert_close(got.float(), model(ids), atol=0.15, rtol=0.05)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BertForSequenceClassification(MODEL.config, []), "at least one label"),
        (lambda: BertForSequenceClassification(MODEL.config, ["a", "a"]), "each once"),
        (lambda: BertForSentenceEmbedding(MODEL.config, "max"), "pooling must be 'mean' or 'cls', not 'max'"),
        (lambda: MODEL(torch.zeros(1, 5).long(), None, None, LengthSchedule.ratios([1, 1])), "2 entries, the model 4"),
        (
            lambda: MODEL(torch.zeros(1, 5).long(), None, None, LengthSchedule.ratios([0.5] * 4, scorer="answer")),
            "span head",
        ),
        (lambda: MODEL(torch.zeros(1, 5).long(), None, None, [1] * 4), "LengthSchedule, Threshold or TopP, not list"),
        (lambda: MODEL.macs(Threshold([0.1] * 4), 9), "what a Threshold takes is known when a text was read"),
    ],
)  # fmt: skip
def test_bad_arguments_are_refused(make: object, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@st.composite
def adaptive(draw: st.DrawFn, layers: int = 4) -> AdaptivePolicy:
    """A policy by which the text decides, of texts of up to 50 tokens."""
    options = {
        "scorer": draw(st.sampled_from([*SCORERS, "random"])),
        "keep_question": draw(st.booleans()),
        "accumulate": draw(st.booleans()),
        "floor": draw(st.sampled_from([0.0, 0.2])),
        "ceiling": draw(st.sampled_from([1.0, 0.6])),
    }
    if draw(st.booleans()):
        return Threshold(draw(st.lists(st.sampled_from([0, 0.01, 0.03]), min_size=layers, max_size=layers)), **options)
    return TopP(draw(st.lists(st.sampled_from([1, 0.9, 0.5]), min_size=layers, max_size=layers)), **options)


@pytest.mark.parametrize("model", [MODEL, MEAN, sentence_encoder(PEER, "cls")], ids=["classifier", "mean", "cls"])
@settings(max_examples=10)
@given(policy=adaptive(), data=st.data(), seed=st.integers(0, 2**16))
def test_what_the_text_decides_is_the_schedule_of_what_it_kept(
    model: SequenceModel, policy: AdaptivePolicy, data: st.DataObject, seed: int
) -> None:
    ids, segments = draw_texts(data, seed)
    batch = PackedBatch.from_lists([x.tolist() for x in ids], [x.tolist() for x in segments])
    together, kept = model.forward_packed(batch, policy, output_kept=True)
    assert torch.equal(together, model.forward_packed(batch, policy))
    options = {name: getattr(policy, name) for name in ("scorer", "keep_question", "accumulate")}
    for number, (row, one, segment) in enumerate(zip(together, ids, segments, strict=True)):
        lengths = [layer.lengths[number] for layer in kept]
        # No text sees its batch mates.
        alone, kept_alone = model(one[None], None, segment[None], policy, output_kept=True)
        assert [layer.lengths[0] for layer in kept_alone] == lengths
        torch.testing.assert_close(alone[0], row, atol=2e-6, rtol=2e-6)
        schedule = LengthSchedule.absolute(lengths, **options)
        by_lengths, kept_by_lengths = model(one[None], None, segment[None], schedule, output_kept=True)
        torch.testing.assert_close(by_lengths, alone, atol=2e-6, rtol=2e-6)
        for layer, other in zip(kept_alone, kept_by_lengths, strict=True):
            assert torch.equal(layer.mask, other.mask)
            assert layer.mask.sum() == layer.lengths[0]
            assert layer.mask[0, 0] or not model.reads_cls
        assert lengths[-1] == 1 or not model.reads_cls


@pytest.mark.parametrize("model", [MODEL, MEAN], ids=["classifier", "mean"])
@settings(max_examples=8)
@given(policy=adaptive(), length=st.integers(1, 40))
def test_what_runs_is_what_is_counted_where_the_text_decides(
    model: SequenceModel, policy: AdaptivePolicy, length: int
) -> None:
    # With its question kept, the question's tokens that are left are known.
    policy, question = replace(policy, keep_question=True), max(1, length // 3)
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, 120, (length,), generator=generator).tolist()
    batch = PackedBatch.from_lists([ids], [[0] * question + [1] * (length - question)])
    watch = Stopwatch(Clock(model.device))
    with torch.inference_mode():
        lengths = [layer.lengths[0] for layer in model.forward_packed(batch, policy, output_kept=True).kept]
        watched_forward(model, batch, policy, watch)
    flops = sum(timed.work().flops for timed in watch.timed)
    counted = model.macs_of_kept(policy, length, lengths, question_length=question)
    norms = length + sum(before + kept for before, kept in zip([length, *lengths], lengths, strict=False))
    assert flops == 2 * (counted.executed - 24 * norms)


def test_kept_tokens_of_a_padded_batch_lie_where_they_were_read() -> None:
    ids = torch.randint(0, 120, (2, 12))
    mask = torch.ones(2, 12).long()
    mask[1, 5:] = 0
    rows, kept = MODEL(ids, mask, None, LengthSchedule.ratios([0.5] * 4, scorer="cls"), output_kept=True)
    assert rows.shape == (2, 3)
    assert [layer.lengths for layer in kept] == [(6, 3)] * 3 + [(1, 1)]
    assert not any((layer.mask & ~mask.bool()).any() for layer in kept)
    assert kept[0].significance is not None
    assert kept[0].significance[:, 0].isinf().all(), "[CLS] stays whatever it scores"
    assert kept[-1].mask.nonzero().tolist() == [[0, 0], [1, 0]]
