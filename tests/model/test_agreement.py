"""The whole network against transformers, with and without dropping tokens."""

import copy
from collections.abc import Sequence

import numpy as np
import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.model import BertForQuestionAnswering, LengthSchedule, PackedBatch, available_scorers
from dtbert.model.scorers import BUILT_IN_SCORERS
from tests.peer import make_config, make_dtbert, make_peer
from tests.tolerances import assert_as_right_as_peer

SHAPES = st.builds(
    make_config,
    layers=st.integers(1, 4),
    heads=st.integers(1, 5),
    head_size=st.sampled_from([1, 4, 13, 32]),
    feed_forward=st.integers(1, 70),
    hidden_act=st.sampled_from(["gelu", "gelu_new", "gelu_fast", "gelu_python", "relu", "silu"]),
    type_vocab_size=st.integers(2, 3),
    layer_norm_eps=st.sampled_from([1e-12, 1e-5]),
)


def random_batch(config: transformers.BertConfig, batch: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, config.vocab_size, (batch, length), generator=generator)
    mask = (torch.rand(batch, length, generator=generator) < 0.7).long()
    mask[:, torch.randint(0, length, (1,), generator=generator)] = 1
    segments = torch.randint(0, config.type_vocab_size, (batch, length), generator=generator)
    return ids, mask, segments


def exactly(peer: torch.nn.Module) -> torch.nn.Module:
    return copy.deepcopy(peer).double()


def assert_logits_agree(
    models: BertForQuestionAnswering | Sequence[BertForQuestionAnswering], peer: torch.nn.Module, *inputs: Tensor
) -> None:
    ids, mask, segments = inputs
    real = mask.bool()
    theirs, truth = (one(ids, mask, segments) for one in (peer, exactly(peer)))
    for model in models if isinstance(models, Sequence) else [models]:
        got = model(ids, mask, segments)
        assert all((mine[~real] == -torch.inf).all() for mine in got)
        assert_as_right_as_peer(
            [mine[real] for mine in got], *([out.start_logits[real], out.end_logits[real]] for out in (theirs, truth))
        )


@given(
    config=SHAPES,
    batch=st.integers(1, 4),
    length=st.integers(1, 60),
    seed=st.integers(0, 2**16),
    backend=st.sampled_from([None, "reference"]),
    blocked=st.booleans(),
)
def test_logits_agree_with_transformers_on_odd_shapes(
    config: transformers.BertConfig, batch: int, length: int, seed: int, backend: str | None, blocked: bool
) -> None:
    peer = make_peer(config, seed)
    model = make_dtbert(peer, backend=backend, blocked=blocked)
    assert_logits_agree(model, peer, *random_batch(config, batch, length, seed))


@pytest.fixture(scope="module")
def full_size() -> transformers.BertForQuestionAnswering:
    # The published sizes and the published initialisation.
    torch.manual_seed(0)
    config = transformers.BertConfig(num_hidden_layers=6)
    peer = transformers.BertForQuestionAnswering._from_config(config, attn_implementation="eager")
    return peer.eval().requires_grad_(False)


