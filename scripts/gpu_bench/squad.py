"""Windows at SQuAD's lengths, sorted by length: dtbert packs them, its peers pad each batch to its longest."""

import functools
from collections.abc import Sequence

import torch
from bench.windows import Batch, Logits, random_windows, sized_batches, squad_lengths, token_batches
from torch import Tensor

from dtbert.model import BertForQuestionAnswering
from gpu_bench.attention import OWN
from gpu_bench.models import GRAPHS, TOLERANCE, Model, Models, packed
from gpu_bench.setting import Rows
from gpu_bench.timing import Contender, compare


class Windows:
    """The windows, and their logits by transformers in float32."""

    def __init__(self, models: Models) -> None:
        self.models, self.setting = models, models.setting
        self.lengths = sorted(squad_lengths(models.setting.sizes.windows))
        self.work = random_windows(self.lengths)

    @functools.cached_property
    def expected(self) -> Tensor:
        batches = (Batch.of([window], self.setting.device) for window in self.work)
        return torch.cat([part for batch in batches for part in batch.windows_of(self.models.reference(batch))])

    def batches(self, size: int) -> list[Batch]:
        return sized_batches(size, self.work, self.setting.device)

    def own(self) -> list[Contender]:
        found, models = [], {OWN: self.models.own}
        if self.models.fastest is not self.models.own:
            models[GRAPHS] = self.models.fastest
        for tokens in self.setting.sizes.batch_tokens:
            batches = token_batches(tokens, self.work, self.setting.device)
            for name, model in models.items():
                run, engine = functools.partial(_own_batches, model, batches), (("engine", OWN),)
                found.append(Contender(f"{name}, {tokens} tokens a batch", run, _all_packed, self.expected, engine))
        return found

    def padded(self, engine: str, model: Model, size: int, batches: Sequence[Batch]) -> Contender:
        def run(_: int) -> list[Logits]:
            return [model(batch) for batch in batches]

        def view(out: list[Logits]) -> Tensor:
            pairs = zip(batches, out, strict=True)
            return torch.cat([part for batch, logits in pairs for part in batch.windows_of(logits)])

        return Contender(f"{engine}, {size} windows a batch", run, view, self.expected, (("engine", engine),))

    def row(self, section: str, contenders: Sequence[Contender]) -> Rows:
        setting = self.setting
        row = compare(contenders, setting.device, setting.effort, launch="called", tolerance=TOLERANCE)
        for result in row["results"]:
            result["windows_per_second"] = round(1e3 * len(self.work) / result["ms"])
        work = f"{len(self.work)} SQuAD windows"
        yield {"section": section, "work": work, "windows": len(self.work), "tokens": sum(self.lengths), **row}


def squad(models: Models) -> Rows:
    windows, contenders = Windows(models), []
    sets = {size: windows.batches(size) for size in models.setting.sizes.batch_windows}
    for name, peer in models.peers.items():
        contenders += [windows.padded(name, peer, size, batches) for size, batches in sets.items()]
    yield from windows.row("squad", [*windows.own(), *contenders])


def _own_batches(model: BertForQuestionAnswering, batches: Sequence[Batch], _: int) -> list[Logits]:
    return [model.forward_packed(batch.packed) for batch in batches]


def _all_packed(out: list[Logits]) -> Tensor:
    return torch.cat([packed(logits) for logits in out])
