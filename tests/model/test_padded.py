"""The network over padded batches, as torch.export sees it, against the packed one."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.model import (
    BertConfig,
    BertEncoder,
    BertForQuestionAnswering,
    LayerView,
    LengthSchedule,
    Threshold,
    register_scorer,
)
from dtbert.model.batch import PaddedInputs
from dtbert.model.padded import encode_padded, lengths_of
from dtbert.model.scorers import BUILT_IN_SCORERS

CONFIG = BertConfig(
    vocab_size=30,
    hidden_size=16,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=24,
    max_position_embeddings=40,
    initializer_range=0.5,
)


@pytest.fixture(scope="module")
def model() -> BertForQuestionAnswering:
    """In float64, so that a choice among tokens never hangs on rounding."""
    model = BertForQuestionAnswering(CONFIG, backend="reference")
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.double().requires_grad_(False)


def padded(batch: int, length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, a mask with padding on either side or in the middle, and segments."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(CONFIG.vocab_size, (batch, length), generator=generator)
    mask = torch.randint(4, (batch, length), generator=generator) > 0
    mask[torch.arange(batch), torch.randint(length, (batch,), generator=generator)] = True
    segments = (torch.arange(length) >= torch.randint(length + 1, (batch, 1), generator=generator)).long()
    return ids, mask, segments


def both(
    model: BertForQuestionAnswering,
    schedule: LengthSchedule | None,
    ids: Tensor,
    mask: Tensor | None,
    segments: Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits ``[2, B, S]``: of the padded network, and of the packed one."""
    head = model.span_head(model.backend)
    states = encode_padded(model.encoder, PaddedInputs(ids, mask, segments), schedule, span_head=head).states
    logits = head(states).permute(2, 0, 1)
    if mask is not None:
        logits = logits.masked_fill(~mask, -torch.inf)
    return logits, torch.stack(tuple(model(ids, mask, segments, schedule)))


@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.lists(st.floats(0.02, 1), min_size=3, max_size=3),
    st.tuples(*[st.sampled_from(BUILT_IN_SCORERS)] * 3),
    st.booleans(),
    st.booleans() | st.lists(st.booleans(), min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from([[], [], [0], [1], [0, 2]]),
    st.integers(0, 2**16),
)
def test_padded_network_gives_the_packed_ones_numbers(
    model: BertForQuestionAnswering,
    batch: int,
    length: int,
    ratios: list[float],
    scorers: tuple[str, ...],
    keep_cls: bool,
    keep_question: bool | list[bool],
    masked: bool,
    skipped: list[int],
    seed: int,
) -> None:
    falling = sorted(ratios, reverse=True)
    options = {"scorer": scorers, "keep_cls": keep_cls, "keep_question": keep_question, "skip_layers": skipped}
    ids, mask, segments = padded(batch, length, seed)
    for schedule in (
        None,
        LengthSchedule.ratios(falling, **options),
        LengthSchedule.absolute([max(1, round(30 * ratio)) for ratio in falling], **options),
    ):
        got, want = both(model, schedule, ids, mask if masked else None, segments)
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("masked", [True, False])
def test_exported_encoder_gives_its_hidden_states(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = BertEncoder(CONFIG, pooler=True, backend="reference").double().requires_grad_(False)
    encoder.reset_parameters(torch.Generator().manual_seed(0))
    ids, mask, segments = padded(3, 17, 0)
    inputs = ids, mask if masked else None, segments, LengthSchedule.ratios([0.7, 0.7, 0.2], keep_cls=True)
    want = encoder(*inputs, output_hidden_states=True)
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    got = encoder(*inputs, output_hidden_states=True)
    assert len(got.hidden_states) == 4
    torch.testing.assert_close(tuple(got), tuple(want), atol=1e-10, rtol=1e-10)


def test_what_cannot_be_exported_is_refused(model: BertForQuestionAnswering) -> None:
    def shortest_first(view: LayerView) -> Tensor:
        return -view.position_ids.float()

    register_scorer("test_padded", shortest_first)
    schedule = LengthSchedule.ratios([1, 1, 0.5], scorer="test_padded")
    with pytest.raises(ValueError, match=r"'test_padded' reads packed tokens: .* received, .* forward_packed"):
        both(model, schedule, *padded(2, 5, 0))
    one = PaddedInputs(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="a bare encoder has none"):
        encode_padded(model.encoder, one, LengthSchedule.ratios([1, 1, 0.5], scorer="answer"))
    with pytest.raises(ValueError, match="2 entries, the model 3 layers"):
        encode_padded(model.encoder, one, LengthSchedule.ratios([1, 0.5]))
    for policy, message in (
        (Threshold([0.01] * 3), "a policy of the kind 'threshold'"),
        (LengthSchedule.ratios([1, 1, 0.5], accumulate=True), "accumulated scores"),
    ):
        with pytest.raises(ValueError, match=f"{message}: give a schedule of ratios"):
            encode_padded(model.encoder, one, policy)
    with pytest.raises(ValueError, match="does not take output_kept"):
        encode_padded(model.encoder, one, output_kept=True)


@settings(max_examples=300)
@given(st.one_of(st.floats(1e-6, 1), st.integers(1, 1000).map(lambda n: n / 1000), st.integers(1, 600)))
def test_lengths_of_a_tensor_are_those_of_the_schedule(entry: float) -> None:
    schedule = LengthSchedule("absolute" if isinstance(entry, int) else "ratios", (entry,))
    want = [schedule.lengths(length)[0] for length in range(1, 513)]
    assert lengths_of(schedule, 0, torch.arange(1, 513)).tolist() == want
