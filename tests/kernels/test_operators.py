"""The compiled kernels without a GPU: what torch.export and torch.compile see of them, and what a launch asks for.

Here they are compiled, not interpreted: in tests/kernels/triton it is the other way round.
"""

from collections import defaultdict
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dtbert.kernels import Kept, Left, Packing, TokenIds
from dtbert.kernels import triton as kernels
from dtbert.kernels.float8 import FLOAT8
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear, of_tensors
from dtbert.kernels.triton import INTERPRETED, Triton
from dtbert.kernels.triton.add_norm import add_norm_float8
from dtbert.kernels.triton.embed import embed_float8
from dtbert.kernels.triton.float8 import scale_rows
from dtbert.kernels.triton.launch import pretending
from dtbert.kernels.triton.linear import activated_linear, fused_linear
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.weights.quantize import quantize_layers
from scripts.compile_report import recording

H, T, K = 96, 20, 9


@pytest.fixture(autouse=True)
def _some_gpu() -> Iterator[None]:
    with pretending("sm_90"):
        yield


def inputs(device: str, tokens: int = T, kept: int = K) -> dict[str, Tensor]:
    rand = lambda *shape, dtype=torch.bfloat16: torch.zeros(shape, dtype=dtype, device=device)  # noqa: E731
    return {
        "x": rand(kept, H),
        "weight": rand(H, H),
        "vector": rand(H),
        "states": rand(tokens, H),
        "rows": rand(kept, dtype=torch.int64),
        "significance": rand(tokens, dtype=torch.float32),
        "cu_seqlens": rand(3, dtype=torch.int32),
        "target_cu_seqlens": rand(3, dtype=torch.int32),
        "left_significance": rand(kept, dtype=torch.float32),
        "last_cu_seqlens": rand(3, dtype=torch.int32),
        "ids": rand(tokens, dtype=torch.int64),
        "qkv": rand(tokens, 3 * H),
    }


def run_steps(x: dict[str, Tensor]) -> list[Tensor]:
    """Every step that launches a kernel, and every kernel."""
    triton, vector, ids = Triton(), x["vector"], x["ids"]
    packing = Packing((len(ids) - 4, 4), x["cu_seqlens"])
    kept = Kept(x["rows"], Packing((len(x["rows"]) - 4, 4), x["target_cu_seqlens"]))
    norm, layer = of_tensors(LayerNorm, weight=vector, bias=vector, eps=1e-5), (x["weight"], vector)
    tables = of_tensors(Embeddings, word=x["states"], token_type=x["states"], position=x["states"], norm=norm)
    linear = of_tensors(Linear, weight=x["weight"], bias=vector)
    attended = x["qkv"], packing, 3
    return [
        triton.embed(TokenIds(ids, ids, ids), tables),
        *triton.scored_attention(*attended, "received"),
        triton.attention(*attended, kept),
        triton.significance(*attended, "cls"),
        triton.significance(*attended, "from_question", ids),
        triton.select(x["significance"], packing, kept.packing).rows,
        triton.add_norm(x["x"], linear, x["states"], norm, kept.rows),
        fused_linear(x["x"], *layer, "gelu"),
        activated_linear(x["x"], *layer, "gelu"),
        triton.scatter(x["states"].clone(), kept.rows, x["x"]),
        triton.question_overlap(TokenIds(ids, ids, ids), packing),
        *embed_float8(ids, ids, ids, x["states"], x["states"], x["states"], vector, vector, 1e-5),
        *add_norm_float8(x["x"], vector, x["states"], vector, vector, 1e-5, kept.rows),
        *scale_rows(x["x"], "gelu"),
        *drops(x, packing, kept),
    ]


def drops(x: dict[str, Tensor], packing: Packing, kept: Kept) -> list[Tensor]:
    """What a first and a later layer make of the states, and where the kept tokens stand."""
    triton, left = Triton(), Left(packing, segments=x["ids"], keep_first=True)
    context, parts = triton.partial_attention(x["qkv"], packing, 3, "received")
    rows, left, first = triton.drop(left, kept.packing, parts, x["states"].clone(), context)
    last = Packing((1, 1), x["last_cu_seqlens"])
    again, left, second = triton.drop(left, last, x["left_significance"], x["x"], x["x"])
    assert left.rows is not None
    assert left.final is not None
    assert first is not None
    assert second is not None
    return [rows, first, again, second, left.rows, left.final]


EXPECTED = [
    ((T, H), torch.bfloat16),
    ((T, H), torch.bfloat16),
    ((T,), torch.float32),
    ((K, H), torch.bfloat16),
    ((T,), torch.float32),
    ((T,), torch.float32),
    ((K,), torch.int64),
    ((K, H), torch.bfloat16),
    ((K, H), torch.bfloat16),
    ((K, H), torch.bfloat16),
    ((T, H), torch.bfloat16),
    ((T,), torch.float32),
    ((T, H), torch.bfloat16),
    ((T, H), torch.float8_e4m3fn),
    ((T, 1), torch.float32),
    ((K, H), torch.bfloat16),
    ((K, H), torch.float8_e4m3fn),
    ((K, 1), torch.float32),
    ((K, H), torch.float8_e4m3fn),
    ((K, 1), torch.float32),
    ((K,), torch.int64),
    ((K, H), torch.bfloat16),
    ((2,), torch.int64),
    ((2, H), torch.bfloat16),
    ((2,), torch.int64),
    ((T, H), torch.bfloat16),
]
OPERATORS = ["embed", "attention", "select", "drop_again", "add_norm", "fused_linear", "scatter", "question_overlap"]
OPERATORS += ["activated_linear", "embed_float8", "add_norm_float8", "scale_rows"]


