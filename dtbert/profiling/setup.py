"""What to profile: a batch of random tokens, a model with random weights, and the names of things."""

import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from dtbert.kernels import BackendName
from dtbert.model import BertConfig, BertForQuestionAnswering, PackedBatch
from dtbert.profiling.report import Setting
from dtbert.weights.load import Placement
from dtbert.weights.quantize import quantize_layers

_QUESTION_TOKENS = 12


def random_batch(config: BertConfig, seqlens: Sequence[int], device: torch.device) -> PackedBatch:
    """A packed batch of random token ids from a fixed seed; the first 12 tokens of each sequence are the question.

    Raises:
        ValueError: no sequences, a length below 1, or one that the model has no positions for.
    """
    limit = config.max_position_embeddings
    if not seqlens:
        raise ValueError("there are no sequences: give at least one length")
    for length in seqlens:
        if not 1 <= length <= limit:
            raise ValueError(f"a sequence has {length:,} tokens: this model takes 1 to {limit}")
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(config.vocab_size, (length,), generator=generator).tolist() for length in seqlens]
    context = min(1, config.type_vocab_size - 1)
    segments = [[0 if position < _QUESTION_TOKENS else context for position in range(length)] for length in seqlens]
    return PackedBatch.from_lists(ids, segments, device)


def random_model(
    num_hidden_layers: int,
    hidden_size: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: BackendName | None = None,
) -> BertForQuestionAnswering:
    """A model with random weights of a published size, ready for inference: as fast as a trained one.

    12 heads, or 16 at hidden size 1024; feed-forward 4 times as wide as the hidden states. As with `load_model`, a CPU
    without matrix instructions for the dtype computes in float32.

    Raises:
        ValueError: a size that does not fit, or a device that is not there.
    """
    config = BertConfig(
        hidden_size=hidden_size,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=16 if hidden_size == 1024 else 12,
        intermediate_size=4 * hidden_size,
    )
    place = Placement.of(device, dtype, backend)
    with place.device:
        model = BertForQuestionAnswering(config, backend=backend).to(place.dtype)
        model.reset_parameters(torch.Generator(place.device).manual_seed(0))
    if place.matrices is not None:
        quantize_layers(model, place.matrices)
    model.prepare()
    return model.eval()


def describe(name: str, model: BertForQuestionAnswering, batch: PackedBatch) -> Setting:
    """The setting of a profile, as this process finds it."""
    on_cpu = model.device.type == "cpu"
    dtypes = dict.fromkeys((model.product_dtype, model.dtype))
    return Setting(
        model=name,
        config=model.config,
        weight_bytes=sum(parameter.numel() * parameter.dtype.itemsize for parameter in model.parameters()),
        seqlens=batch.packing.seqlens,
        device=_processor() if on_cpu else torch.cuda.get_device_name(model.device),
        threads=torch.get_num_threads() if on_cpu else None,
        dtype=" and ".join(str(one).removeprefix("torch.") for one in dtypes),
        backend=model.backend_name,
    )


def check_device(device: torch.device) -> None:
    """Raise ValueError unless steps can be timed there."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"a profile needs a CPU or a CUDA GPU: steps on {str(device)!r} cannot be timed one by one")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
