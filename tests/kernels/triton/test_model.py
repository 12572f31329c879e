"""The whole model through the interpreted kernels, against transformers, with and without dropping tokens."""

from functools import partial

import pytest
import torch
import transformers
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dtbert.kernels.triton import Triton
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch, Threshold, TopP
from dtbert.model.scorers import BUILT_IN_SCORERS, register_scorer
from tests.model.test_agreement import assert_logits_agree, exactly, oracle, random_batch
from tests.model.test_heads import classifier, classifier_peer, sentence_encoder
from tests.peer import make_config, make_dtbert, make_peer
from tests.tolerances import assert_as_right_as_peer


@pytest.fixture(scope="module")
def small() -> tuple[transformers.BertForQuestionAnswering, BertForQuestionAnswering]:
    peer = make_peer(make_config(layers=2, heads=2, head_size=16))
    return peer, make_dtbert(peer, backend="triton")


@settings(max_examples=5)
@given(batch=st.integers(1, 3), length=st.integers(1, 20), seed=st.integers(0, 99))
def test_logits_agree_with_transformers(small: tuple, batch: int, length: int, seed: int) -> None:
    peer, model = small
    assert type(model.backend) is Triton
    assert model.backend_name == "triton"
    assert_logits_agree(model, peer, *random_batch(peer.config, batch, length, seed))


def test_logits_agree_with_transformers_past_a_block_of_keys(small: tuple) -> None:
    peer, model = small
    assert_logits_agree(model, peer, *random_batch(peer.config, 1, 140, 3))


def test_published_size_agrees_with_transformers() -> None:
    config = transformers.BertConfig(num_hidden_layers=6, hidden_act="relu")
    peer = transformers.BertForQuestionAnswering._from_config(config, attn_implementation="eager")
    peer.eval().requires_grad_(False)
    assert_logits_agree(make_dtbert(peer, backend="triton"), peer, *random_batch(config, 1, 12, 0))


@pytest.mark.parametrize(
    "schedule",
    [
        LengthSchedule.ratios([0.6, 0.3], scorer="received", keep_question=True),
        LengthSchedule.ratios([0.6, 0.3], scorer="answer_overlap"),
    ],
    ids=lambda schedule: schedule.scorers[0],
)
@torch.inference_mode()
def test_a_compiled_model_launches_the_kernels_of_a_plain_call(small: tuple, schedule: LengthSchedule) -> None:
    model = small[1]
    torch.compiler.reset()
    compiled = torch.compile(model.forward_packed, backend="aot_eager", fullgraph=True)
    ids = [torch.randint(50, (length,)).tolist() for length in (9, 5, 20)]
    batch = PackedBatch.from_lists(ids, [[int(place > 3) for place in range(len(one))] for one in ids])
    assert torch.equal(torch.stack(compiled(batch, schedule)), torch.stack(model.forward_packed(batch, schedule)))


