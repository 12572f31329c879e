"""The ONNX file in ONNX Runtime, against the model that it was made of, and the example that answers with it."""

import dataclasses
import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dtbert.export import export_onnx, onnx_file
from dtbert.export.onnx_graph import onnx_graph
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, Threshold
from dtbert.qa import QuestionAnswerer
from dtbert.weights.quantize import dequantize_rows, is_quantizable, quantize_layers, quantize_rows

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "answer_onnx.py"
SCORERS = ["received", "cls", "answer", "overlap", "answer_overlap", "answer_overlap_3"]
SIZES = {"vocab_size": 30, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 24}


def make_model(**overrides: Any) -> BertForQuestionAnswering:
    sizes = {**SIZES, "max_position_embeddings": 50, "initializer_range": 0.5, **overrides}
    model = BertForQuestionAnswering(BertConfig(**sizes), backend="reference")
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.requires_grad_(False)


def run(graph: onnx.ModelProto, ids: Tensor, segments: Tensor) -> Tensor:
    """Logits ``[2, 1, n]``."""
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run(None, {"input_ids": ids.numpy(), "token_type_ids": segments.numpy()})
    return torch.from_numpy(np.stack(outputs))


def text(length: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(SIZES["vocab_size"], (1, length), generator=generator)
    first = int(torch.randint(length + 1, (), generator=generator))
    return ids, (torch.arange(length) >= first).long()[None]


def assert_agrees(model: BertForQuestionAnswering, schedule: LengthSchedule | None, *inputs: Tensor) -> None:
    want = torch.stack(tuple(model(inputs[0], None, inputs[1], schedule)))
    torch.testing.assert_close(run(onnx_graph(model, schedule), *inputs), want, atol=1e-4, rtol=1e-4)


@settings(max_examples=25)
@given(
    st.integers(1, 50),
    st.lists(st.floats(0.02, 1), min_size=3, max_size=3),
    st.tuples(*[st.sampled_from(SCORERS)] * 3),
    st.booleans(),
    st.booleans() | st.lists(st.booleans(), min_size=3, max_size=3),
    st.booleans(),
    st.sampled_from([[], [], [0], [1], [0, 2]]),
    st.integers(0, 2**16),
)
def test_a_text_of_any_length_has_the_models_logits(
    length: int,
    ratios: list[float],
    scorers: tuple[str, ...],
    keep_cls: bool,
    keep_question: bool | list[bool],
    absolute: bool,
    skipped: list[int],
    seed: int,
) -> None:
    falling = sorted(ratios, reverse=True)
    options = {"scorer": scorers, "keep_cls": keep_cls, "keep_question": keep_question, "skip_layers": skipped}
    schedule = LengthSchedule.ratios(falling, **options)
    if absolute:
        schedule = LengthSchedule.absolute([max(1, round(50 * ratio)) for ratio in falling], **options)
    assert_agrees(make_model(), schedule, *text(length, seed))


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "relu", "silu"])
def test_nothing_dropped_and_each_activation(activation: str) -> None:
    graph = onnx_graph(make_model(hidden_act=activation))
    onnx.checker.check_model(graph, full_check=True)
    assert "TopK" not in {node.op_type for node in graph.graph.node}
    assert_agrees(make_model(hidden_act=activation), None, *text(20, 1))


def test_dropped_tokens_are_gone_from_the_products() -> None:
    schedule = LengthSchedule.ratios([0.5, 0.5, 0.25])
    graph = onnx.shape_inference.infer_shapes(onnx_graph(make_model(), schedule))
    graph.graph.output.extend(value for value in graph.graph.value_info if value.name.startswith("LayerNormalization"))
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    ids, segments = text(40, 0)
    outputs = session.run(None, {"input_ids": ids.numpy(), "token_type_ids": segments.numpy()})
    # The embeddings, then two in each layer.
    assert [len(states) for states in outputs[2:]] == [40, 20, 20, 20, 20, 10, 10]


