"""Whole models on the device, dtbert's and its peers', and what is timed of them."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from bench.checkpoints import Checkpoint, logits_of, reason
from bench.windows import Batch, Logits
from torch import Tensor

from dtbert.kernels import BackendName
from dtbert.model import BertForQuestionAnswering, LengthSchedule
from dtbert.weights import load_model
from gpu_bench.attention import OWN
from gpu_bench.setting import Setting
from gpu_bench.timing import Contender

EAGER, SDPA = "transformers eager", "transformers sdpa"
GRAPHS = "dtbert, graphs"
FLOAT8 = "dtbert, fp8"
# Of the logits of a whole model in half precision.
TOLERANCE = 5e-2
# And where its layers multiply in fp8.
FLOAT8_TOLERANCE = 0.1

Model = Callable[[Batch], Logits]


class Models:
    """Each loaded when it is first asked for."""

    def __init__(self, setting: Setting, checkpoint: Checkpoint) -> None:
        self.setting, self._checkpoint = setting, checkpoint

    @functools.cached_property
    def own(self) -> BertForQuestionAnswering:
        return self._own(graphs=False)

    @functools.cached_property
    def graphs(self) -> BertForQuestionAnswering:
        """Whose kernels are replayed from CUDA graphs."""
        return self._own(graphs=True)

    @functools.cached_property
    def float8(self) -> BertForQuestionAnswering:
        """Whose layers multiply in fp8, with CUDA graphs on a GPU."""
        return self._own(graphs=self.setting.device.type == "cuda", dtype=torch.float8_e4m3fn)

    @functools.cached_property
    def fastest(self) -> BertForQuestionAnswering:
        """With CUDA graphs on a GPU: without, launches cost more than the work that dropping leaves."""
        return self.graphs if self.setting.device.type == "cuda" else self.own

    def _own(self, *, graphs: bool, dtype: torch.dtype | None = None) -> BertForQuestionAnswering:
        setting, folder = self.setting, self._checkpoint.folder
        backend: BackendName = "triton" if setting.device.type == "cuda" else "reference"
        dtype = dtype or setting.dtype
        return load_model(folder, device=setting.device, dtype=dtype, backend=backend, graphs=graphs)

    @functools.cached_property
    def peers(self) -> dict[str, Model]:
        return {EAGER: logits_of(self._peer("eager")), SDPA: logits_of(self.sdpa)}

    @functools.cached_property
    def sdpa(self) -> Any:
        """transformers' model on PyTorch's own attention."""
        return self._peer("sdpa")

    def _peer(self, attention: str) -> Any:
        return self._checkpoint.transformers(attention, self.setting.dtype).to(self.setting.device)

    @functools.cached_property
    def reference(self) -> Model:
        """transformers in float32."""
        return logits_of(self._checkpoint.transformers("eager").to(self.setting.device))

    @property
    def config(self) -> Any:
        return self.own.config

    def executed(self, tokens: int, schedule: LengthSchedule | None = None) -> int:
        """MACs of a sequence as the kernels compute them; without a schedule, of all its tokens."""
        schedule = schedule or LengthSchedule.absolute([tokens] * self.config.num_hidden_layers)
        return schedule.macs(self.config, tokens, backend="triton").executed


_OWN: dict[str, Callable[[Models], BertForQuestionAnswering]] = {
    OWN: lambda models: models.own,
    GRAPHS: lambda models: models.graphs,
    FLOAT8: lambda models: models.float8,
}


def own_contenders(models: Models, batch: Batch, expected: Tensor, names: Sequence[str]) -> Iterator[Contender | str]:
    """dtbert's models of these names on a packed batch; in the place of one that does not load, why."""
    for name in names:
        try:
            model = _OWN[name](models)
        except (TypeError, ValueError, RuntimeError) as error:
            yield reason(error)
            continue
        yield Contender(name, functools.partial(forward, model, batch), packed, expected)


def peer_contenders(peers: dict[str, Model], batch: Batch, expected: Tensor) -> Iterator[Contender]:
    for name, peer in peers.items():
        yield Contender(name, functools.partial(ignore_index, peer, batch), padded, expected)


def forward(model: BertForQuestionAnswering, batch: Batch, _: int) -> Logits:
    return model.forward_packed(batch.packed)


def ignore_index(model: Model, batch: Batch, _: int) -> Logits:
    return model(batch)


def packed(logits: Logits) -> Tensor:
    return torch.stack([part.float() for part in logits], -1)


def padded(logits: Logits) -> Tensor:
    """Of a batch without padding: its rows end to end."""
    return packed(logits).flatten(0, 1)
