"""A profile as text for a terminal, at most 100 characters wide."""

from dtbert.profiling.forward import Calls, Spread
from dtbert.profiling.report import Profile

_LEFT_ALIGNED = {"bound"}


def table(profile: Profile) -> str:
    """What was measured on what, the whole forward, then each step and each layer."""
    parts = [_head(profile), _whole(profile), _steps(profile), _layers(profile)]
    return "\n\n".join("\n".join(lines) for lines in parts)


def _head(profile: Profile) -> list[str]:
    setting, ceilings = profile.setting, profile.ceilings
    config = setting.config
    return [
        f"model     {setting.model}, {config.num_hidden_layers} x {config.hidden_size}, "
        f"{config.num_attention_heads} heads, weights {setting.weight_bytes / 1e6:,.0f} MB",
        f"batch     {setting.batch}, {setting.dtype}",
        f"device    {setting.place}, kernels: {setting.backend}",
        f"ceilings  {format_rate(ceilings.flops_per_second)} (large product), "
        f"{ceilings.bytes_per_second / 1e9:,.1f} GB/s (large copy)",
        f"bound     memory below {ceilings.ridge:.1f} FLOP/byte, compute above",
    ]


def _whole(profile: Profile) -> list[str]:
    rows = [["whole forward", "ms", "p10-p90", "timed steps ms", "GFLOP", "peak MB"]]
    variants = [("nothing dropped", profile.everything)]
    if profile.dropping is not None:
        variants.append(("with schedule", profile.dropping))
    for name, forward in variants:
        seconds, flops = Spread.of(forward.seconds), forward.total().work.flops
        memory = f"{forward.peak_bytes / 1e6:,.1f}"
        watched = Spread.of(forward.watched_seconds).median
        rows.append([name, _ms(seconds.median), _range(seconds), _ms(watched), _amount(flops / 1e9), memory])
    lines = _columns(rows, "  ")
    saving = profile.saving()
    if saving is not None:
        line = f"the schedule leaves {saving.seconds:.2f} of the time and {saving.flops:.2f} of the FLOPs"
        if saving.efficiency is not None:
            line += f": {saving.efficiency:.2f} of that saving is saved time"
        lines.append(line)
    return lines


def _steps(profile: Profile) -> list[str]:
    forward, total = profile.forward, profile.forward.total()
    by_step: dict[str, Calls] = {name.replace("_", " "): one for name, one in forward.by_step().items()}
    beside = {name.replace("_", " "): one for name, one in profile.everything.by_step().items()}
    by_step["total"], beside["total"] = total, profile.everything.total()
    rows = [["step", "calls", *_measure_head(profile), "bound", "of it"]]
    for name, one in by_step.items():
        bound = one.bound(profile.ceilings) if name != "total" else None
        reached = _percent(one.reached(profile.ceilings))
        rows.append([name, str(one.calls or ""), *_measure(one, total, profile), bound or "", reached])
    if profile.dropping is not None:
        rows[0].append("all ms")
        for row in rows[1:]:
            row.append(_ms(beside[row[0]].spread.median) if row[0] in beside else "")
    return _columns(rows, " ")


def _layers(profile: Profile) -> list[str]:
    forward, total = profile.forward, profile.forward.total()
    beside = profile.everything.by_layer()
    rows = [["layer", "tokens in", "out", *_measure_head(profile), "of bound"]]
    for layer, one in forward.by_layer().items():
        tokens = ["", ""] if layer is None else [f"{count:,}" for count in forward.tokens[layer : layer + 2]]
        name = "outside" if layer is None else str(layer)
        rows.append([name, *tokens, *_measure(one, total, profile), _percent(one.reached(profile.ceilings))])
        if profile.dropping is not None:
            rows[-1] += [_ms(beside[layer].spread.median), f"{one.spread.median / beside[layer].spread.median:.2f}"]
    if profile.dropping is not None:
        rows[0] += ["all ms", "ratio"]
    return _columns(rows, " ")


def _measure_head(profile: Profile) -> list[str]:
    return ["ms", "p10-p90", "share", "GFLOP", "MB", _unit(profile.ceilings.flops_per_second)[1], "GB/s"]


def _measure(one: Calls, total: Calls, profile: Profile) -> list[str]:
    seconds, work = one.spread, one.work
    cells = [_ms(seconds.median), _range(seconds), _percent(seconds.median / total.spread.median)]
    if not one.works:
        return [*cells, "", "", "", ""]
    scale, _ = _unit(profile.ceilings.flops_per_second)
    rates = [work.flops / seconds.median / scale, work.bytes / seconds.median / 1e9]
    return cells + [_amount(value) for value in (work.flops / 1e9, work.bytes / 1e6, *rates)]


def _columns(rows: list[list[str]], gap: str) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = [index == 0 or name in _LEFT_ALIGNED for index, name in enumerate(rows[0])]
    return [
        gap.join(
            cell.ljust(width) if to_left else cell.rjust(width)
            for cell, width, to_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    digits = 3 - sum(milliseconds >= least for least in (1, 10, 100))
    return f"{milliseconds:.{digits}f}"


def _range(seconds: Spread) -> str:
    return f"{_ms(seconds.low)}-{_ms(seconds.high)}"


def _percent(part: float | None) -> str:
    return "" if part is None else f"{part:.0%}"


def _amount(value: float) -> str:
    if value == 0:
        return "-"
    return f"{value:.{0 if value >= 100 else 1 if value >= 1 else 3}f}"


def format_rate(flops_per_second: float) -> str:
    """A rate with its unit."""
    scale, unit = _unit(flops_per_second)
    return f"{flops_per_second / scale:,.1f} {unit}"


def _unit(flops_per_second: float) -> tuple[float, str]:
    return (1e12, "TFLOP/s") if flops_per_second >= 1e12 else (1e9, "GFLOP/s")
