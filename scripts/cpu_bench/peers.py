"""dtbert and its peers, each in its settings, as functions of a batch."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from bench.checkpoints import Checkpoint, Exported, example, int8_onnx, logits_of, quiet, reason
from bench.windows import INPUTS, Batch, Logits, random_windows
from tqdm import tqdm

from dtbert.kernels import cpu
from dtbert.weights import load_model

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


def engines(
    checkpoint: Checkpoint, dtype: torch.dtype, threads: int, wanted: Callable[[str], bool]
) -> Iterator[Engine | NotTimed]:
    """Every wanted provider in every setting, or the reason why it is not there."""
    chosen = [entry for entry in _BUILDERS if wanted(entry[0]) and dtype in _DTYPES.get(entry[0], (dtype,))]
    title = f"{checkpoint.name} {_dtype_name(dtype)}, preparing"
    for provider, setting, build in tqdm(chosen, title, leave=False, disable=not chosen):
        try:
            computes_in, run = build(checkpoint, dtype, threads)
        except Exception as error:
            yield NotTimed(provider, setting, reason(error))
        else:
            yield Engine(provider, setting, computes_in, run)


def bf16_is_emulated(dtype: torch.dtype) -> bool:
    return dtype == torch.bfloat16 and not cpu.multiplies_natively(dtype)


Built = tuple[str, Callable[[Batch], Logits]]


def _dtbert(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
    model = load_model(checkpoint.folder, dtype=dtype)

    def run(batch: Batch) -> Logits:
        # Equal lengths go through the padded interface, which packs and unpacks within the time.
        if batch.padded:
            return model.forward_packed(batch.packed)
        return model(batch.ids, batch.mask, batch.segments)

    return _dtype_name(model.product_dtype), run


def _eager(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
    _refuse_emulation(dtype)
    return _dtype_name(dtype), logits_of(checkpoint.transformers("eager", dtype))


def _sdpa(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
    if dtype == torch.int8:  # what it has: the base of the others' speed
        dtype = torch.float32
    return _dtype_name(dtype), logits_of(checkpoint.transformers("sdpa", dtype))


def _compile(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
    _refuse_emulation(dtype)
    torch.compiler.reset()
    # Shapes as they come: compiling each length anew would take longer than the windows themselves.
    return _dtype_name(dtype), logits_of(torch.compile(checkpoint.transformers("sdpa", dtype), dynamic=True))


def _dynamic_int8(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
    model = checkpoint.transformers("sdpa")
    with quiet():
        quantized = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, torch.qint8)
    return "int8", logits_of(quantized)


def _refuse_emulation(dtype: torch.dtype) -> None:
    if bf16_is_emulated(dtype):
        raise RuntimeError(f"this CPU emulates bfloat16, several times slower than float32; see {BASE}")


def _onnxruntime(fused: bool) -> Callable[[Checkpoint, torch.dtype, int], Built]:
    def build(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
        import onnxruntime

        if dtype == torch.bfloat16:
            raise RuntimeError("ONNX Runtime has no bfloat16 kernels for CPUs")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 3
        path = checkpoint.fused_onnx if fused else checkpoint.onnx
        if dtype == torch.int8:
            path = int8_onnx(path)
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

        def run(batch: Batch) -> Logits:
            start, end = session.run(None, batch.arrays)
            return start, end

        return _dtype_name(dtype), run

    return build


def _openvino(from_torch: bool, hints: dict[str, Any]) -> Callable[[Checkpoint, torch.dtype, int], Built]:
    def build(checkpoint: Checkpoint, dtype: torch.dtype, threads: int) -> Built:
        import openvino

        if from_torch:
            inputs = dict(zip(INPUTS, example(), strict=True))
            with quiet():
                graph = openvino.convert_model(Exported(checkpoint.transformers("eager")), example_input=inputs)
        else:
            graph = openvino.Core().read_model(checkpoint.onnx)
        # In int8, what is not quantized is computed as fast as the CPU can.
        precision = "f32" if dtype == torch.float32 or bf16_is_emulated(torch.bfloat16) else "bf16"
        properties = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, **hints}
        if dtype == torch.int8:
            graph = _in_int8(graph)
        compiled = openvino.Core().compile_model(graph, "CPU", properties)

        def run(batch: Batch) -> Logits:
            out = compiled(batch.arrays)
            return out[0], out[1]

        if dtype == torch.int8:
            return "int8", run
        chosen = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
        return {"f32": "float32", "bf16": "bfloat16"}.get(chosen, chosen), run

    return build


def _in_int8(graph: Any) -> Any:
    """Weights and activations in int8 by NNCF, whose ranges it takes from windows of several lengths."""
    import nncf

    samples = [Batch.of(random_windows([length])).arrays for length in range(64, 385, 16)]
    with quiet():
        return nncf.quantize(graph, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


_LATENCY = {"PERFORMANCE_HINT": "LATENCY"}
_ONE_STREAM = {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": 1}
_BUILDERS: tuple[tuple[str, str, Callable[[Checkpoint, torch.dtype, int], Built]], ...] = (
    ("dtbert", "", _dtbert),
    ("transformers eager", "", _eager),
    (BASE, "", _sdpa),
    ("torch.compile", "", _compile),
    ("torch dynamic", "", _dynamic_int8),
    ("ONNX Runtime", "graph optimisation", _onnxruntime(fused=False)),
    ("ONNX Runtime", "BERT fusion", _onnxruntime(fused=True)),
    ("OpenVINO", "ONNX, latency", _openvino(from_torch=False, hints=_LATENCY)),
    ("OpenVINO", "ONNX, throughput, 1 stream", _openvino(from_torch=False, hints=_ONE_STREAM)),
    ("OpenVINO", "own converter, latency", _openvino(from_torch=True, hints=_LATENCY)),
)
_FLOATS = (torch.float32, torch.bfloat16)
# Of who does not compute in all.
_DTYPES = {"transformers eager": _FLOATS, "torch.compile": _FLOATS, "torch dynamic": (torch.int8,)}
PROVIDERS = tuple(dict.fromkeys(provider for provider, _, _ in _BUILDERS))
