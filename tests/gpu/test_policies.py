"""Policies by which the text decides, which tokens each layer kept, heads of whole texts, and what does not wait."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from dtbert.kernels import attention, attention_significance
from dtbert.model import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    LayerKept,
    LengthSchedule,
    Policy,
    Threshold,
    TopP,
)
from tests.gpu.cases import MIXED, keep_of, offsets, randn, relative_error, segments_of
from tests.gpu.test_model import FLOAT32_BOUND, random_batch

pytestmark = pytest.mark.gpu

LENGTHS = [384, 128, 1, 200, 57]
CONFIG = BertConfig(
    hidden_size=384,
    num_hidden_layers=3,
    num_attention_heads=12,
    intermediate_size=1536,
    vocab_size=2000,
    initializer_range=0.07,  # attention far from uniform
)
POLICIES = [
    Threshold((0.0, 0.002, 0.004), scorer="received"),
    Threshold((0.001, 0.002, 0.003), scorer="cls", keep_cls=True, keep_question=True, floor=0.3, ceiling=0.8),
    TopP((1, 0.9, 0.7), scorer="received", keep_cls=True),
    TopP((0.95, 0.8, 0.6), scorer="value_norm", keep_question=True),
    LengthSchedule.ratios((0.9, 0.6, 0.3), scorer="received", keep_cls=True),
]


def identify(policy: Policy | None) -> str:
    return "all" if policy is None else f"{policy.kind} {policy.scorers[0]}"


@pytest.fixture(autouse=True)
def _in_inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def pair(make: Any, *arguments: Any) -> tuple[Any, Any]:
    """A model with the same random weights on the kernels and on the reference, in float32, ready for inference."""
    models = [make(CONFIG, *arguments, backend=backend).to("cuda").eval() for backend in ("triton", "reference")]
    models[0].reset_parameters(torch.Generator("cuda").manual_seed(0))
    models[1].load_state_dict(models[0].state_dict())
    for model in models:
        model.prepare()
    return models[0], models[1]


def assert_kept_alike(got: tuple[LayerKept, ...], want: tuple[LayerKept, ...]) -> None:
    assert len(got) == len(want) == CONFIG.num_hidden_layers
    for mine, theirs in zip(got, want, strict=True):
        assert mine.lengths == theirs.lengths
        assert torch.equal(mine.mask, theirs.mask)
        assert (mine.significance is None) == (theirs.significance is None)
        if mine.significance is not None:
            torch.testing.assert_close(mine.significance, theirs.significance, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("policy", POLICIES, ids=identify)
def test_layers_keep_what_they_keep_on_the_reference(policy: Policy) -> None:
    batch, (model, reference) = random_batch(LENGTHS), pair(BertForQuestionAnswering)
    got, want = (one.forward_packed(batch, policy, output_kept=True) for one in (model, reference))
    assert_kept_alike(got.kept, want.kept)
    assert 0 < sum(want.kept[-1].lengths) < sum(LENGTHS)
    logits, exact = (torch.stack(one[:2], -1) for one in (got, want))
    assert relative_error(logits, exact) <= FLOAT32_BOUND


@pytest.mark.parametrize("policy", [None, *POLICIES], ids=identify)
@pytest.mark.parametrize(
    ("head", "arguments"),
    [
        (BertForSequenceClassification, (("no", "yes", "perhaps"),)),
        (BertForSentenceEmbedding, ("mean",)),
        (BertForSentenceEmbedding, ("cls",)),
    ],
    ids=["classifier", "mean", "cls"],
)
def test_heads_agree_with_the_reference(head: Any, arguments: tuple[Any, ...], policy: Policy | None) -> None:
    batch, (model, reference) = random_batch(LENGTHS), pair(head, *arguments)
    got, want = (one.forward_packed(batch, policy, output_kept=True) for one in (model, reference))
    assert_kept_alike(got.kept, want.kept)
    assert got.rows.shape == (len(LENGTHS), model.row_size)
    assert relative_error(got.rows, want.rows) <= FLOAT32_BOUND


@pytest.fixture
def _no_waits() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.usefixtures("_no_waits")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_unchecked_attention_does_not_wait_for_the_device(dtype: torch.dtype) -> None:
    heads, segments, cu_seqlens = 12, segments_of(MIXED), offsets(MIXED)
    rows, kept = keep_of(MIXED, 0.5)
    given = randn(sum(MIXED), 3 * heads * 64, dtype=dtype), cu_seqlens, max(MIXED), heads

    def run(*, check: bool) -> list[Tensor]:
        context, received = attention(*given, significance="received", check=check)
        some, _ = attention(*given, query_indices=rows, cu_seqlens_q=kept, check=check)
        question = attention_significance(*given, "from_question", segments, check=check)
        assert received is not None
        return [context, received, some, question]

    want = run(check=True)
    torch.cuda.set_sync_debug_mode("error")
    got = run(check=False)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(got, want, strict=True))
