"""The whole model: nothing dropped, at SQuAD's lengths, at the published schedule, and alone."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bench.checkpoints import Checkpoint, logits_of, reason
from bench.windows import Batch, Logits, random_windows, sized_batches, squad_lengths, token_batches
from torch import Tensor

from dtbert.kernels import BackendName
from dtbert.model import BertForQuestionAnswering, LengthSchedule
from dtbert.weights import load_model
from gpu_bench.attention import DROPPED_BY, OWN
from gpu_bench.setting import Row, Rows, Setting
from gpu_bench.timing import Contender, Launch, compare, time_limit

EAGER, SDPA, COMPILED = "transformers eager", "transformers sdpa", "torch.compile max-autotune"
# torch.compile gets so many seconds a model, as long as the rest keeps as many as it needs.
_COMPILE_S, _RESERVED_S = 90.0, 45.0
_TOLERANCE = 5e-2

Model = Callable[[Batch], Logits]


class Models:
    """dtbert and its peers on the device, each loaded once."""

    def __init__(self, setting: Setting, checkpoint: Checkpoint) -> None:
        self.setting = setting
        device, dtype = setting.device, setting.dtype
        backend: BackendName = "triton" if device.type == "cuda" else "reference"
        self.own = load_model(checkpoint.folder, device=device, dtype=dtype, backend=backend)
        self._sdpa = checkpoint.transformers("sdpa", dtype).to(device)
        self.peers: dict[str, Model] = {
            EAGER: logits_of(checkpoint.transformers("eager", dtype).to(device)),
            SDPA: logits_of(self._sdpa),
        }
        self.reference = logits_of(checkpoint.transformers("eager").to(device))

    def compiled(self, batches: Sequence[Batch], *, dynamic: bool | None) -> Model | str:
        """transformers' model compiled and run on the batches, or why it is not there.

        The mode max-autotune replays CUDA graphs; where lengths differ, it goes without them.
        """
        seconds = min(_COMPILE_S, self.setting.effort.seconds_left - _RESERVED_S)
        if not self.setting.compiles:
            return "left out of a quick run"
        if seconds < 10:
            return "no time was left to compile"
        torch.compiler.reset()
        mode = "max-autotune-no-cudagraphs" if dynamic else "max-autotune"
        model = logits_of(torch.compile(self._sdpa, mode=mode, dynamic=dynamic))
        try:
            with time_limit(seconds):
                for batch in (*batches, *batches):
                    model(batch)
        except Exception as error:
            return reason(error)
        return model

    @property
    def config(self) -> Any:
        return self.own.config


def sections(setting: Setting, checkpoint: Checkpoint) -> Iterator[tuple[str, Callable[[], Rows]]]:
    """The sections by name, over models that are loaded when the first one runs."""

    @functools.cache
    def models() -> Models:
        return Models(setting, checkpoint)

    parts = {"schedule": _schedule, "model": _nothing_dropped, "latency": _alone, "squad": _squad}
    for name, part in parts.items():
        yield name, lambda part=part: part(models())  # type: ignore[misc]


def _nothing_dropped(models: Models) -> Rows:
    sequences, tokens = models.setting.sizes.equal
    batch = Batch.of(random_windows([tokens] * sequences), models.setting.device)
    flops = 2 * sequences * _executed(models, tokens)
    yield {
        "section": "model",
        "work": f"{sequences}x{tokens}",
        "flops": flops,
        **_versus_peers(models, batch, "called"),
    }


def _alone(models: Models) -> Rows:
    tokens = models.setting.sizes.alone
    batch = Batch.of(random_windows([tokens]), models.setting.device)
    note = "dtbert launches its kernels one by one: it has no CUDA graphs yet"
    row = _versus_peers(models, batch, "awaited")
    yield {"section": "latency", "work": f"1x{tokens}", "flops": 2 * _executed(models, tokens), **row, "note": note}


def _versus_peers(models: Models, batch: Batch, launch: Launch) -> Row:
    setting = models.setting
    expected = _padded(models.reference(batch))
    packed = functools.partial(models.own.forward_packed, batch.packed)
    padded = functools.partial(models.own, batch.ids, None, batch.segments)
    contenders = [
        Contender(OWN, lambda _: packed(), _packed, expected),
        Contender(f"{OWN}, padded interface", lambda _: padded(), _padded, expected),
    ]
    for name, peer in models.peers.items():
        contenders.append(Contender(name, functools.partial(_ignore_index, peer, batch), _padded, expected))
    compiled = models.compiled([batch], dynamic=False)
    if not isinstance(compiled, str):
        contenders.append(Contender(COMPILED, functools.partial(_ignore_index, compiled, batch), _padded, expected))
    row = compare(contenders, setting.device, setting.effort, launch=launch, tolerance=_TOLERANCE)
    if isinstance(compiled, str):
        row["not_timed"].append({"provider": COMPILED, "reason": compiled})
    return row


def _ignore_index(model: Model, batch: Batch, _: int) -> Logits:
    return model(batch)


def _packed(logits: Logits) -> Tensor:
    return torch.stack([part.float() for part in logits], -1)


def _padded(logits: Logits) -> Tensor:
    """Of a batch without padding: its rows end to end."""
    return _packed(logits).flatten(0, 1)


def _executed(models: Models, tokens: int) -> int:
    everything = LengthSchedule.absolute([tokens] * models.config.num_hidden_layers)
    return everything.macs(models.config, tokens).executed


def _squad(models: Models) -> Rows:
    """Windows at their own lengths, sorted by length; peers pad each batch to its longest."""
    setting, sizes = models.setting, models.setting.sizes
    lengths = sorted(squad_lengths(sizes.windows))
    work = random_windows(lengths)
    expected = torch.cat([part for window in work for part in _alone_in_float32(models, window)])
    contenders, sets = [], {}
    for tokens in sizes.batch_tokens:
        batches = token_batches(tokens, work, setting.device)
        run = functools.partial(_own_batches, models.own, batches)
        contenders.append(Contender(f"{OWN}, {tokens} tokens a batch", run, _all_packed, expected, _of(OWN)))
    for size in sizes.batch_windows:
        sets[size] = sized_batches(size, work, setting.device)
    for name, peer in models.peers.items():
        for size, batches in sets.items():
            contenders.append(_padded_contender(f"{name}, {size} windows a batch", name, peer, batches, expected))
    dynamic = "torch.compile, dynamic"
    middle = sizes.batch_windows[len(sizes.batch_windows) // 2]
    compiled = models.compiled(sets[middle], dynamic=True)
    if not isinstance(compiled, str):
        title = f"{dynamic}, {middle} windows a batch"
        contenders.append(_padded_contender(title, dynamic, compiled, sets[middle], expected))
    row = compare(contenders, setting.device, setting.effort, launch="called", tolerance=_TOLERANCE)
    for result in row["results"]:
        result["windows_per_second"] = round(1e3 * len(work) / result["ms"])
    if isinstance(compiled, str):
        row["not_timed"].append({"provider": dynamic, "reason": compiled})
    yield {
        "section": "squad",
        "work": f"{len(work)} SQuAD windows",
        "windows": len(work),
        "tokens": sum(lengths),
        **row,
    }


def _of(engine: str) -> tuple[tuple[str, str], ...]:
    return (("engine", engine),)


def _padded_contender(title: str, engine: str, model: Model, batches: Sequence[Batch], expected: Tensor) -> Contender:
    def run(_: int) -> list[Logits]:
        return [model(batch) for batch in batches]

    def view(out: list[Logits]) -> Tensor:
        return torch.cat(
            [part for batch, logits in zip(batches, out, strict=True) for part in batch.windows_of(logits)]
        )

    return Contender(title, run, view, expected, _of(engine))


def _alone_in_float32(models: Models, window: Sequence[int]) -> list[Tensor]:
    batch = Batch.of([window], models.setting.device)
    return batch.windows_of(models.reference(batch))


def _own_batches(model: BertForQuestionAnswering, batches: Sequence[Batch], _: int) -> list[Logits]:
    return [model.forward_packed(batch.packed) for batch in batches]


def _all_packed(out: list[Logits]) -> Tensor:
    return torch.cat([_packed(logits) for logits in out])


def _schedule(models: Models) -> Rows:
    """Time saved by the published schedule against the executed MACs that it saves."""
    setting, lengths = models.setting, models.setting.sizes.lengths
    sequences, tokens = setting.sizes.equal
    batch = Batch.of(random_windows([tokens] * sequences), setting.device).packed
    everything = _executed(models, tokens)
    contenders = [Contender("all tokens", lambda _: models.own.forward_packed(batch), _packed)]
    for scorer in DROPPED_BY:
        schedule = LengthSchedule.absolute(lengths, scorer=scorer)
        saved = 1 - schedule.macs(models.config, tokens, backend="triton").executed / everything
        run = functools.partial(_scheduled, models.own, batch, schedule)
        contenders.append(Contender(scorer, run, _packed, extra=(("macs_saved", round(saved, 4)),)))
    row = compare(contenders, setting.device, setting.effort, launch="called")
    yield {"section": "schedule", "work": f"{sequences}x{tokens} at {','.join(map(str, lengths))}", **row}


def _scheduled(model: BertForQuestionAnswering, batch: Any, schedule: LengthSchedule, _: int) -> Logits:
    return model.forward_packed(batch, schedule)