@pytest.mark.parametrize("scorer", [name for name in BUILT_IN_SCORERS if name != "random"])
@settings(max_examples=3)
@given(
    seqlens=st.lists(st.integers(1, 30), min_size=1, max_size=2),
    ratios=st.tuples(st.floats(0.5, 1), st.floats(0.05, 0.5)),
    keep_cls=st.booleans(),
    keep_question=st.booleans() | st.tuples(st.booleans(), st.booleans()),
    seed=st.integers(0, 99),
)
def test_dropping_agrees_with_an_oracle_of_transformers_modules(
    small: tuple,
    scorer: str,
    seqlens: list[int],
    ratios: tuple[float, float],
    keep_cls: bool,
    keep_question: bool | tuple[bool, bool],
    seed: int,
) -> None:
    peer, model = small
    schedule = LengthSchedule.ratios(ratios, scorer=scorer, keep_cls=keep_cls, keep_question=keep_question)
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 120, (n,), generator=generator) for n in seqlens]
    segments = [(torch.arange(n) >= n // 3).long() for n in seqlens]
    wanted = [oracle(exactly(peer), *pair, schedule) for pair in zip(ids, segments, strict=True)]
    # Two scores closer than rounding may swap.
    assume(min(gap for _, _, gap in wanted) > 1e-5)
    batch = PackedBatch.from_lists([x.tolist() for x in ids], [x.tolist() for x in segments])
    got = torch.stack(model.forward_packed(batch, schedule), 1)
    theirs = torch.cat([oracle(peer, *pair, schedule)[0] for pair in zip(ids, segments, strict=True)])
    assert_as_right_as_peer([got], [theirs], [torch.cat([logits for logits, _, _ in wanted])])


def test_dropping_gives_the_same_bits_in_any_batch(small: tuple) -> None:
    _, model = small
    schedule = LengthSchedule.ratios([0.7, 0.3], scorer="received")
    sequences = [torch.randint(0, 120, (n,)).tolist() for n in (7, 20)]
    together = torch.stack(model.forward_packed(PackedBatch.from_lists(sequences), schedule), 1)
    alone = [torch.stack(model.forward_packed(PackedBatch.from_lists([ids]), schedule), 1) for ids in sequences]
    # Products are a library's, whose rounding depends on the number of rows.
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=1e-5)


def test_scores_that_lie_apart_are_read_as_they_are(small: tuple) -> None:
    peer, model = small
    register_scorer("first_value", lambda view: view.hidden_states[:, 0])
    schedule = LengthSchedule.ratios([0.6, 0.3], scorer="first_value")
    batch = PackedBatch.from_lists([list(range(20)), list(range(30, 37))])
    kept, wanted = (
        one.encoder(batch, schedule, backend=one.backend).kept
        for one in (model, make_dtbert(peer, backend="reference"))
    )
    assert [rows.tolist() for rows in kept] == [rows.tolist() for rows in wanted]


def test_what_was_kept_and_scored_is_told(small: tuple) -> None:
    peer, model = small
    # In parts, for the kernel that drops, unless somebody wants to see it.
    schedule = LengthSchedule.ratios([0.6, 0.3], scorer="received_max", keep_cls=True)
    batch = PackedBatch.from_lists([list(range(12)), list(range(30, 35))])
    got, want = (
        one.forward_packed(batch, schedule, output_kept=True).kept
        for one in (model, make_dtbert(peer, backend="reference"))
    )
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.mask, theirs.mask)
        torch.testing.assert_close(mine.significance, theirs.significance, atol=1e-5, rtol=1e-5, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_half_precision_error_is_at_most_twice_transformers_own(dtype: torch.dtype, small: tuple) -> None:
    peer, model = small
    ids, mask, segments = random_batch(peer.config, 2, 30, 5)
    real = mask.bool()
    exact = peer(ids, mask, segments)
    half = BertForQuestionAnswering(model.config, backend="triton").eval()
    half.load_state_dict(model.state_dict())
    theirs = transformers.BertForQuestionAnswering._from_config(peer.config, attn_implementation="eager").eval()
    theirs.load_state_dict(peer.state_dict())

    def error(logits: object) -> float:
        pairs = ((logits.start_logits, exact.start_logits), (logits.end_logits, exact.end_logits))
        return max((mine[real].double() - want[real].double()).abs().max().item() for mine, want in pairs)

    with torch.no_grad():
        got, their = half.to(dtype)(ids, mask, segments), theirs.to(dtype)(ids, mask, segments)
    assert 0 < error(got) <= 2 * error(their)


def test_training_takes_the_reference_unless_triton_is_asked_for() -> None:
    model = make_dtbert(make_peer(make_config(layers=1))).requires_grad_(True)
    assert model.backend_name == "reference"
    asked = make_dtbert(make_peer(make_config(layers=1)), backend="triton").requires_grad_(True)
    with pytest.raises(ValueError, match="gradients are needed, the backend 'triton' is forward only"):
        asked(torch.zeros(1, 3, dtype=torch.int64))


def test_models_too_large_for_the_kernels_are_refused() -> None:
    for sizes, message in (
        ({"heads": 1, "head_size": 160}, "takes heads of at most 128 values, not of 160"),
        ({"heads": 65, "head_size": 64}, "takes states of at most 4,096 values, not of 4,160"),
        ({"max_position_embeddings": 20_000}, "takes sequences of at most 16,384 tokens, not of 20,000"),
    ):
        config = BertConfig.from_dict(make_config(layers=1, **sizes).to_dict())
        model = BertForQuestionAnswering(config, backend="triton").requires_grad_(False)
        with pytest.raises(ValueError, match=message):
            model(torch.zeros(1, 3, dtype=torch.int64))


@pytest.mark.parametrize("scorer", ["received", "from_question"])
def test_heads_of_whole_texts_restore_nothing_and_agree_with_plain_steps(
    scorer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer = classifier_peer(make_config(layers=4, heads=2, head_size=16), 3, 0)
    options = {"scorer": scorer, "keep_question": True}
    lengths, top = LengthSchedule.ratios([0.8, 0.6, 0.3, 0.2], **options), TopP([0.9, 0.7, 0.7, 0.8], **options)
    ids = [torch.arange(7, 7 + length).tolist() for length in (23, 9, 1)]
    batch = PackedBatch.from_lists(ids, [[int(place > 3) for place in range(len(one))] for one in ids])

    def refuse(*_: object) -> None:
        raise AssertionError("a head of whole texts restores nothing")

    monkeypatch.setattr(Triton, "scatter", refuse)
    mean, cls = (partial(sentence_encoder, pooling=pooling) for pooling in ("mean", "cls"))
    for make, policy in ((classifier, lengths), (mean, lengths), (cls, lengths), (classifier, top)):
        got, wanted = (make(peer, backend=name).forward_packed(batch, policy) for name in ("triton", "reference"))
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scorer", ["received", "answer_overlap"])
def test_the_text_decides_as_on_the_reference(small: tuple, scorer: str) -> None:
    peer, model = small
    options = {"scorer": scorer, "keep_question": True, "accumulate": True}
    batch = PackedBatch.from_lists([list(range(14)), list(range(30, 37))], [[0] * 5 + [1] * 9, [0] * 3 + [1] * 4])
    for policy in (Threshold([0.07, 0.09], **options), TopP([0.9, 0.7], **options)):
        got, want = (
            one.forward_packed(batch, policy, output_kept=True)
            for one in (model, make_dtbert(peer, backend="reference"))
        )
        assert [layer.lengths for layer in got.kept] == [layer.lengths for layer in want.kept]
        assert got.kept[-1].lengths < (14, 7)
        torch.testing.assert_close(got.start_logits, want.start_logits, atol=1e-5, rtol=1e-5)
