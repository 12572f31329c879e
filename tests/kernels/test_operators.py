"""The compiled kernels as torch operators: what torch.export, and so torch.compile, sees of them, without a GPU."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dtbert.kernels import triton
from dtbert.kernels.triton import launch
from dtbert.model import BertConfig, BertForQuestionAnswering, PackedBatch, Packing

H, T, K = 96, 20, 9


@pytest.fixture(autouse=True)
def _some_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_architecture", lambda index: "sm_90")


def inputs() -> dict[str, Tensor]:
    empty = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="cuda")  # noqa: E731
    return {
        "x": empty(K, H),
        "weight": empty(H, H),
        "vector": empty(H),
        "states": empty(T, H),
        "keep_indices": empty(K, dtype=torch.int64),
        "significance": empty(T, dtype=torch.float32),
        "cu_seqlens": empty(3, dtype=torch.int32),
        "ids": empty(T, dtype=torch.int64),
        "qkv": empty(T, 3 * H),
    }


def run_steps(x: dict[str, Tensor]) -> list[Tensor]:
    """Every step that launches a kernel."""
    vector, keep, cu_seqlens = x["vector"], x["keep_indices"], x["cu_seqlens"]
    tables, norm = (x["states"],) * 3, (vector, vector)
    context, significance = triton.attention(x["qkv"], cu_seqlens, T, 3, significance="received")
    assert significance is not None
    return [
        triton.embed_layer_norm(x["ids"], x["ids"], x["ids"], *tables, *norm, 1e-5),
        context,
        significance,
        triton.attention_significance(x["qkv"], cu_seqlens, T, 3, "cls"),
        triton.select_tokens(x["significance"], cu_seqlens, cu_seqlens, K, T),
        triton.linear_add_layer_norm(x["x"], x["weight"], vector, x["states"], *norm, 1e-5, keep),
        triton.fused_linear_gelu(x["x"], x["weight"], vector),
        triton.restore(x["states"], keep, x["x"]),
    ]


EXPECTED = [
    ((T, H), torch.bfloat16),
    ((T, H), torch.bfloat16),
    ((T,), torch.float32),
    ((T,), torch.float32),
    ((K,), torch.int64),
    ((K, H), torch.bfloat16),
    ((K, H), torch.bfloat16),
    ((T, H), torch.bfloat16),
]
OPERATORS = ["embed_layer_norm", "attention", "select_tokens", "gather_add_layer_norm", "fused_linear_gelu", "restore"]


def test_kernels_are_compiled_here() -> None:
    assert not launch.INTERPRETED


class Steps(torch.nn.Module):
    def forward(self, x: dict[str, Tensor]) -> list[Tensor]:
        return run_steps(x)


def test_export_sees_every_operator_and_its_shapes() -> None:
    with FakeTensorMode():
        exported = torch.export.export(Steps(), (inputs(),))
    targets = {str(node.target).split(".")[1] for node in exported.graph.nodes if "dtbert." in str(node.target)}
    assert targets >= set(OPERATORS)
    outputs = [node.meta["val"] for node in next(reversed(exported.graph.nodes)).all_input_nodes]
    assert [(tuple(x.shape), x.dtype) for x in outputs] == EXPECTED
    assert all(x.device.type == "cuda" for x in outputs)


class Logits(torch.nn.Module):
    def __init__(self, model: BertForQuestionAnswering) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        batch = PackedBatch(ids, ids, ids, Packing((T - 8, 8), cu_seqlens))
        return self.model.forward_packed(batch).start_logits


def test_export_of_the_whole_model_keeps_the_operators() -> None:
    config = BertConfig(hidden_size=H, num_hidden_layers=2, num_attention_heads=3, intermediate_size=H, vocab_size=50)
    with FakeTensorMode():
        with torch.device("cuda"):
            model = BertForQuestionAnswering(config).requires_grad_(False)
        assert model.backend_name == "triton"
        exported = torch.export.export(Logits(model), (inputs()["ids"], inputs()["cu_seqlens"]))
    targets = [str(node.target).split(".")[1] for node in exported.graph.nodes if "dtbert." in str(node.target)]
    assert targets == ["embed_layer_norm", *["attention", "gather_add_layer_norm", "gather_add_layer_norm"] * 2]
