"""What the device can do at the most, measured on the spot by a large product and a large copy."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from dtbert.kernels import Sizes, get_backend
from dtbert.kernels.parameters import Linear, of_tensors
from dtbert.model.work import Work
from dtbert.profiling.watch import Clock
from dtbert.weights.quantize import scaled

Bound = Literal["compute", "memory"]

_REPEATS = 5
PRODUCT_ROWS = {"cpu": 2048, "cuda": 8192}
COPY_BYTES = {"cpu": 2**28, "cuda": 2**29}  # far past every cache


@dataclass(frozen=True)
class Ceilings:
    """The best rates seen: FLOPs a second of a product in the model's dtype, bytes a second read and written."""

    flops_per_second: float
    bytes_per_second: float

    @property
    def ridge(self) -> float:
        """FLOPs a byte from which on the product's rate is the limit and no more the memory's."""
        return self.flops_per_second / self.bytes_per_second

    def seconds(self, work: Work) -> float:
        """The least time that the work takes."""
        return max(work.flops / self.flops_per_second, work.bytes / self.bytes_per_second)

    def bound(self, work: Work) -> Bound:
        return "compute" if work.intensity > self.ridge else "memory"


def measure_ceilings(device: torch.device, dtype: torch.dtype, product_dtype: torch.dtype | None = None) -> Ceilings:
    """The device's ceilings, each the best of 5; the product is the backend's.

    ``dtype`` is the states', and the weights' too where ``product_dtype``, as `Bert` has it, names no other.
    """
    product_dtype = product_dtype or dtype
    rows = PRODUCT_ROWS[device.type]
    generator = torch.Generator(device).manual_seed(0)
    x, weight = (torch.rand(rows, rows, device=device, generator=generator).to(dtype) for _ in range(2))
    backend = get_backend(device, None, Sizes(product_dtype))
    layer = of_tensors(Linear, weight=weight, bias=torch.zeros_like(x[0]))
    if product_dtype != dtype:
        layer.hold_scaled(*scaled(weight, product_dtype))
    backend.prepare(layer)
    with torch.inference_mode():
        seconds = _best(lambda: backend.linear(x, layer), device)
    source = torch.ones(COPY_BYTES[device.type] // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    copying = _best(lambda: target.copy_(source), device)
    return Ceilings(2 * rows**3 / seconds, 2 * source.nbytes / copying)


def _best(call: Callable[[], object], device: torch.device) -> float:
    clock = Clock(device)
    call()
    return min(clock.time(call) for _ in range(_REPEATS))