def test_kernels_are_compiled_here() -> None:
    assert not INTERPRETED


class Steps(torch.nn.Module):
    def forward(self, x: dict[str, Tensor]) -> list[Tensor]:
        return run_steps(x)


def operators_of(exported: torch.export.ExportedProgram) -> list[str]:
    """dtbert's own, and products in fp8."""
    names = [str(node.target).split(".") for node in exported.graph.nodes]
    return [name[1] for name in names if name[0] == "dtbert" or name[1:2] == ["_scaled_mm"]]


def test_export_sees_every_operator_and_its_shapes() -> None:
    with FakeTensorMode():
        exported = torch.export.export(Steps(), (inputs("cuda"),))
    assert set(operators_of(exported)) == set(OPERATORS)
    outputs = [node.meta["val"] for node in next(iter(reversed(exported.graph.nodes))).all_input_nodes]
    assert [(tuple(x.shape), x.dtype) for x in outputs] == EXPECTED
    assert all(x.device.type == "cuda" for x in outputs)


class Logits(torch.nn.Module):
    def __init__(self, model: BertForQuestionAnswering, schedule: LengthSchedule | None = None) -> None:
        super().__init__()
        self.model, self.schedule = model, schedule

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        batch = PackedBatch(ids, ids, ids, Packing((T - 8, 8), cu_seqlens))
        return self.model.forward_packed(batch, self.schedule).start_logits


def export_model(schedule: LengthSchedule | None = None, *, in_float8: bool = False, strict: bool = False) -> list[str]:
    config = BertConfig(hidden_size=H, num_hidden_layers=2, num_attention_heads=3, intermediate_size=H, vocab_size=50)
    with FakeTensorMode():
        torch.set_default_dtype(torch.bfloat16 if in_float8 else torch.float32)  # a fake model cannot change its own
        try:
            with torch.device("cuda"):
                model = BertForQuestionAnswering(config).requires_grad_(False)
        finally:
            torch.set_default_dtype(torch.float32)
        if in_float8:
            quantize_layers(model, FLOAT8)
        assert model.backend_name == "triton"
        x = inputs("cuda")
        return operators_of(torch.export.export(Logits(model, schedule), (x["ids"], x["cu_seqlens"]), strict=strict))


# By torch.compile's tracer, too: a graph that it breaks in a layer, torch 2.11 puts together wrongly.
@pytest.mark.parametrize("strict", [False, True])
def test_export_of_the_whole_model_keeps_the_operators(strict: bool) -> None:
    assert export_model(strict=strict) == ["embed", *["attention", "add_norm", "activated_linear", "add_norm"] * 2]


@pytest.mark.parametrize("strict", [False, True])
def test_export_of_a_model_that_drops_tokens_keeps_the_operators(strict: bool) -> None:
    rest = ["add_norm", "activated_linear", "add_norm"]
    want = ["embed", "attention", "select", *rest, "attention", "drop_again", *rest, "scatter"]
    assert export_model(LengthSchedule.ratios([0.7, 0.3]), strict=strict) == want


def test_export_of_a_model_in_fp8_makes_rows_for_each_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "why_not_float8", lambda _: None)
    product = ["scale_rows", "_scaled_mm"]
    attended, rest = [*product, "attention"], [*product, "add_norm_float8", *product * 2, "add_norm_float8"]
    # By torch.compile's tracer.
    assert export_model(in_float8=True, strict=True) == ["embed_float8", *[*attended, *rest] * 2]
    schedule = LengthSchedule.ratios([0.7, 0.3])
    dropping = ["embed_float8", *attended, "select", *rest, *attended, "drop_again", *rest, "scatter"]
    assert export_model(schedule, in_float8=True) == dropping


def launches(x: dict[str, Tensor]) -> dict[str, list[str]]:
    """By kernel, what Triton looks up a compiled one by: types, alignment, and numbers that it takes as constants."""
    asked = defaultdict(list)
    with recording("sm_90") as recorded:
        run_steps(x)
    for launch in recorded:
        asked[launch.source.name].append(launch.key)
    return asked


@pytest.mark.parametrize(("tokens", "kept"), [(T, K), (32, 16), (16, 32), (17, 8)])
def test_no_kernel_is_compiled_anew_for_other_offsets_or_counts(tokens: int, kept: int) -> None:
    want = launches(inputs("cpu", 48, 32))
    assert len(want) == 11
    # Rows of one tensor: 12 bytes apart, so that 16 divides the address of every fourth.
    rows = torch.zeros(5, 3, dtype=torch.int32)
    assert {row.data_ptr() % 16 for row in rows} == {0, 4, 8, 12}
    for i, cu_seqlens in enumerate(rows):
        for target_cu_seqlens in rows[i:]:
            offsets = {"cu_seqlens": cu_seqlens, "target_cu_seqlens": target_cu_seqlens}
            assert launches(inputs("cpu", tokens, kept) | offsets) == want
