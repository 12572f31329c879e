"""Writing checkpoints: a model's own, and another checkpoint's in another form."""

import json
import shutil
from collections.abc import Mapping
from os import PathLike
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from dtbert.files import check_new_folder, new_folder, replacing, write_whole
from dtbert.kernels.float8 import FLOAT8
from dtbert.kernels.parameters import Linear
from dtbert.model import BertEncoder, BertForQuestionAnswering, BertForSequenceClassification
from dtbert.weights.checkpoint import TOKENIZER_FILES, WEIGHT_FILES, Checkpoint, open_checkpoint, weights_sha256
from dtbert.weights.hub import resolve_source
from dtbert.weights.labels import label_fields, read_labels
from dtbert.weights.load import expected_tensors
from dtbert.weights.names import CLASSIFIER, POOLER, SPAN_HEAD, hub_names
from dtbert.weights.pooling import MODULES_FILE, POOLING_FILE
from dtbert.weights.quantize import dequantize_rows, is_quantizable, quantize_rows

# What goes with the weights into a converted folder.
_MEASURED = ("schedules.json", "cascade.json", "no_answer.json")
_COMPANIONS = ("config.json", *TOKENIZER_FILES, *_MEASURED, MODULES_FILE, POOLING_FILE, "README.md", "LICENSE")

Saved = BertForQuestionAnswering | BertForSequenceClassification | BertEncoder


def to_hub_tensors(model: Saved) -> dict[str, Tensor]:
    """The model's weights under the hub's names: plain tensors on the CPU, which may share the model's memory.

    One in int8 has its scale beside it, as `convert` writes it; one in fp8 becomes the float32 that it means.
    """
    tensors: dict[str, Tensor] = {}
    linears = {f"{name}.weight": module for name, module in model.named_modules() if isinstance(module, Linear)}
    for parameter, value in model.named_parameters():
        linear, names = linears.get(parameter), hub_names(parameter)
        plain = value.detach() if linear is None else linear.plain_weight
        scale = None if linear is None else linear.scale
        if scale is not None and plain.dtype == FLOAT8:
            plain, scale = dequantize_rows(plain, scale), None
        tensors |= zip(names, plain.cpu().chunk(len(names)), strict=True)
        if scale is not None:
            tensors |= zip((f"{name}.scale" for name in names), scale.half().cpu().chunk(len(names)), strict=True)
    return _without_prefix(tensors) if isinstance(model, BertEncoder) else tensors


def save_model(model: Saved, folder: str | PathLike[str]) -> Path:
    """Write ``config.json`` and ``model.safetensors``, which `load_model` and its like and transformers load.

    Args:
        model: on any device, its weights packed or not.
        folder: a new or empty one; it appears with all its files, or not at all.

    Raises:
        FileExistsError: something is there already.
        OSError: it cannot be written.
    """
    with new_folder(folder) as partial:
        write_model_files(model, partial)
    return Path(folder)


def write_model_files(model: Saved, folder: Path) -> None:
    """Write, or replace one after the other, each of them whole, the two files of a model in a folder that is there."""
    architecture = "BertModel" if isinstance(model, BertEncoder) else type(model).__name__
    config = {"architectures": [architecture], **model.config.to_dict()}
    if isinstance(model, BertForSequenceClassification):
        config |= label_fields(model.labels)
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    with replacing(folder / WEIGHT_FILES[0]) as partial:
        save_file(to_hub_tensors(model), partial, {"format": "pt"})


def convert(
    source: str | PathLike[str] | None, dest: str | PathLike[str], *, revision: str | None = None, int8: bool = False
) -> Path:
    """Write any checkpoint that dtbert loads as a folder with safetensors; its config and tokenizer go along.

    Args:
        source: as `load_model`'s.
        dest: a new or empty folder; it appears with all its files, or not at all.
        revision: as `load_model`'s.
        int8: write ``model.int8.safetensors``, a quarter of float32's size: matrices as int8 with a float16 scale per
            row, the rest as float16. Otherwise ``model.safetensors``, in the floats of the source; int8 becomes
            float32. A `schedules.json`, `cascade.json` or `no_answer.json` beside the source goes along; it was
            measured with the source's weights, and with ``int8`` loading says so.

    Returns:
        ``dest``.

    Raises:
        FileExistsError: ``dest`` is there already, and not an empty folder.
        CheckpointError, OSError, ValueError: as `load_model`.
    """
    check_new_folder(dest)
    checkpoint = open_checkpoint(resolve_source(source, revision))
    file, metadata, tensors = "model.safetensors", {"format": "pt"}, _read_all(checkpoint)
    if not checkpoint.has((*SPAN_HEAD, *CLASSIFIER)):
        tensors = _without_prefix(tensors)
    if int8:
        file, metadata["quantization"] = "model.int8.safetensors", "int8 per row, symmetric, <name>.scale"
        tensors = _quantize(tensors, checkpoint)
    with new_folder(dest) as partial:
        save_file(tensors, partial / file, metadata)
        for name in _COMPANIONS:
            if (checkpoint.folder / name).is_file():
                (partial / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(checkpoint.folder / name, partial / name)
        measured = [] if int8 else [partial / name for name in _MEASURED if (partial / name).is_file()]
        if measured:
            # They were measured with the same values in another file.
            old, new = weights_sha256(checkpoint.file.path), weights_sha256(partial)
            for copied in measured:
                copied.write_bytes(copied.read_bytes().replace(old.encode(), new.encode()))
    return Path(dest)


def _read_all(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Every tensor that a model of dtbert's has a place for, by its hub name."""
    with torch.device("meta"):
        expected = expected_tensors(BertEncoder(checkpoint.config, pooler=checkpoint.has(POOLER)))
        if checkpoint.has(SPAN_HEAD):
            expected |= expected_tensors(BertForQuestionAnswering(checkpoint.config))
        if checkpoint.has(CLASSIFIER):
            labels = len(read_labels(checkpoint.folder))
            expected |= zip(CLASSIFIER, ((labels, checkpoint.config.hidden_size), (labels,)), strict=True)
    tensors, alone = {}, not checkpoint.has((*SPAN_HEAD, *CLASSIFIER))
    for name, source in checkpoint.match(expected, encoder_alone=alone).items():
        values = checkpoint.file.read(source.name).contiguous()
        tensors[name] = dequantize_rows(values, checkpoint.file.read(source.scale)) if source.scale else values
    checkpoint.check_finite(tensors)
    return tensors


def _quantize(tensors: Mapping[str, Tensor], checkpoint: Checkpoint) -> dict[str, Tensor]:
    quantized = {}
    for name, tensor in tensors.items():
        if is_quantizable(tuple(tensor.shape)):
            quantized[name], quantized[f"{name}.scale"] = quantize_rows(tensor)
        else:
            quantized[name] = tensor.half()
    checkpoint.check_finite({name: tensor for name, tensor in quantized.items() if tensor.is_floating_point()})
    return quantized


def _without_prefix(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # The hub's convention: a bare encoder's names have no prefix.
    return {name.removeprefix("bert."): tensor for name, tensor in tensors.items()}
