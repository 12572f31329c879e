"""torch.export: what gives the model's numbers, and what is refused because it would not."""

import pytest
import torch
from torch import Tensor, nn

from dtbert.kernels import BackendName
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


class Masked(Scheduled):
    def forward(self, input_ids: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        return tuple(self.model(input_ids, mask, (input_ids > 40).long(), self.schedule))


class Packed(nn.Module):
    """Sequences of 12 and 7 tokens."""

    def __init__(self, model: BertForQuestionAnswering) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, token_type_ids: Tensor, position_ids: Tensor) -> tuple[Tensor, ...]:
        (packing,) = Packing.stack([[12, 7]], input_ids.device)
        return tuple(self.model.forward_packed(PackedBatch(input_ids, token_type_ids, position_ids, packing)))


@pytest.mark.parametrize(
    ("schedule", "strict"),
    [(None, False), (LengthSchedule.ratios([0.7, 0.4], scorer="answer"), True)],
    ids=["full", "dropping, strict"],
)
def test_exported_model_gives_its_numbers(
    model: BertForQuestionAnswering, schedule: LengthSchedule | None, strict: bool
) -> None:
    asked = Scheduled(model, schedule)
    exported = torch.export.export(asked, (IDS, IDS % 2), strict=strict).module()
    for ids in (IDS, IDS.flip(1)):
        torch.testing.assert_close(exported(ids, ids % 2), asked(ids, ids % 2), atol=1e-5, rtol=1e-5)


def of_layers(*scorers: str) -> LengthSchedule:
    return LengthSchedule.ratios([0.8, 0.5, 0.3][: len(scorers)], scorer=scorers, keep_question=True)


@pytest.mark.parametrize(
    ("schedule", "masked"),
    [(None, False), (of_layers("answer_overlap", "received"), True)],
    ids=["full, one length", "dropping, masked"],
)
def test_batch_and_length_may_stay_open(
    model: BertForQuestionAnswering, schedule: LengthSchedule | None, masked: bool
) -> None:
    asked = Masked(model, schedule)
    mask = (lambda ids: (ids % 5 > 0).long()) if masked else lambda ids: None
    open_sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    shapes = (open_sizes, open_sizes if masked else None)
    exported = torch.export.export(asked, (IDS, mask(IDS)), dynamic_shapes=shapes).module()
    for batch, length in ((2, 12), (3, 31), (5, 2)):
        ids = torch.randint(100, (batch, length))
        ids[:, 1] = 1
        torch.testing.assert_close(exported(ids, mask(ids)), asked(ids, mask(ids)), atol=1e-5, rtol=1e-5)


def test_one_sequence_of_any_length_drops_tokens_for_good(model: BertForQuestionAnswering) -> None:
    asked = Masked(model, of_layers("cls", "from_question"))
    length = torch.export.Dim("length", min=2, max=model.config.max_position_embeddings)
    exported = torch.export.export(asked, (IDS[:1], None), dynamic_shapes=({1: length}, None))
    products = [node.meta["val"].shape for node in exported.graph.nodes if "linear" in str(node.target)]
    assert len({str(shape[0]) for shape in products}) > 2  # the length, and what each layer leaves of it
    for tokens in (2, 12, 30):
        ids = torch.randint(100, (1, tokens))
        torch.testing.assert_close(exported.module()(ids, None), asked(ids, None), atol=1e-5, rtol=1e-5)


def test_packed_sequences_are_exported(model: BertForQuestionAnswering) -> None:
    batch = PackedBatch.from_lists([list(range(12)), list(range(7))])
    exported = torch.export.export(Packed(model), tuple(batch.ids)).module()
    torch.testing.assert_close(exported(*batch.ids), tuple(model.forward_packed(batch)), rtol=0, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "native"])
def test_export_of_weights_laid_out_for_a_cpu_is_refused_with_the_way_out(
    model: BertForQuestionAnswering, backend: BackendName, built_steps: None
) -> None:
    other = BertForQuestionAnswering(model.config, backend=backend)
    other.load_state_dict(model.state_dict())
    other.prepare()
    with pytest.raises(ValueError, match=rf"torch\.export .*'{backend}' .*backend='reference'"):
        torch.export.export(other, (IDS,))
