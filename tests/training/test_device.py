"""A step as a GPU takes it: nothing left on the host, and no wait, for a meta device has no values to wait for."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dtbert.model import BertConfig, BertForQuestionAnswering, PackedBatch, Packing
from dtbert.training import Distillation, LengthDrop
from dtbert.training.backend import TrainingBackend
from dtbert.training.data import LabelledBatch
from dtbert.training.distillation import SpanTeacher
from dtbert.training.length_drop import sub_models
from dtbert.training.losses import span_loss
from dtbert.training.step import Pass, SpanModel, losses_of_step

LENGTHS = [9, 30, 1, 22]
META = torch.device("meta")
CONFIG = BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)


class Launches(TorchDispatchMode):
    """Counts what goes to the device, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.count += not any(result.alias_info is not None for result in func._schema.returns)
        return func(*args, **(kwargs or {}))


def labelled(lengths: list[int]) -> LabelledBatch:
    (packing,) = Packing.stack([lengths], META)
    ids = torch.zeros(3, packing.num_tokens, dtype=torch.int64, device=META)
    places = torch.zeros(2, len(lengths), dtype=torch.int64, device=META)
    return LabelledBatch(PackedBatch(*ids.unbind(), packing), *places.unbind(), ())


def model() -> BertForQuestionAnswering:
    with META:
        return BertForQuestionAnswering(CONFIG)


def label_loss(full: Pass, batch: LabelledBatch) -> torch.Tensor:
    return span_loss(full.logits, batch.batch.packing, batch.starts, batch.ends)


def launches(drop: LengthDrop | None, lengths: list[int]) -> int:
    drawn = sub_models(drop, CONFIG.num_hidden_layers, 0, 0) if drop else []
    answer_loss = drop.answer_loss if drop else 0.0
    backend = TrainingBackend(0.1, 0.1)
    with Launches() as counted:
        for loss in losses_of_step(
            SpanModel(model()), labelled(lengths), backend, drawn, label_loss, answer_loss=answer_loss
        ):
            assert loss.device == META
            loss.backward()
    return counted.count


@pytest.mark.parametrize("scorer", ["received", "cls", "from_question", "value_norm", "answer_overlap+question", None])
def test_step_waits_for_nothing_and_launches_as_much_for_many_windows_as_for_few(scorer: str | None) -> None:
    drop = None if scorer is None else LengthDrop(1, 0.5, 0.0, (scorer,), answer_loss=1.0)
    assert launches(drop, LENGTHS) == launches(drop, 25 * LENGTHS)


@pytest.mark.parametrize("kind", ["prediction", "intermediate"])
def test_teacher_is_asked_without_a_wait(kind: str) -> None:
    teacher = SpanTeacher(model(), Distillation(kind, hard_label_weight=0.5), CONFIG)  # type: ignore[arg-type]
    drawn = sub_models(LengthDrop(1, 0.5), CONFIG.num_hidden_layers, 0, 0)
    backend = TrainingBackend(0.1, 0.1, keep=teacher.distillation.keep)
    for loss in losses_of_step(SpanModel(model()), labelled(LENGTHS), backend, drawn, teacher.loss):
        loss.backward()


@pytest.mark.parametrize("scorer", ["received", "answer_overlap"])
def test_flash_attention_takes_packed_tokens_and_gives_gradients(monkeypatch: pytest.MonkeyPatch, scorer: str) -> None:
    monkeypatch.setattr(TrainingBackend, "_is_packed", lambda self, qkv: True)
    drop = LengthDrop(1, 0.5, 0.0, (scorer,))
    assert launches(drop, LENGTHS) == launches(drop, 25 * LENGTHS)