def test_8_bits_give_the_logits_of_the_rounded_weights() -> None:
    model, rounded = make_model(), make_model()
    for parameter in rounded.parameters():
        if is_quantizable(tuple(parameter.shape)):
            parameter.copy_(dequantize_rows(*quantize_rows(parameter)))
    graph = onnx_graph(model, int8=True)
    stored = {one.name: one.data_type for one in graph.graph.initializer if len(one.dims) == 2 and one.dims[1] > 1}
    assert set(stored.values()) == {onnx.TensorProto.INT8, onnx.TensorProto.FLOAT}
    assert [name for name, kind in stored.items() if kind == onnx.TensorProto.FLOAT] == [
        "encoder.embeddings.token_type",
        "span.weight",
    ]
    want = torch.stack(tuple(rounded(*text(30, 2)[:1], None, text(30, 2)[1])))
    torch.testing.assert_close(run(graph, *text(30, 2)), want, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def shipped() -> QuestionAnswerer:
    return QuestionAnswerer.load()


ALONE = """
import json, runpy, sys

class Refuse:
    def find_spec(self, name, *_):
        if name.partition(".")[0] in ("torch", "transformers", "dtbert", "safetensors", "onnx"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
answerer = runpy.run_path(sys.argv[1])["Answerer"](sys.argv[2])
print(json.dumps([answerer(*pair) for pair in json.load(sys.stdin)]))
"""


def test_example_answers_as_dtbert_without_torch(shipped: QuestionAnswerer, shared_data: Path, tmp_path: Path) -> None:
    with gzip.open(shared_data / "squad" / "squad-dev-v1.1.json.gz") as file:
        paragraphs = [paragraph for article in json.load(file)["data"] for paragraph in article["paragraphs"]][::100]
    pairs = [(paragraph["qas"][0]["question"], paragraph["context"]) for paragraph in paragraphs[:20]]
    everything = "\n".join(context for _, context in pairs[:5])
    pairs += [(question, everything) for question, _ in pairs[:1]]  # in windows
    schedule = shipped.within_budget(0.5, static=True).schedule
    files = export_onnx(shipped, tmp_path / "model.onnx", schedule, int8=True)
    assert files.model.stat().st_size < 23e6
    command = [sys.executable, "-c", ALONE, EXAMPLE, files.model]
    done = subprocess.run(command, input=json.dumps(pairs), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = shipped.answer_many(pairs, schedule=schedule)
    assert json.loads(done.stdout) == [[one.text, one.start, one.end] for one in answers]


def test_example_is_short_and_prints_its_answer(shipped: QuestionAnswerer, tmp_path: Path) -> None:
    lines = EXAMPLE.read_text("utf-8").splitlines()
    assert len(lines) <= 50
    model = QuestionAnswerer(make_model(vocab_size=30522, max_position_embeddings=384), shipped.tokenizer)
    files = export_onnx(model, tmp_path / "model.onnx")
    about = json.loads(files.about.read_text("utf-8"))
    assert (about["window"], about["schedule"], about["cls_id"]) == (384, None, 101)
    pair = ["Who wrote it?", "Ada Lovelace wrote it in 1843."]
    done = subprocess.run([sys.executable, EXAMPLE, files.model, *pair], capture_output=True, text=True, check=True)
    answer = model(*pair)
    assert done.stdout == f"{answer.text}\t{answer.start}\t{answer.end}\n"


def test_wrong_arguments_are_refused_before_a_file_is_written(
    shipped: QuestionAnswerer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(message: str, error: type[Exception] = ValueError, name: str = "x.onnx", **options: Any) -> None:
        with pytest.raises(error, match=message):
            export_onnx(shipped, tmp_path / name, **options)
        assert [path.name for path in tmp_path.iterdir()] == []

    refused(r"x.bin': the name of an ONNX file ends in \.onnx", name="x.bin")
    refused("6 layers: they must match", schedule=LengthSchedule.ratios([1, 0.5]))
    ratios = [1, 1, 1, 1, 1, 0.5]
    refused(
        "the scorer 'random', 'value_norm': .* received, cls, answer, overlap, answer_overlap, answer_overlap_3",
        schedule=LengthSchedule.ratios(ratios, scorer=["cls", "random", "value_norm", "random", "cls", "cls"]),
    )
    refused("must be a LengthSchedule, not list: .*ratios", TypeError, schedule=ratios)
    refused("an ONNX file does not take a policy of the kind 'threshold': .* ratios", schedule=Threshold([0.01] * 6))
    monkeypatch.setattr(onnx_file, "_MOST_BYTES", 10**6)
    refused(r"takes 0\.1 GB, .* give int8")
    monkeypatch.setattr(onnx_file, "find_spec", lambda name: None)
    refused(r"pip install 'dtbert\[onnx\]'")


def test_all_that_a_schedule_says_is_exported() -> None:
    # Whatever else one may come to say, `onnx_graph` and `encode_padded` must compute, or refuse.
    names = {field.name for field in dataclasses.fields(LengthSchedule)}
    assert names == {"kind", "length_config", "scorer", "keep_cls", "keep_question", "accumulate", "skip_layers"}


def test_a_model_that_computes_in_int8_is_refused() -> None:
    model = make_model()
    quantize_layers(model, torch.int8)
    with pytest.raises(ValueError, match="computes in int8, an ONNX file in float32"):
        onnx_graph(model)


def test_a_tokenizer_of_another_model_is_left_alone(shipped: QuestionAnswerer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}", "utf-8")
    with pytest.raises(ValueError, match="is there already, and not this model's"):
        export_onnx(shipped, tmp_path / "x.onnx")
    assert (tmp_path / "tokenizer.json").read_text("utf-8") == "{}"
