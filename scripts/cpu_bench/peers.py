"""dtbert and its peers, each in its settings, as functions of a batch."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from cpu_bench.windows import INPUTS, Batch, Logits
from dtbert.kernels import cpu
from dtbert.weights import convert, load_model

BASE = "transformers sdpa"


@dataclass(frozen=True)
class Engine:
    """A provider in one of its settings; ``computes_in`` names the dtype of its products."""

    provider: str
    setting: str
    computes_in: str
    run: Callable[[Batch], Logits]

    @property
    def name(self) -> str:
        return f"{self.provider}, {self.setting}" if self.setting else self.provider


class NotTimed(NamedTuple):
    """Why a provider has no figure."""

    provider: str
    setting: str
    reason: str


class Checkpoint:
    """A folder that transformers and dtbert load, and what is exported from it, once."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder

    def transformers(self, attention: str, dtype: torch.dtype = torch.float32) -> Any:
        """transformers' model with its eager or its sdpa attention."""
        from transformers import BertForQuestionAnswering

        with quiet():
            return BertForQuestionAnswering.from_pretrained(self.folder, attn_implementation=attention, dtype=dtype)

    @cached_property
    def reference(self) -> Callable[[Batch], Logits]:
        return _call(self.transformers("eager"))

    @cached_property
    def onnx(self) -> Path:
        """The graph with dynamic batch and length."""
        path = self.folder / "model.onnx"
        sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=512)}
        with quiet():
            torch.onnx.export(
                _Exported(self.transformers("sdpa")),
                _example(),
                path,
                dynamo=True,
                dynamic_shapes=(sizes, sizes, sizes),
                input_names=INPUTS,
                output_names=["start", "end"],
                external_data=False,
                verbose=False,
            )
        return path

    @cached_property
    def fused_onnx(self) -> Path:
        """The graph after ONNX Runtime's own fusion for BERT, which knows eager attention as TorchScript writes it."""
        from onnxruntime.transformers import optimizer
        from onnxruntime.transformers.fusion_options import FusionOptions

        plain, path = self.folder / "torchscript.onnx", self.folder / "fused.onnx"
        model = self.transformers("eager")
        axes = {name: {0: "batch", 1: "length"} for name in (*INPUTS, "start", "end")}
        options = FusionOptions("bert")
        options.use_multi_head_attention = True
        heads, size = model.config.num_attention_heads, model.config.hidden_size
        with quiet():
            torch.onnx.export(
                _Exported(model),
                _example(),
                plain,
                dynamo=False,
                dynamic_axes=axes,
                input_names=list(INPUTS),
                output_names=["start", "end"],
                opset_version=17,
            )
            fused = optimizer.optimize_model(
                str(plain), "bert", num_heads=heads, hidden_size=size, optimization_options=options
            )
            count = fused.get_fused_operator_statistics().get("MultiHeadAttention", 0)
            fused.save_model_to_file(str(path))
        if count != model.config.num_hidden_layers:
            raise RuntimeError(f"the optimizer fused the attention of {count} layers, not of all")
        return path


class _Exported(nn.Module):
    """Inputs by position and a tuple out, as exporters want them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return out.start_logits, out.end_logits


def random_checkpoint(folder: Path) -> Checkpoint:
    """Dynamic-TinyBERT's sizes, 6 layers of 768, with random weights."""
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    with quiet():
        BertForQuestionAnswering(BertConfig(num_hidden_layers=6)).save_pretrained(folder)
    return Checkpoint("6x768", folder)


def shipped_checkpoint(folder: Path) -> Checkpoint:
    """The model inside the package, 6 layers of 384, as a folder that transformers loads."""
    return Checkpoint("6x384", convert(None, folder))


