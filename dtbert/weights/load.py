"""From a checkpoint to a model that is ready to run."""

import logging
from collections.abc import Sequence
from os import PathLike
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from dtbert.files import first_line
from dtbert.kernels import BackendName, Sizes, choose_backend, native
from dtbert.kernels.cpu import computes_natively
from dtbert.kernels.float8 import FLOAT8
from dtbert.model import (
    BertEncoder,
    BertForQuestionAnswering,
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    Pooling,
)
from dtbert.weights.checkpoint import Checkpoint, Source, TensorFile, open_checkpoint
from dtbert.weights.hub import resolve_source
from dtbert.weights.labels import are_unnamed, check_classifies, places_of, read_labels
from dtbert.weights.names import CLASSIFIER, POOLER, SPAN_HEAD, hub_names
from dtbert.weights.pooling import read_pooling
from dtbert.weights.quantize import dequantize_rows, layer_linears, scaled

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8, FLOAT8)
_BLOCK = 2**20  # values

logger = logging.getLogger(__name__)

M = TypeVar("M", BertForQuestionAnswering, BertEncoder, BertForSequenceClassification, BertForSentenceEmbedding)


class Placement(NamedTuple):
    """Where weights go, the dtype to which they are rounded, the one in which they are held and computed, and the one,
    int8 or fp8, in which the layers' matrices are held and multiplied instead."""

    device: torch.device
    precision: torch.dtype
    dtype: torch.dtype
    matrices: torch.dtype | None = None

    @classmethod
    def of(
        cls,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: BackendName | None = None,
    ) -> "Placement":
        """What `load_model`'s arguments say; ValueError where one of them is wrong, before a file is opened."""
        precision = torch.float32 if dtype is None else dtype
        if precision not in _DTYPES:
            *most, last = map(str, _DTYPES)
            raise ValueError(f"dtype must be {', '.join(most)} or {last}, not {dtype!r}")
        try:
            place = torch.device("cpu" if device is None else device)
            torch.zeros(1, device=place).tolist()
        except (RuntimeError, AssertionError, NotImplementedError) as error:
            reason = first_line(error)
            if reason.startswith("Expected one of"):  # all of torch's forty kinds
                reason = "expected cpu, cuda, cuda:1, ..."
            raise ValueError(f"the device {str(device)!r} is not there: {reason}") from error
        choose_backend(place, backend)
        if precision == torch.int8:
            return cls._of_int8(place, backend)
        if precision == FLOAT8:
            return cls._of_float8(place, backend)
        native = computes_natively(place, precision)
        return cls(place, precision, precision if native else torch.float32)

    @classmethod
    def _of_int8(cls, place: torch.device, backend: BackendName | None) -> "Placement":
        if place.type != "cpu" or backend in ("cpu", "triton"):
            where = f"{place}" if backend is None else f"{place} by the backend {backend!r}"
            raise ValueError(f"int8 is computed on a CPU by the backend 'native', not on {where}: give another dtype")
        if backend is None and not native.pays(torch.int8):
            logger.warning("dtype torch.int8: %s; computed in float32", native.why_not(torch.int8))
            return cls(place, torch.float32, torch.float32)
        states = torch.bfloat16 if computes_natively(place, torch.bfloat16) else torch.float32
        return cls(place, states, states, torch.int8)

    @classmethod
    def _of_float8(cls, place: torch.device, backend: BackendName | None) -> "Placement":
        if place.type != "cpu" and backend != "reference":
            choose_backend(place, "triton", Sizes(FLOAT8))
        elif backend is None:
            logger.warning("dtype %s: emulated on a CPU, slower than float32, to see what a GPU would answer", FLOAT8)
        states = torch.bfloat16
        native = computes_natively(place, states)
        return cls(place, states, states if native else torch.float32, FLOAT8)


