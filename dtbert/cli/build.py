"""`dtbert build`: the CPU's steps compiled for this machine, and used where they are faster."""

import argparse
import time

SUMMARY = "compile the CPU's steps for this machine"
DESCRIPTION = """\
Compile the network's steps for this processor and this torch, once: about a
minute, with g++ or clang++. Then time the model inside the package with them
and with torch's own, and use them from then on for each number format in which
they are faster here. Without a compiler dtbert runs on torch's own.
"""
EXAMPLES = """\
example:
  dtbert build
"""

# Texts of the passes that are timed, and rounds of them.
_LENGTHS, _ROUNDS = (177,) * 4, 9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """There are none."""


def run(arguments: argparse.Namespace) -> int:
    from dtbert.kernels import native

    began = time.monotonic()
    try:
        target = native.build()
    except native.BuildError as error:
        raise ValueError(f"{error}; dtbert runs without, on torch's own steps") from error
    print(f"built in {time.monotonic() - began:.0f} s: {target}")
    ratios = _measure()
    if not ratios:
        raise ValueError(f"what was built does not give the right numbers on this processor: remove {target}")
    native.record(ratios)
    for dtype, ratio in ratios.items():
        # Torch has no steps of its own for int8.
        other, stays = "the best in float32", "float32 stays"
        if dtype != "torch.int8":
            other, stays = "torch's own steps", "torch's own stay"
        chosen = "used from now on" if ratio < 1 else stays
        print(f"{dtype.removeprefix('torch.')}: {ratio:.2f} of the time of {other}: {chosen}")
    return 0


def _measure() -> dict[str, float]:
    """By dtype, the best time of a pass by the compiled steps over the best by torch's own, in turns.

    Torch has no steps of its own for int8: there it is over the best in float32.
    """
    import torch

    from dtbert.kernels import native
    from dtbert.model import PackedBatch
    from dtbert.weights import load_model

    ids = torch.randint(1000, 20000, (sum(_LENGTHS),), generator=torch.Generator().manual_seed(0)).split(_LENGTHS)
    batch = PackedBatch.from_lists([one.tolist() for one in ids], [[1] * length for length in _LENGTHS])
    ratios: dict[str, float] = {}
    for dtype in (torch.float32, torch.bfloat16, torch.int8):
        if not native.available(dtype):
            continue
        other = torch.float32 if dtype == torch.int8 else dtype
        models = [load_model(dtype=dtype, backend="native"), load_model(dtype=other, backend="cpu")]
        if dtype == torch.int8:
            models.append(load_model(dtype=other, backend="native"))
        times: list[list[float]] = [[] for _ in models]
        with torch.inference_mode():
            for _ in range(_ROUNDS + 2):
                for model, taken in zip(models, times, strict=True):
                    began = time.perf_counter()
                    model.forward_packed(batch)
                    taken.append(time.perf_counter() - began)
        own, *rest = (min(taken[2:]) for taken in times)
        ratios[str(dtype)] = round(own / min(rest), 3)
    return ratios