def engines(
    checkpoint: Checkpoint, dtype: torch.dtype, threads: int, wanted: Callable[[str], bool]
) -> Iterator[Engine | NotTimed]:
    """Every wanted provider in every setting, or the reason why it is not there."""
    chosen = [entry for entry in _BUILDERS if wanted(entry[0])]
    title = f"{checkpoint.name} {_dtype_name(dtype)}, preparing"
    for provider, setting, build in tqdm(chosen, title, leave=False, disable=not chosen):
        try:
            computes_in, run = build(checkpoint, dtype, threads)
        except Exception as error:
            yield NotTimed(provider, setting, reason(error))
        else:
            yield Engine(provider, setting, computes_in, run)


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def bf16_is_emulated(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and not cpu.multiplies_natively(dtype)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the chatter of exporters and converters, which goes to the log, warnings and both streams."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with (
            warnings.catch_warnings(),
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


Built = tuple[str, Callable[[Batch], Logits]]


def _dtbert(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
    model = load_model(checkpoint.folder, dtype=dtype)

    def run(batch: Batch) -> Logits:
        # Equal lengths go through the padded interface, which packs and unpacks within the time.
        if batch.padded:
            return model.forward_packed(batch.packed)
        return model(batch.ids, batch.mask, batch.segments)

    return _dtype_name(model.dtype), run


def _eager(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
    _refuse_emulation(dtype)
    return _dtype_name(dtype), _call(checkpoint.transformers("eager", dtype))


def _sdpa(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
    return _dtype_name(dtype), _call(checkpoint.transformers("sdpa", dtype))


def _compile(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
    _refuse_emulation(dtype)
    torch.compiler.reset()
    # Shapes as they come: compiling each length anew would take longer than the windows themselves.
    return _dtype_name(dtype), _call(torch.compile(checkpoint.transformers("sdpa", dtype), dynamic=True))


def _refuse_emulation(dtype: torch.dtype) -> None:
    if bf16_is_emulated(dtype):
        raise RuntimeError(f"this CPU emulates bfloat16, several times slower than float32; see {BASE}")


def _call(model: Callable[..., Any]) -> Callable[[Batch], Logits]:
    def run(batch: Batch) -> Logits:
        # Without padding transformers is faster when it gets no mask.
        mask = batch.mask if batch.padded else None
        out = model(input_ids=batch.ids, attention_mask=mask, token_type_ids=batch.segments)
        return out.start_logits, out.end_logits

    return run


def _onnxruntime(fused: bool) -> Callable[[Checkpoint, torch.dtype, int], Built]:
    def build(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
        import onnxruntime

        if dtype != torch.float32:
            raise RuntimeError("ONNX Runtime has no bfloat16 kernels for CPUs")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        path = checkpoint.fused_onnx if fused else checkpoint.onnx
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def run(batch: Batch) -> Logits:
            start, end = session.run(None, batch.arrays)
            return start, end

        return "float32", run

    return build


def _openvino(from_torch: bool, hints: dict[str, Any]) -> Callable[[Checkpoint, torch.dtype, int], Built]:
    def build(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
        import openvino

        if from_torch:
            example = dict(zip(INPUTS, _example(), strict=True))
            with quiet():
                graph = openvino.convert_model(_Exported(checkpoint.transformers("eager")), example_input=example)
        else:
            graph = openvino.Core().read_model(checkpoint.onnx)
        properties = {
            "INFERENCE_NUM_THREADS": threads,
            "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
            **hints,
        }
        compiled = openvino.Core().compile_model(graph, "CPU", properties)

        def run(batch: Batch) -> Logits:
            out = compiled(batch.arrays)
            return out[0], out[1]

        precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        return {"f32": "float32", "bf16": "bfloat16"}.get(precision, precision), run

    return build


def _example() -> tuple[Tensor, Tensor, Tensor]:
    batch = Batch.of([range(5, 69), range(5, 49)])
    return batch.ids, batch.mask, batch.segments


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_LATENCY = {"PERFORMANCE_HINT": "LATENCY"}
_ONE_STREAM = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 1}
_BUILDERS: tuple[tuple[str, str, Callable[[Checkpoint, torch.dtype, int], Built]], ...] = (
    ("dtbert", "", _dtbert),
    ("transformers eager", "", _eager),
    (BASE, "", _sdpa),
    ("torch.compile", "", _compile),
    ("ONNX Runtime", "graph optimisation", _onnxruntime(fused=False)),
    ("ONNX Runtime", "BERT fusion", _onnxruntime(fused=True)),
    ("OpenVINO", "ONNX, latency", _openvino(from_torch=False, hints=_LATENCY)),
    ("OpenVINO", "ONNX, throughput, 1 stream", _openvino(from_torch=False, hints=_ONE_STREAM)),
    ("OpenVINO", "own converter, latency", _openvino(from_torch=True, hints=_LATENCY)),
)
PROVIDERS = tuple(dict.fromkeys(provider for provider, _, _ in _BUILDERS))
