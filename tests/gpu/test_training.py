"""Training's steps on a GPU: flash-attention and the padded one against float64, and a run that learns and resumes."""

from pathlib import Path

import pytest
import torch

from dtbert.kernels import Backend, Kept, Packing
from dtbert.training import LengthDrop
from dtbert.training.backend import TrainingBackend
from tests.gpu.cases import BOUND, DTYPES, assert_near, keep_of, randn
from tests.training.conftest import make_trainer, metrics, model_folder, questions  # noqa: F401  # fixtures

pytestmark = pytest.mark.gpu

LENGTHS = [1, 63, 127, 128, 200, 384]
HEADS, WIDTH = 12, 384


def packing(lengths: list[int]) -> Packing:
    return Packing.stack([lengths], torch.device("cuda"))[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("part", [1.0, 0.3])
def test_attention_and_its_gradient_agree_with_float64(part: float, dtype: torch.dtype) -> None:
    rows, cu_seqlens = keep_of(LENGTHS, part)
    kept = Kept(rows, packing(cu_seqlens.diff().tolist())) if part < 1 else None
    qkv = randn(sum(LENGTHS), 3 * WIDTH, dtype=dtype).requires_grad_()
    exact = qkv.detach().double().requires_grad_()
    context = TrainingBackend().attention(qkv, packing(LENGTHS), HEADS, kept)
    wanted = Backend().attention(exact, packing(LENGTHS), HEADS, kept)
    assert context.dtype == dtype
    assert_near(context, wanted, BOUND[dtype])
    weights = randn(*wanted.shape, dtype=dtype, seed=1)
    (context * weights).sum().backward()
    (wanted * weights.double()).sum().backward()
    assert qkv.grad is not None
    assert exact.grad is not None
    assert_near(qkv.grad, exact.grad, 2 * BOUND[dtype])


def test_dropout_keeps_the_mean() -> None:
    qkv = randn(64, 3 * WIDTH, dtype=torch.bfloat16)
    plain = Backend().attention(qkv.double(), packing([64]), HEADS)
    backend = TrainingBackend(attention_dropout=0.5)
    drawn = torch.stack([backend.attention(qkv, packing([64]), HEADS).double() for _ in range(200)])
    assert drawn.std(0).median() > 0
    assert ((drawn.mean(0) - plain) / (drawn.std(0) / 200**0.5 + 1e-2)).abs().max() < 7


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("scorer", ["received", "answer_overlap+question"])
def test_run_learns_and_goes_on(make_trainer, tmp_path: Path, scorer: str, bf16: bool) -> None:  # type: ignore[no-untyped-def] # noqa: F811
    options = {
        "device": "cuda",
        "length_drop": LengthDrop(1, 0.5, 0.0, (scorer,), answer_loss=0.5),
        "bf16": bf16,
        "epochs": 20.0,
        "learning_rate": 1e-2,
        "batch_tokens": 1024,
    }

    def stop(record: dict[str, object]) -> None:
        if record["step"] == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_trainer(**options).run(stop)
    again = make_trainer(**options)
    assert again.step == 4
    assert again.run()
    losses = [record["loss"] for record in metrics(tmp_path / "run")]
    assert len(losses) == again.num_steps
    assert losses[-1] < 0.7 * losses[0]
