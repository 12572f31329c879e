"""The steps of the loop: learning rate, clipping, decay, dropout, sub-models, bfloat16, and the options of all that."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_pre_hook

from dtbert.training import Distillation, LengthDrop, TrainingOptions
from dtbert.training.backend import TrainingBackend
from dtbert.training.data import LabelledBatch
from dtbert.training.losses import span_loss
from dtbert.training.precision import NarrowWeights
from dtbert.training.step import Pass, SpanModel, losses_of_step
from tests.training.conftest import MakeTrainer, TrainTiny, metrics, weights


def test_steps_have_the_planned_learning_rate_and_clipped_gradients(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(learning_rate=1e-3, warmup=0.3, max_grad_norm=1e-3)
    rates, norms = [], []

    def look(optimizer: torch.optim.Optimizer, *_: object) -> None:
        gradients = [one.grad for group in optimizer.param_groups for one in group["params"]]
        rates.append([group["lr"] for group in optimizer.param_groups])
        norms.append(torch.nn.utils.get_total_norm(gradients).item())

    with register_optimizer_step_pre_hook(look):
        trainer.run()
    planned = [trainer.options.learning_rate_at(step, trainer.num_steps) for step in range(trainer.num_steps)]
    assert rates == [[rate, rate] for rate in planned]
    assert 0 < planned[0] < 5e-4 < 8e-4 < max(planned) <= 1e-3
    assert planned[-1] < 3e-4
    # Without clipping they would be some thousand times that.
    assert norms == [pytest.approx(1e-3, rel=1e-3)] * trainer.num_steps


@pytest.mark.parametrize("where", ["hidden_dropout", "attention_dropout"])
def test_dropout_is_used(train_tiny: TrainTiny, tmp_path: Path, where: str) -> None:
    for name, chance in (("without", 0.0), ("with", 0.3)):
        train_tiny(name, epochs=0.2, **{where: chance})
    without, dropped = (metrics(tmp_path / name)[0]["loss"] for name in ("without", "with"))
    assert dropped != pytest.approx(without, rel=1e-4)


def test_learning_rate_rises_then_falls_to_zero_after_the_end() -> None:
    options = TrainingOptions(learning_rate=1.0, warmup=0.25)
    rates = [options.learning_rate_at(step, 40) for step in range(41)]
    assert max(rates) == rates[10] == 1
    assert rates[:10] == sorted(rates[:10])
    assert rates[0] > 0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[40] == 0
    assert rates[25] == pytest.approx(0.5)


def test_decay_is_for_matrices_alone(train_tiny: TrainTiny) -> None:
    plain, decayed = (
        train_tiny(name, epochs=0.25, learning_rate=1e-2, weight_decay=decay).model
        for name, decay in (("plain", 0.0), ("decayed", 0.5))
    )
    for (name, one), other in zip(plain.named_parameters(), decayed.parameters(), strict=True):
        assert torch.equal(one, other) == (name.endswith("bias") or "norm" in name), name


def test_every_option_of_a_run_is_checked() -> None:
    for name, value in [
        ("epochs", 0.0), ("batch_tokens", 0), ("learning_rate", -1.0), ("learning_rate", math.nan), ("warmup", 1.0),
        ("hidden_dropout", 1.0), ("attention_dropout", -0.1), ("weight_decay", math.nan), ("max_grad_norm", 0.0),
        ("save_every", 0), ("eval_every", -1), ("seed", -1), ("epochs", math.inf),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=f"^{name} must be .* not {value}"):
            TrainingOptions(**{name: value})
    for name, value in [("temperature", 0.0), ("hard_label_weight", -1.0)]:
        with pytest.raises(ValueError, match=f"^{name} must be .* not {value}"):
            Distillation(**{name: value})


def test_window_that_does_not_fit_a_step_is_refused(make_trainer: MakeTrainer) -> None:
    with pytest.raises(ValueError, match="22 tokens, a step 16"):
        make_trainer(batch_tokens=16)


def test_full_pass_never_leaves_out_a_layer_or_token_and_sub_models_do(make_trainer: MakeTrainer) -> None:
    trainer = make_trainer(length_drop=LengthDrop(1, 0.2, 0.7))
    # Of each pass: the tokens that come in, and those that leave each layer that is run.
    passes: list[list[int]] = []
    encoder = trainer.model.encoder
    encoder.register_forward_pre_hook(lambda _, inputs: passes.append([inputs[0].packing.num_tokens]))
    for layer in encoder.layers:
        layer.register_forward_hook(lambda _, __, states: passes[-1].append(len(states)))
    trainer.run()
    assert len(passes) == 3 * 8
    assert all(len(tokens) == 3 and len(set(tokens)) == 1 for tokens in passes[0::3])
    assert min(len(tokens) for tokens in passes[1::3]) < 3
    assert all(len(tokens) == 3 and len(set(tokens)) == 3 for tokens in passes[2::3])


def test_bf16_trains_float32_weights_like_float32(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtbert.kernels.cpu.multiplies_natively", lambda dtype: True)
    options = {"hidden_dropout": 0.0, "attention_dropout": 0.0, "learning_rate": 1e-3}
    for name, bf16 in (("wide", False), ("narrow", True)):
        make_trainer(name, **options, bf16=bf16).run()
    wide, narrow = ([record["loss"] for record in metrics(tmp_path / name)] for name in ("wide", "narrow"))
    assert wide != narrow
    assert narrow == pytest.approx(wide, rel=0.02)
    assert {value.dtype for value in weights(tmp_path / "narrow").values()} == {torch.float32}


def test_bf16_is_float32_where_a_cpu_only_emulates_it(
    make_trainer: MakeTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("dtbert.kernels.cpu.multiplies_natively", lambda dtype: False)
    for name, bf16 in (("wide", False), ("narrow", True)):
        make_trainer(name, bf16=bf16).run()
        assert ("computed in float32" in caplog.text) == bf16
    wide, narrow = (weights(tmp_path / name) for name in ("wide", "narrow"))
    assert all(torch.equal(narrow[name], value) for name, value in wide.items())


def test_sub_models_by_thresholds_lose_tokens(make_trainer: MakeTrainer) -> None:
    drop = LengthDrop(1, 0.4, scorers=("answer_overlap+question",), policies=("threshold",), answer_loss=1.0)
    trainer = make_trainer(length_drop=drop)
    entered: list[int] = []
    trainer.model.encoder.layers[1].register_forward_pre_hook(lambda _, inputs: entered.append(len(inputs[0])))
    trainer.run()
    assert sum(entered[0::3]) > sum(entered[1::3]) > sum(entered[2::3])


def test_bf16_rounds_weights_and_gradients_and_nothing_else(make_trainer: MakeTrainer) -> None:
    """The copy is the masters, rounded; its gradients are added up in float32."""
    trainer = make_trainer(bf16=True, hidden_dropout=0.0, attention_dropout=0.0)
    assert trainer.model.dtype == torch.float32
    masters = dict(trainer.model.named_parameters())
    narrow = NarrowWeights(trainer.model)
    for name, copied in narrow.module.named_parameters():
        assert torch.equal(copied, masters[name].bfloat16()), name
        copied.grad = torch.randn(copied.shape).bfloat16()
    given = {name: copied.grad for name, copied in narrow.module.named_parameters()}
    narrow.hand_over()
    small = 2.0**-12  # Lost where the sum were rounded to bfloat16.
    for name, copied in narrow.module.named_parameters():
        assert copied.grad is None
        copied.grad = (given[name] * small).bfloat16()
    expected = {name: value.float() + (value * small).bfloat16().float() for name, value in given.items()}
    narrow.hand_over()
    for name, master in masters.items():
        torch.testing.assert_close(master.grad, expected[name], rtol=0, atol=0)
    with torch.no_grad():
        for master in masters.values():
            master += 1
    narrow.refresh()
    for name, copied in narrow.module.named_parameters():
        assert torch.equal(copied, masters[name].bfloat16()), name


def test_gradient_of_the_answer_loss_is_that_of_the_formula(make_trainer: MakeTrainer) -> None:
    """In float64: what the head makes of the embeddings and of the first layer, against the full model's answer."""
    trainer = make_trainer(length_drop=LengthDrop(0, answer_loss=0.25))
    span_model = SpanModel(trainer.model.double())
    indices, head = (0, 3, 5), trainer.model.span
    labelled = trainer.data.collate(indices, torch.device("cpu"))

    def label_loss(full: Pass, labelled: LabelledBatch) -> Tensor:
        return span_loss(full.logits, labelled.batch.packing, labelled.starts, labelled.ends)

    # Always the cross-entropy, whatever the sub-models learn by.
    next(losses_of_step(span_model, labelled, TrainingBackend(), [], label_loss, "kl", answer_loss=0.25)).backward()
    got = {name: value.grad for name, value in span_model.named_parameters()}
    span_model.zero_grad()

    total = torch.zeros((), dtype=torch.float64)
    for index in indices:
        one = trainer.data.collate([index], torch.device("cpu"))
        full = span_model(one, TrainingBackend(), keep_hidden_states=True)
        for column, (values, label) in enumerate(zip(full.logits, (one.starts, one.ends), strict=True)):
            total = total - values.log_softmax(0)[label[0]] / 2
            for states in full.hidden_states[:2]:
                said = states @ head.weight[column] + head.bias[column]
                total = total - 0.25 * (values.detach().softmax(0) * said.log_softmax(0)).sum() / 4
    total.backward()
    for name, value in span_model.named_parameters():
        torch.testing.assert_close(got[name], value.grad, rtol=1e-9, atol=1e-12)
