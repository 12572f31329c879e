"""A profile in full: what was measured, on what; and its JSON fields."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from dtbert.model import BertConfig
from dtbert.profiling.ceilings import Ceilings
from dtbert.profiling.forward import Calls, ForwardProfile, Spread


@dataclass(frozen=True)
class Setting:
    """What was profiled and where.

    Attributes:
        model: its name, as the user gave it.
        config: its sizes.
        weight_bytes: memory of its parameters.
        seqlens: tokens of each sequence of the batch.
        device: the device's own name.
        threads: CPU threads; None on a GPU.
        dtype: in which the model computes.
        backend: the name of the kernels.
    """

    model: str
    config: BertConfig
    weight_bytes: int
    seqlens: tuple[int, ...]
    device: str
    threads: int | None
    dtype: str
    backend: str

    @property
    def batch(self) -> str:
        """The batch in words."""
        shortest, longest, count = min(self.seqlens), max(self.seqlens), len(self.seqlens)
        if shortest == longest:
            return f"{count} x {longest} tokens"
        return f"{count} sequences of {shortest} to {longest} tokens, {sum(self.seqlens):,} in all"

    @property
    def place(self) -> str:
        """The device in words."""
        if self.threads is None:
            return self.device
        return f"{self.device}, {self.threads} thread{'s' if self.threads > 1 else ''}"


class Saving(NamedTuple):
    """What a schedule leaves of the seconds and of the FLOPs of a forward that drops nothing."""

    seconds: float
    flops: float

    @property
    def efficiency(self) -> float | None:
        """Saved seconds as a part of the saved FLOPs; None where no FLOPs are saved."""
        return (1 - self.seconds) / (1 - self.flops) if self.flops < 1 else None


@dataclass(frozen=True)
class Profile:
    """``everything`` drops nothing; ``dropping`` is the same batch at a schedule, if one was given."""

    setting: Setting
    ceilings: Ceilings
    everything: ForwardProfile
    dropping: ForwardProfile | None

    @property
    def forward(self) -> ForwardProfile:
        """What was asked for: at the schedule where there is one."""
        return self.dropping or self.everything

    def saving(self) -> Saving | None:
        """What the schedule leaves; None without one."""
        if self.dropping is None:
            return None
        seconds = Spread.of(self.dropping.seconds).median / Spread.of(self.everything.seconds).median
        return Saving(seconds, self.dropping.total().work.flops / self.everything.total().work.flops)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: seconds, bytes, FLOPs, and rates a second."""
        fields: dict[str, Any] = {
            **vars(self.setting),
            "config": self.setting.config.to_dict(),
            "seqlens": list(self.setting.seqlens),
            "ceilings": vars(self.ceilings),
            "nothing_dropped": _forward_fields(self.everything, self.ceilings),
            "dropped": None if self.dropping is None else _forward_fields(self.dropping, self.ceilings),
        }
        saving = self.saving()
        if saving is not None:
            fields["ratio"] = {**saving._asdict(), "efficiency": saving.efficiency}
        return fields


def _forward_fields(forward: ForwardProfile, ceilings: Ceilings) -> dict[str, Any]:
    layers = []
    for layer, one in forward.by_layer().items():
        entered, left = (None, None) if layer is None else forward.tokens[layer : layer + 2]
        layers.append({"layer": layer, "tokens_in": entered, "tokens_out": left, **_fields(one, ceilings)})
    return {
        "schedule": None if forward.schedule is None else forward.schedule.to_dict(),
        "repeats": len(forward.seconds),
        "seconds": Spread.of(forward.seconds)._asdict(),
        "watched_seconds": Spread.of(forward.watched_seconds)._asdict(),
        "peak_bytes": forward.peak_bytes,
        "total": _fields(forward.total(), ceilings),
        "steps": [{"step": name, **_fields(one, ceilings)} for name, one in forward.by_step().items()],
        "layers": layers,
        "layer_steps": [
            {"layer": layer, "step": name, **_fields(one, ceilings)} for (layer, name), one in forward.steps.items()
        ],
    }


def _fields(one: Calls, ceilings: Ceilings) -> dict[str, Any]:
    work, seconds = one.work, one.spread
    return {
        "calls": one.calls,
        "seconds": seconds._asdict(),
        "flops": work.flops,
        "bytes": work.bytes,
        "flops_per_second": _rate(work.flops, seconds),
        "bytes_per_second": _rate(work.bytes, seconds),
        "bound": one.bound(ceilings),
        "reached": one.reached(ceilings),
    }


def _rate(amount: int, seconds: Spread) -> float | None:
    return amount / seconds.median if seconds.median else None