def load_model(
    source: str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName | None = None,
    graphs: bool | None = None,
) -> BertForQuestionAnswering:
    """Load a span-answering BERT, ready for inference: no gradients, weights prepared for its device.

    Args:
        source: a folder, a file (``.safetensors`` or ``.bin``) with ``config.json`` beside it, or a hub id such as
            ``"Intel/dynamic_tinybert"``; by default the model inside the package.
        revision: branch, tag or commit of a hub id; its main branch by default.
        device: where the weights go; the CPU by default.
        dtype: ``torch.float32`` (the default, whatever the file holds), ``torch.bfloat16`` or ``torch.float16``. A CPU
            without matrix instructions for the dtype emulates it at a fraction of the speed of float32, so there
            the weights are rounded to the dtype, then held and computed in float32: `model.dtype` tells. Or
            ``torch.int8``, on a CPU: the layers' matrices as a file of int8 has them, or rounded so here, times
            activations that are rounded token by token, in int8; the rest in bfloat16 where the CPU has it, else in
            float32. Where `dtbert build` was not run, or found that slower, a warning says so, and all is float32. Or
            ``torch.float8_e4m3fn``, on an NVIDIA GPU of compute capability 8.9 or more: the layers' matrices rounded
            to fp8, times activations that are rounded token by token; the rest in bfloat16. A CPU emulates it.
        backend: the kernels, ``"reference"``, ``"cpu"`` or ``"triton"``; by device if left out, and
            `model.backend_name` tells which.
        graphs: whether the launches of a forward are recorded and replayed as one CUDA graph, where the backend is
            ``"triton"`` on a GPU: those of batches of at most 16,384 tokens by default, of 32,768 with True.

    Raises:
        CheckpointError: weights that are damaged, refused, not finite, or do not fit the config; every tensor is named.
        OSError: files are missing, or the hub cannot be reached.
        ValueError: a device or dtype that is not there, graphs asked for where there are none, a config that is no BERT
            encoder's, or a malformed hub id.
    """
    placement = Placement.of(device, dtype, backend)
    if graphs:
        _check_graphs(choose_backend(placement.device, backend), placement.device)
    checkpoint = open_checkpoint(resolve_source(source, revision))
    model = _filled(BertForQuestionAnswering, checkpoint, placement, backend=backend, graphs=graphs)
    if graphs:  # its sizes may be beyond the kernels
        _check_graphs(model.backend_name, placement.device)
    model.prepare()
    return model.eval()


def load_encoder(
    source: str | PathLike[str] | None = None,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName | None = None,
) -> BertEncoder:
    """Load a bare BERT from any BERT checkpoint, with the pooler where there is one; heads are left out.

    Arguments and errors are `load_model`'s.
    """
    placement = Placement.of(device, dtype, backend)
    checkpoint = open_checkpoint(resolve_source(source, revision))
    model = _filled(BertEncoder, checkpoint, placement, pooler=checkpoint.has(POOLER), backend=backend)
    model.prepare()
    return model.eval()


def load_classifier(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName | None = None,
) -> BertForSequenceClassification:
    """Load a BERT that labels texts, ready for inference; its labels are those of the checkpoint's config.

    Arguments and errors are `load_model`'s; a model that labels words, or gives several labels a text, is a ValueError.
    """
    placement = Placement.of(device, dtype, backend)
    checkpoint = open_checkpoint(resolve_source(source, revision))
    check_classifies(checkpoint.folder)
    labels = read_labels(checkpoint.folder)
    model = _filled(BertForSequenceClassification, checkpoint, placement, labels=labels, backend=backend)
    model.prepare()
    return model.eval()


def load_sentence_encoder(
    source: str | PathLike[str],
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName | None = None,
    pooling: Pooling | None = None,
) -> BertForSentenceEmbedding:
    """Load a BERT that makes sentence embeddings, ready for inference; heads are left out.

    Args:
        pooling: by default as the checkpoint's ``modules.json`` says, which sentence-transformers writes; ``"mean"``
            where there is none.

    The other arguments and errors are `load_model`'s; a ``modules.json`` that asks for what dtbert does not do is a
    ValueError, too.
    """
    placement = Placement.of(device, dtype, backend)
    checkpoint = open_checkpoint(resolve_source(source, revision))
    if pooling is None:
        pooling = read_pooling(checkpoint.folder).pooling
    model = _filled(BertForSentenceEmbedding, checkpoint, placement, pooling=pooling, backend=backend)
    model.prepare()
    return model.eval()


