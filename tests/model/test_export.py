"""torch.export and torch.jit.trace: what gives the model's numbers, and what is refused because it would not."""

import pytest
import torch
from torch import Tensor, nn

from dtbert.model import BertForQuestionAnswering, LengthSchedule, PackedBatch, Packing
from tests.peer import make_config, make_dtbert, make_peer

IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module")
def model() -> BertForQuestionAnswering:
    trained = make_dtbert(make_peer(make_config(layers=2)), blocked=False)
    model = BertForQuestionAnswering(trained.config, backend="reference")
    model.load_state_dict(trained.state_dict())
    model.prepare()
    return model.eval()


class Scheduled(nn.Module):
    def __init__(self, model: BertForQuestionAnswering, schedule: LengthSchedule | None) -> None:
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(self, input_ids: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(input_ids, None, token_type_ids, self.schedule))


class Packed(nn.Module):
    """Sequences of 12 and 7 tokens."""

    def __init__(self, model: BertForQuestionAnswering) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        (packing,) = Packing.stack([[12, 7]], input_ids.device)
        return tuple(self.model.forward_packed(PackedBatch(input_ids, token_type_ids, position_ids, packing)))


@pytest.mark.parametrize(
    "schedule", [None, LengthSchedule.ratios([0.7, 0.4], scorer="answer")], ids=["full", "dropping"]
)
@pytest.mark.parametrize("strict", [False, True])
def test_exported_model_gives_its_numbers(
    model: BertForQuestionAnswering, schedule: LengthSchedule | None, strict: bool
) -> None:
    asked = Scheduled(model, schedule)
    exported = torch.export.export(asked, (IDS, IDS % 2), strict=strict).module()
    for ids in (IDS, IDS.flip(1)):
        torch.testing.assert_close(exported(ids, ids % 2), asked(ids, ids % 2), rtol=0, atol=0)


def test_length_may_stay_open(model: BertForQuestionAnswering) -> None:
    length = torch.export.Dim("length", min=2, max=model.config.max_position_embeddings)
    exported = torch.export.export(model, (IDS,), dynamic_shapes=({1: length},)).module()
    for ids in (IDS, torch.arange(30).reshape(2, 15)):
        torch.testing.assert_close(tuple(exported(ids)), tuple(model(ids)), rtol=0, atol=0)


def test_packed_sequences_are_exported(model: BertForQuestionAnswering) -> None:
    batch = PackedBatch.from_lists([list(range(12)), list(range(7))])
    exported = torch.export.export(Packed(model), tuple(batch.ids)).module()
    torch.testing.assert_close(exported(*batch.ids), tuple(model.forward_packed(batch)), rtol=0, atol=0)


def test_export_that_would_keep_one_mask_is_refused(model: BertForQuestionAnswering) -> None:
    with pytest.raises(ValueError, match=r"torch\.export .* attention_mask"):
        torch.export.export(model, (IDS, torch.ones_like(IDS)))


def test_export_of_weights_laid_out_for_a_cpu_is_refused_with_the_way_out(model: BertForQuestionAnswering) -> None:
    other = BertForQuestionAnswering(model.config)
    other.load_state_dict(model.state_dict())
    other.prepare()
    with pytest.raises(ValueError, match=r"torch\.export .*backend='reference'"):
        torch.export.export(other, (IDS,))
