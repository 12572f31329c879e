"""Losses and their gradients against formulas written out in float64, and against torch's own."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.model import Packing, SpanLogits
from dtbert.training.losses import attention_loss, distillation_loss, hidden_state_loss, span_loss

LENGTHS = (4, 1, 6)
PACKING = Packing.stack([LENGTHS], torch.device("cpu"))[0]


def logits(scale: float = 3.0) -> SpanLogits:
    drawn = scale * torch.randn(2, sum(LENGTHS), dtype=torch.float64)
    return SpanLogits(*drawn.clone().requires_grad_(True).unbind())


def both_gradients(loss: Tensor, wanted: Tensor, student: SpanLogits) -> None:
    torch.testing.assert_close(loss, wanted)
    for values in student:
        got = torch.autograd.grad(loss, values, retain_graph=True)[0]
        torch.testing.assert_close(got, torch.autograd.grad(wanted, values, retain_graph=True)[0])


def test_span_loss_is_the_mean_of_start_and_end_summed_over_windows() -> None:
    student, starts, ends = logits(), torch.tensor([1, 0, 2]), torch.tensor([3, 0, 2])
    wanted = torch.zeros((), dtype=torch.float64)
    for values, targets in zip(student, (starts, ends), strict=True):
        for window, target in zip(values.split(LENGTHS), targets, strict=True):
            wanted = wanted + (window.exp().sum().log() - window[target]) / 2
    both_gradients(span_loss(student, PACKING, starts, ends), wanted, student)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_cross_entropy_is_that_of_teacher_against_student(temperature: float) -> None:
    student, teacher = logits(), logits()
    wanted, by_torch = torch.zeros(2, dtype=torch.float64)
    for own, other in zip(student, teacher, strict=True):
        for window, shown in zip(own.split(LENGTHS), other.detach().split(LENGTHS), strict=True):
            p = (shown / temperature).exp() / (shown / temperature).exp().sum()
            q = (window / temperature).exp() / (window / temperature).exp().sum()
            wanted = wanted - (p * q.log()).sum() / 2
            soft = (shown / temperature).softmax(0)[None]
            by_torch = by_torch + F.cross_entropy((window / temperature)[None], soft) / 2
    loss = distillation_loss(student, teacher, PACKING, temperature=temperature)
    torch.testing.assert_close(by_torch, wanted)
    both_gradients(loss, wanted, student)
    assert torch.autograd.grad(loss, teacher[0], allow_unused=True)[0] is None


def test_kl_is_of_student_from_teacher_as_in_the_public_code() -> None:
    student, teacher = logits(), logits()
    wanted = torch.zeros((), dtype=torch.float64)
    for own, other in zip(student, teacher, strict=True):
        for window, shown in zip(own.split(LENGTHS), other.detach().split(LENGTHS), strict=True):
            # kl_div(input, target) is KL(target || exp(input)).
            wanted = wanted + F.kl_div(shown.log_softmax(0), window.softmax(0), reduction="sum") / 2
    both_gradients(distillation_loss(student, teacher, PACKING, "kl"), wanted, student)
    same = SpanLogits(*(values.detach() for values in student))
    assert distillation_loss(student, same, PACKING, "kl").item() == pytest.approx(0, abs=1e-12)


def test_gradient_of_cross_entropy_is_that_of_kl_of_teacher_from_student() -> None:
    student, teacher = logits(), logits()
    loss = distillation_loss(student, teacher, PACKING)
    for own, other in zip(student, teacher, strict=True):
        got = torch.autograd.grad(loss, own, retain_graph=True)[0]
        wanted = [a.softmax(0) - b.softmax(0) for a, b in zip(own.split(LENGTHS), other.split(LENGTHS), strict=True)]
        torch.testing.assert_close(got, torch.cat(wanted).detach() / 2)


def test_hidden_state_loss_is_the_mean_over_each_windows_tokens() -> None:
    student = [torch.randn(sum(LENGTHS), 3, requires_grad=True) for _ in range(2)]
    teacher = [torch.randn(sum(LENGTHS), 3) for _ in range(2)]
    wanted = torch.zeros(())
    for own, other in zip(student, teacher, strict=True):
        for a, b in zip(own.split(LENGTHS), other.split(LENGTHS), strict=True):
            wanted = wanted + F.mse_loss(a, b)
    torch.testing.assert_close(hidden_state_loss(student, teacher, PACKING), wanted)


@pytest.mark.parametrize("teacher_heads", [2, 3])
def test_attention_loss_compares_heads_or_their_means(teacher_heads: int) -> None:
    student = [[torch.randn(1, 2, length, length, requires_grad=True) for length in LENGTHS]]
    teacher = [[torch.randn(1, teacher_heads, length, length) for length in LENGTHS]]
    wanted = torch.zeros(())
    for own, other in zip(student[0], teacher[0], strict=True):
        wanted = wanted + (F.mse_loss(own, other) if teacher_heads == 2 else F.mse_loss(own.mean(1), other.mean(1)))
    torch.testing.assert_close(attention_loss(student, teacher, PACKING), wanted)


def test_attention_loss_of_padded_pieces_is_that_of_sequences() -> None:
    pieces = [[[torch.randn(1, 2, length, length) for length in LENGTHS]] for _ in range(2)]
    padded = []
    for ((*sequences,),) in pieces:
        whole = torch.zeros(len(LENGTHS), 2, max(LENGTHS), max(LENGTHS))
        for row, one in zip(whole, sequences, strict=True):
            row[:, : one.shape[2], : one.shape[3]] = one[0]
        padded.append([[whole]])
    torch.testing.assert_close(attention_loss(*padded, PACKING), attention_loss(*pieces, PACKING))