@pytest.mark.parametrize(("batch", "length"), [(2, 1), (3, 37), (1, 512)])
def test_full_size_logits_agree_with_transformers(
    batch: int, length: int, full_size: transformers.BertForQuestionAnswering
) -> None:
    blocked, plain = (make_dtbert(full_size, blocked=blocked) for blocked in (True, False))
    assert_logits_agree([blocked, plain], full_size, *random_batch(full_size.config, batch, length, length))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_error_is_at_most_twice_transformers_own(
    dtype: torch.dtype, full_size: transformers.BertForQuestionAnswering
) -> None:
    ids, mask, segments = random_batch(full_size.config, 2, 64, 5)
    real = mask.bool()
    exact = full_size(ids, mask, segments)
    model = make_dtbert(full_size, blocked=False)
    half = BertForQuestionAnswering(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(dtype).prepare()
    got = half(ids, mask, segments)
    theirs = transformers.BertForQuestionAnswering(full_size.config).eval()
    theirs.load_state_dict(full_size.state_dict())
    their = theirs.to(dtype)(ids, mask, segments)

    def error(logits: object) -> float:
        pairs = ((logits.start_logits, exact.start_logits), (logits.end_logits, exact.end_logits))
        return max((mine[real].double() - want[real].double()).abs().max().item() for mine, want in pairs)

    assert got.start_logits.dtype == dtype
    assert 0 < error(got) <= 2 * error(their)


# The oracle of token dropping: transformers' own modules, one sequence at a time, scores from the definitions.


def oracle_overlap(ids: list[int], segments: list[int]) -> list[float]:
    """Whole multiples of 2 ** -25: sums of them are exact, so that equals are equal."""
    question = {word for word, segment in list(zip(ids, segments, strict=True))[1 : segments.count(0) - 1]}
    text = [(place, word) for place, (word, segment) in enumerate(zip(ids, segments, strict=True)) if segment]
    near = [0] * len(ids)
    for word in question:
        places = [place for place, other in text if other == word]
        for place in places:
            for token in range(max(0, place - 31), min(len(ids), place + 32)):
                near[token] += (32 - abs(token - place)) * (2**20 // len(places))
    return [value / 2**25 for value in near]


def oracle_scores(
    name: str,
    probabilities: Tensor,
    value: Tensor,
    states: Tensor,
    segments: Tensor,
    head: torch.nn.Module,
    overlap: Tensor,
) -> Tensor:
    p = probabilities.double().numpy()  # [N, n, n]
    if name == "received":
        score = p.sum((0, 1))
    elif name == "received_off_diagonal":
        score = np.where(np.eye(p.shape[1], dtype=bool), 0, p).sum((0, 1))
    elif name == "received_max":
        score = p.max((0, 1))
    elif name == "cls":
        score = p[:, 0].sum(0)
    elif name == "from_question":
        score = p[:, segments.numpy() == 0].sum((0, 1))
    elif name == "value_norm":
        score = (p.sum(1) * np.linalg.norm(value.double().numpy(), axis=-1)).sum(0)
    elif name == "answer":
        score = head(states).double().numpy().max(1)
    elif name == "overlap":
        score = overlap.numpy()
    elif name in ("answer_overlap", "answer_overlap_3"):
        weight = 3 if name.endswith("3") else 2
        score = head(states).double().numpy().max(1) + weight * np.log(overlap.numpy() + 0.1)
    else:
        raise AssertionError(name)
    return torch.from_numpy(np.asarray(score))


def oracle(
    peer: transformers.BertForQuestionAnswering, ids: Tensor, segments: Tensor, schedule: LengthSchedule
) -> tuple[Tensor, list[Tensor], float]:
    """Logits ``[n, 2]``, rows left after each layer, and the smallest gap between a kept and a dropped score."""
    final, _, kept, gap = oracle_states(peer, ids, segments, schedule)
    return peer.qa_outputs(final), kept, gap


def oracle_states(
    peer: transformers.BertForQuestionAnswering, ids: Tensor, segments: Tensor, schedule: LengthSchedule
) -> tuple[Tensor, Tensor, list[Tensor], float]:
    """States ``[n, H]``, restored, and ``[K, H]`` of the tokens that are left; the rest as `oracle`."""
    states = peer.bert.embeddings(input_ids=ids[None], token_type_ids=segments[None])[0]
    final, rows, kept, gap = states.clone(), torch.arange(len(ids)), [], float("inf")
    lengths = schedule.lengths(len(ids))
    overlap = torch.tensor(oracle_overlap(ids.tolist(), segments.tolist()), dtype=torch.float64)
    of_layers = zip(peer.bert.encoder.layer, lengths, schedule.scorers, schedule.keeps_question, strict=True)
    for layer, count, scorer, keeps_question in of_layers:
        context, probabilities = layer.attention.self(states[None])
        context, probabilities, keep = context[0], probabilities[0], torch.arange(len(rows))
        if count < len(rows):
            value = layer.attention.self.value(states).unflatten(1, (peer.config.num_attention_heads, -1))
            now = segments[rows]
            about = value.transpose(0, 1), states, now, peer.qa_outputs, overlap[rows]
            score = oracle_scores(scorer, probabilities, *about)
            if keeps_question:
                score[now == 0] = torch.inf
            if schedule.keep_cls:
                score[0] = torch.inf
            ranked = sorted(range(len(rows)), key=lambda i, score=score: (-score[i].item(), i))
            last, first_out = score[ranked[count - 1]].item(), score[ranked[count]].item()
            # Overlaps are exact, and equals go by their place.
            exact = last == torch.inf or (scorer == "overlap" and last == first_out)
            gap = min(gap, float("inf") if exact else (last - first_out) / max(1.0, abs(last)))
            keep = torch.tensor(sorted(ranked[:count]))
        final[rows] = states
        rows, states = rows[keep], layer.attention.output(context[keep], states[keep])
        states = layer.output(layer.intermediate(states), states)
        kept.append(rows)
    final[rows] = states
    return final, states, kept, gap


@pytest.mark.parametrize("scorer", [name for name in BUILT_IN_SCORERS if name != "random"])
@settings(max_examples=25)
@given(
    data=st.data(),
    seed=st.integers(0, 2**16),
    absolute=st.booleans(),
    backend=st.sampled_from([None, "reference"]),
    blocked=st.booleans(),
)
def test_dropping_agrees_with_an_oracle_of_transformers_modules(
    scorer: str, data: st.DataObject, seed: int, absolute: bool, backend: str | None, blocked: bool
) -> None:
    layers = data.draw(st.integers(1, 4))
    peer = make_peer(make_config(layers=layers, heads=3, head_size=8), seed)
    seqlens = data.draw(st.lists(st.integers(1, 50), min_size=1, max_size=3))
    each = st.lists(st.booleans(), min_size=layers, max_size=layers)
    keeps = {"keep_cls": data.draw(st.booleans()), "keep_question": data.draw(st.booleans() | each)}
    if absolute:
        lengths = sorted(data.draw(st.lists(st.integers(1, 50), min_size=layers, max_size=layers)), reverse=True)
        schedule = LengthSchedule.absolute(lengths, scorer=scorer, **keeps)
    else:
        ratios = sorted(data.draw(st.lists(st.floats(0.01, 1), min_size=layers, max_size=layers)), reverse=True)
        schedule = LengthSchedule.ratios(ratios, scorer=scorer, **keeps)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 120, (n,), generator=generator) for n in seqlens]
    segments = [(torch.arange(n) >= n // 3).long() for n in seqlens]
    wanted = [oracle(exactly(peer), *pair, schedule) for pair in zip(ids, segments, strict=True)]
    # Two scores closer than rounding may swap.
    assume(min(gap for _, _, gap in wanted) > 1e-5)
    model = make_dtbert(peer, backend=backend, blocked=blocked)
    batch = PackedBatch.from_lists([x.tolist() for x in ids], [x.tolist() for x in segments])
    got = model.forward_packed(batch, schedule)
    theirs = torch.cat([oracle(peer, *pair, schedule)[0] for pair in zip(ids, segments, strict=True)])
    assert_as_right_as_peer([torch.stack(got, 1)], [theirs], [torch.cat([logits for logits, _, _ in wanted])])
    encoding = model.encoder(batch, schedule, backend=model.backend, span_head=model.span_head(model.backend))
    starts = batch.packing.cu_seqlens.tolist()
    for layer, rows in enumerate(encoding.kept):
        expected = torch.cat([kept[layer] + start for (_, kept, _), start in zip(wanted, starts, strict=False)])
        got_rows = torch.arange(sum(seqlens)) if rows is None else rows
        assert got_rows.tolist() == expected.tolist()


def test_every_built_in_scorer_is_tested() -> None:
    assert set(BUILT_IN_SCORERS) <= set(available_scorers())
    assert set(BUILT_IN_SCORERS) == {
        *("received", "received_off_diagonal", "received_max", "cls", "from_question", "value_norm"),
        *("answer", "overlap", "answer_overlap", "answer_overlap_3", "random"),
    }
