"""Models that dtbert and its peers load alike, and what is exported from them."""

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench.windows import INPUTS, Batch, Logits
from dtbert.weights import convert


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
        return logits_of(self.transformers("eager"))

    @cached_property
    def onnx(self) -> Path:
        """The graph with dynamic batch and length."""
        path = self.folder / "model.onnx"
        sizes = {0: torch.export.Dim("batch", min=1, max=64), 1: torch.export.Dim("length", min=2, max=512)}
        with quiet():
            torch.onnx.export(
                Exported(self.transformers("sdpa")),
                example(),
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
                Exported(model),
                example(),
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


def int8_onnx(path: Path) -> Path:
    """The graph with weights in int8 by column and activations rounded as they come, by ONNX Runtime's own tool."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    quantized = path.with_suffix(".int8.onnx")
    if not quantized.exists():
        with quiet():
            quantize_dynamic(path, quantized, per_channel=True, weight_type=QuantType.QInt8)
    return quantized


class Exported(nn.Module):
    """Inputs by position and a tuple out, as exporters want them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, Tensor]:
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return out.start_logits, out.end_logits


def random_checkpoint(folder: Path, **sizes: Any) -> Checkpoint:
    """Dynamic-TinyBERT's sizes, 6 layers of 768, or others, with random weights."""
    from transformers import BertConfig, BertForQuestionAnswering

    torch.manual_seed(0)
    config = BertConfig(**({"num_hidden_layers": 6} | sizes))
    with quiet():
        BertForQuestionAnswering(config).save_pretrained(folder)
    return Checkpoint(f"{config.num_hidden_layers}x{config.hidden_size}", folder)


def shipped_checkpoint(folder: Path) -> Checkpoint:
    """The model inside the package, 6 layers of 384, as a folder that transformers loads."""
    return Checkpoint("6x384", convert(None, folder))


def logits_of(model: Callable[..., Any]) -> Callable[[Batch], Logits]:
    def run(batch: Batch) -> Logits:
        # Without padding transformers is faster when it gets no mask.
        mask = batch.mask if batch.padded else None
        out = model(input_ids=batch.ids, attention_mask=mask, token_type_ids=batch.segments)
        return out.start_logits, out.end_logits

    return run


def example() -> tuple[Tensor, Tensor, Tensor]:
    batch = Batch.of([range(5, 69), range(5, 49)])
    return batch.ids, batch.mask, batch.segments


def reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


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
