"""The whole model with nothing dropped: a large batch, one sequence, and with and without CUDA graphs."""

import functools
from collections.abc import Sequence

from bench.windows import Batch, random_windows

from gpu_bench.attention import OWN
from gpu_bench.models import (
    FLOAT8,
    FLOAT8_TOLERANCE,
    GRAPHS,
    TOLERANCE,
    Models,
    own_contenders,
    packed,
    padded,
    peer_contenders,
)
from gpu_bench.setting import Row, Rows
from gpu_bench.timing import Contender, Launch, compare


def nothing_dropped(models: Models) -> Rows:
    sequences, tokens = models.setting.sizes.equal
    row = versus_peers(models, [tokens] * sequences, "called", (OWN, GRAPHS))
    yield {"section": "model", "work": f"{sequences}x{tokens}", **row}


def alone(models: Models) -> Rows:
    tokens = models.setting.sizes.alone
    row = versus_peers(models, [tokens], "awaited", (OWN, GRAPHS))
    yield {"section": "latency", "work": f"1x{tokens}", **row}


def versus_peers(models: Models, lengths: Sequence[int], launch: Launch, names: Sequence[str]) -> Row:
    """dtbert's models of these names and its peers on equal lengths."""
    batch = Batch.of(random_windows(lengths), models.setting.device)
    expected = padded(models.reference(batch))
    interface = functools.partial(models.own, batch.ids, None, batch.segments)
    contenders = [Contender(f"{OWN}, padded interface", lambda _: interface(), padded, expected)]
    absent = []
    for name, contender in zip(names, own_contenders(models, batch, expected, names), strict=True):
        if isinstance(contender, str):
            absent.append({"provider": name, "reason": contender})
        else:
            contenders.append(contender)
    contenders += peer_contenders(models.peers, batch, expected)
    row = compare(contenders, models.setting.device, models.setting.effort, launch=launch, tolerance=TOLERANCE)
    row["not_timed"] += absent
    return {"flops": 2 * sum(map(models.executed, lengths)), **row}


def graphs(models: Models) -> Rows:
    """Each batch as one call after another, and waited for."""
    setting = models.setting
    for sequences, tokens in setting.sizes.small_batches:
        batch = Batch.of(random_windows([tokens] * sequences), setting.device)
        expected = packed(models.own.forward_packed(batch.packed))
        found = list(own_contenders(models, batch, expected, (OWN, GRAPHS)))
        contenders = [contender for contender in found if not isinstance(contender, str)]
        for launch in ("called", "awaited"):
            row = compare(contenders, setting.device, setting.effort, launch=launch, tolerance=TOLERANCE)
            row["not_timed"] += [{"provider": GRAPHS, "reason": entry} for entry in found if isinstance(entry, str)]
            yield {"section": "graphs", "work": f"{sequences}x{tokens}, {launch}", **row}


def float8(models: Models) -> Rows:
    """Layers that multiply in fp8 beside those in bfloat16, with CUDA graphs where there are such."""
    setting = models.setting
    sequences, tokens = setting.sizes.equal
    batch = Batch.of(random_windows([tokens] * sequences), setting.device)
    expected = padded(models.reference(batch))
    names = (GRAPHS if setting.device.type == "cuda" else OWN, FLOAT8)
    contenders, absent = [], []
    for name, contender in zip(names, own_contenders(models, batch, expected, names), strict=True):
        if isinstance(contender, str):
            absent.append({"provider": name, "reason": contender})
        else:
            contenders.append(contender)
    row = compare(contenders, setting.device, setting.effort, launch="called", tolerance=FLOAT8_TOLERANCE)
    row["not_timed"] += absent
    yield {"section": "float8", "work": f"{sequences}x{tokens}", **row}