def load_trainable(
    source: str | PathLike[str] | None,
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> BertForQuestionAnswering:
    """Load a BERT to be trained: plain float32 parameters that need gradients, in training mode.

    Arguments and errors are `load_model`'s. ``generator`` draws a span head for an encoder alone.
    """
    placement = Placement.of(device)
    checkpoint = open_checkpoint(resolve_source(source, revision))
    if checkpoint.has(SPAN_HEAD):
        model = _filled(BertForQuestionAnswering, checkpoint, placement)
    else:
        # First, for it finds whether the file is of the sizes in its config.
        encoder = _filled(BertEncoder, checkpoint, placement).encoder
        model = BertForQuestionAnswering(checkpoint.config)
        model.reset_parameters(generator)
        model = model.to(placement.device)
        model.encoder = encoder
    return model.requires_grad_(True).train()


def load_trainable_classifier(
    source: str | PathLike[str],
    labels: Sequence[str],
    *,
    revision: str | None = None,
    device: torch.device | str | None = None,
    generator: torch.Generator | None = None,
) -> BertForSequenceClassification:
    """Load a BERT to be trained to label texts; otherwise as `load_trainable`.

    Args:
        labels: their names. A classifier that has the same ones is gone on with, in its own order, as is one whose
            labels have no names, which gets these; in place of one of other labels, or of none, a new one is drawn with
            ``generator``, as is a pooler where there is none.
    """
    placement = Placement.of(device)
    checkpoint = open_checkpoint(resolve_source(source, revision))
    own = _labels_to_keep(checkpoint, labels)
    if own:
        model = _filled(BertForSequenceClassification, checkpoint, placement, labels=own)
    else:
        # First, for it finds whether the file is of the sizes in its config.
        encoder = _filled(BertEncoder, checkpoint, placement, pooler=checkpoint.has(POOLER))
        model = BertForSequenceClassification(checkpoint.config, labels)
        model.reset_parameters(generator)
        model = model.to(placement.device)
        model.encoder = encoder.encoder
        model.pooler = encoder.pooler or model.pooler
    return model.requires_grad_(True).train()


def _labels_to_keep(checkpoint: Checkpoint, labels: Sequence[str]) -> Sequence[str]:
    """The names of a checkpoint's labels where they are these; nothing where it has others, or no classifier."""
    if not checkpoint.has(CLASSIFIER):
        return ()
    own = read_labels(checkpoint.folder)
    try:
        places_of(labels, own)
    except ValueError:
        return ()
    return labels if are_unnamed(own) else own


def _check_graphs(backend: BackendName, device: torch.device) -> None:
    if backend != "triton" or device.type != "cuda":
        raise ValueError(
            f"graphs=True needs the backend 'triton' on a GPU, not {backend!r} on {device}: give device='cuda', or "
            "leave graphs out"
        )


def expected_tensors(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of each of the model's tensors, by its hub name."""
    expected = {}
    for parameter, value in model.named_parameters():
        names = hub_names(parameter)
        for name in names:
            expected[name] = (value.shape[0] // len(names), *value.shape[1:])
    return expected


def _filled(kind: type[M], checkpoint: Checkpoint, placement: Placement, **options: Any) -> M:
    """A model of the checkpoint's sizes with its weights.

    The largest go first: while a tensor is copied it is in memory twice, and the largest one is least in the way when
    nothing else is there yet.
    """
    with torch.device("meta"):
        model = kind(checkpoint.config, **options)
    alone = kind in (BertEncoder, BertForSentenceEmbedding)
    sources = checkpoint.match(expected_tensors(model), encoder_alone=alone)
    tensors: dict[str, Tensor] = {}
    pieces: dict[str, Tensor] = {}
    dtype = placement.matrices
    scaled_ones = {f"{name}.weight" for name in layer_linears(model, dtype)} if dtype is not None else set()
    for parameter, value in sorted(model.named_parameters(), key=lambda item: item[1].numel(), reverse=True):
        if dtype is not None and parameter in scaled_ones:
            parts = [_scaled_of(checkpoint.file, sources[name], dtype) for name in hub_names(parameter)]
            tensors[parameter] = torch.cat([values for values, _ in parts]).to(placement.device)
            scale = torch.cat([scale for _, scale in parts]).to(placement.device)
            tensors[f"{parameter.removesuffix('weight')}scale"] = scale
            pieces |= zip(hub_names(parameter), scale.chunk(len(parts)), strict=True)
            continue
        tensors[parameter] = torch.empty(value.shape, dtype=placement.dtype, device=placement.device)
        names = hub_names(parameter)
        for name, rows in zip(names, tensors[parameter].chunk(len(names)), strict=True):
            _copy(checkpoint.file, sources[name], rows, placement.precision)
            pieces[name] = rows
    checkpoint.check_finite(pieces)
    model.load_state_dict(tensors, assign=True)
    return model.requires_grad_(False)


def _scaled_of(file: TensorFile, source: Source, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A matrix in int8 or fp8, and its scale in float32: the file's own where it holds int8, else rounded here."""
    values = file.read(source.name)
    if source.scale is None:
        return scaled(values, dtype)
    scale = file.read(source.scale)
    return (values.clone(), scale.float()) if dtype == torch.int8 else scaled(dequantize_rows(values, scale), dtype)


def _copy(file: TensorFile, source: Source, target: Tensor, precision: torch.dtype) -> None:
    values = file.read(source.name)
    scale = None if source.scale is None else file.read(source.scale)
    if precision == target.dtype and (scale is None or precision == torch.float32):
        # Two operations: where other processes have the cores, each waits for all threads that share it.
        target.copy_(values)
        if scale is not None:
            target.mul_(scale.to(target)[:, None])
        return
    # By blocks, so that what is computed on the way stays small.
    rows = max(1, _BLOCK * len(values) // values.numel())
    for start in range(0, len(values), rows):
        block = slice(start, start + rows)
        part = values[block] if scale is None else dequantize_rows(values[block], scale[block])
        target[block].copy_(part.to(precision))
