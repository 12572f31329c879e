"""transformers' model by torch.compile, beside dtbert's in one run: minutes of compiling for a few figures."""

from collections.abc import Sequence

import torch
from bench.checkpoints import logits_of
from bench.windows import Batch, random_windows

from gpu_bench.attention import OWN
from gpu_bench.models import GRAPHS, SDPA, TOLERANCE, Model, Models, own_contenders, padded, peer_contenders
from gpu_bench.setting import Rows
from gpu_bench.squad import Windows
from gpu_bench.timing import Contender, Launch, compare

COMPILED, DYNAMIC = "torch.compile max-autotune", "torch.compile, dynamic"


def compiled_model(models: Models) -> Rows:
    sequences, tokens = models.setting.sizes.equal
    return _equal_lengths(models, "compiled", [tokens] * sequences, "called")


def compiled_latency(models: Models) -> Rows:
    return _equal_lengths(models, "compiled_latency", [models.setting.sizes.alone], "awaited")


def compiled_squad(models: Models) -> Rows:
    sizes = models.setting.sizes.batch_windows
    size, windows = sizes[len(sizes) // 2], Windows(models)
    batches = windows.batches(size)
    model = _compiled(models, batches, dynamic=True)
    yield from windows.row("compiled_squad", [*windows.own(), windows.padded(DYNAMIC, model, size, batches)])


def _equal_lengths(models: Models, section: str, lengths: Sequence[int], launch: Launch) -> Rows:
    setting, batch = models.setting, Batch.of(random_windows(lengths), models.setting.device)
    expected = padded(models.reference(batch))
    peers = {COMPILED: _compiled(models, [batch], dynamic=False), SDPA: models.peers[SDPA]}
    own = own_contenders(models, batch, expected, (OWN, GRAPHS))
    contenders = [contender for contender in own if isinstance(contender, Contender)]
    contenders += peer_contenders(peers, batch, expected)
    row = compare(contenders, setting.device, setting.effort, launch=launch, tolerance=TOLERANCE)
    yield {"section": section, "work": f"{len(lengths)}x{lengths[0]}", **row}


def _compiled(models: Models, batches: Sequence[Batch], *, dynamic: bool) -> Model:
    """transformers' model compiled, and run on the batches.

    The mode max-autotune replays CUDA graphs; where lengths differ, it goes without them.
    """
    torch.compiler.reset()
    mode = "max-autotune-no-cudagraphs" if dynamic else "max-autotune"
    if models.setting.device.type == "cpu":
        mode = "default"
    model = logits_of(torch.compile(models.sdpa, mode=mode, dynamic=dynamic))
    for batch in (*batches, *batches):
        model(batch)
    return model


SECTIONS = {
    "compiled": compiled_model,
    "compiled_squad": compiled_squad,
    "compiled_latency": compiled_latency,
}
