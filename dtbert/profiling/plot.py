"""A profile as a picture: a roofline with each step as a point, and the time of each layer by step."""

import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.pictures import check_picture, picture
from dtbert.profiling.forward import ForwardProfile
from dtbert.profiling.report import Profile
from dtbert.profiling.table import format_rate
from dtbert.profiling.watch import STEP_NAMES, StepName

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind readers can tell apart, and greys for what is no product.
_COLORS: dict[StepName, str] = {
    "embeddings": "#444444",
    "qkv": "#0072B2",
    "attention": "#D55E00",
    "significance": "#F0E442",
    "selection": "#CC79A7",
    "attention_output": "#56B4E9",
    "intermediate": "#009E73",
    "output": "#E69F00",
    "restore": "#882255",
    "span_head": "#000000",
    "other": "#BBBBBB",
}
_FAINT = 0.45  # strength of the colours of what drops nothing, beside what drops
_STYLE = {"font.size": 9, "axes.titlesize": 9, "legend.fontsize": 8}
_MOST_LABELS = 12  # layers whose numbers fit below their bars


def check_plot(path: Path) -> None:
    """Raise ValueError unless a picture can be drawn and the file's ending names a format."""
    check_picture(path, "plot")


def save_plot(profile: Profile, path: Path) -> None:
    """Draw the profile and save it; the file's ending names the format."""
    with picture(path, 6.2, 7.4, 200, _STYLE) as figure:
        roofline, bars = figure.subplots(2, 1)
        figure.suptitle(_title(profile), fontsize=9)
        _draw_roofline(roofline, profile)
        _draw_bars(bars, profile)
        _draw_legend(figure, profile)


def _title(profile: Profile) -> str:
    setting = profile.setting
    size = f"{setting.config.num_hidden_layers} x {setting.config.hidden_size}"
    first = f"{setting.model} ({size}), {setting.batch}, {setting.dtype}"
    lines = (first, f"{setting.place}, kernels: {setting.backend}")
    return "\n".join(textwrap.fill(line, 76) for line in lines).replace(" x ", " \N{MULTIPLICATION SIGN} ")


def _variants(profile: Profile) -> list[tuple[str, ForwardProfile, float]]:
    """Name, forward and strength of colours of what is drawn, from back to front."""
    if profile.dropping is None:
        return [("nothing dropped", profile.everything, 1.0)]
    return [("nothing dropped", profile.everything, _FAINT), ("with schedule", profile.dropping, 1.0)]


def _points(forward: ForwardProfile) -> dict[StepName, tuple[float, float, float]]:
    """Of each step with a product: FLOPs a byte, FLOPs a second, and the radius of its mark in 1/72 inch."""
    total = forward.total().spread.median
    return {
        name: (
            one.work.intensity,
            one.work.flops / one.spread.median,
            math.sqrt(8 + 140 * one.spread.median / total),
        )
        for name, one in forward.by_step().items()
        if one.work.flops
    }


def _draw_roofline(axes: "Axes", profile: Profile) -> None:
    """Draw ceilings and points, whose colours the legend names; their figures stand above, out of the way."""
    for _, forward, strength in _variants(profile):
        # Small marks last, so that large ones do not hide them.
        for name, (x, y, radius) in sorted(_points(forward).items(), key=lambda item: -item[1][2]):
            style: dict[str, Any] = {"color": _shade(name, strength), "markeredgecolor": "black"}
            axes.plot(x, y, "o", markersize=2 * radius, markeredgewidth=0.6, zorder=3, **style)
    places = [place for _, forward, _ in _variants(profile) for place in _points(forward).values()]
    ceilings = profile.ceilings
    peak, slope, ridge = ceilings.flops_per_second, ceilings.bytes_per_second, ceilings.ridge
    left, right = min(ridge / 3, *(x / 2 for x, _, _ in places)), max(ridge * 3, *(x * 3 for x, _, _ in places))
    lowest, highest = min(left * slope, *(y for _, y, _ in places)), max(peak, *(y for _, y, _ in places))
    bottom, top = 10 ** math.floor(math.log10(lowest)), 10 ** math.ceil(math.log10(1.5 * highest))
    axes.plot([left, ridge, right], [left * slope, peak, peak], color="black", linewidth=1.4, zorder=2)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")
    axes.set_ylabel("achieved rate (FLOP/s)")
    axes.set_title(
        "Roofline of the steps with a product (area: share of the time)\n"
        f"ceilings: a large product, {format_rate(peak)}; a large copy, {slope / 1e9:,.1f} GB/s"
    )
    axes.grid(which="major", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_bars(axes: "Axes", profile: Profile) -> None:
    variants = _variants(profile)
    num_layers = len(profile.forward.tokens) - 1
    width = 0.8 / len(variants)
    for number, (_, forward, strength) in enumerate(variants):
        offset = (number - (len(variants) - 1) / 2) * width
        for place, layer in enumerate([*range(num_layers), None]):
            height = 0.0
            for name in (name for name in STEP_NAMES if (layer, name) in forward.steps):
                milliseconds = forward.steps[layer, name].spread.median * 1e3
                axes.bar(place + offset, milliseconds, width * 0.94, height, color=_shade(name, strength))
                height += milliseconds
    tokens, named = profile.forward.tokens[1:], range(0, num_layers, math.ceil(num_layers / _MOST_LABELS))
    axes.set_xticks([*named, num_layers], [*(f"{layer}\n{_short(tokens[layer])}" for layer in named), "outside"])
    axes.tick_params(axis="x", length=0)
    axes.set_xlabel("layer, and the tokens of the batch that leave it")
    axes.set_ylabel("time (ms)")
    axes.set_title("Time of each layer by step (medians)")
    axes.grid(axis="y", color="#DDDDDD", linewidth=0.6)
    axes.set_axisbelow(True)


def _draw_legend(figure: "Figure", profile: Profile) -> None:
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    variants = _variants(profile)
    names = [name for name in STEP_NAMES if any(name in forward.by_step() for _, forward, _ in variants)]
    handles: list[Any] = [Patch(color=_COLORS[name]) for name in names]
    labels = [_words(name) for name in names]
    if len(variants) > 1:
        shown: tuple[StepName, ...] = ("qkv", "attention", "output")
        handles += [tuple(Patch(color=_shade(name, strength)) for name in shown) for _, _, strength in variants]
        labels += [name for name, _, _ in variants]
    figure.legend(
        handles,
        labels,
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )


def _short(count: int) -> str:
    return f"{count:,}" if count < 10_000 else f"{count / 1000:,.0f}k"


def _words(name: StepName) -> str:
    return name.replace("_", " ")


def _shade(name: StepName, strength: float) -> str:
    """A step's colour, mixed with white."""
    channels = (int(_COLORS[name][start : start + 2], 16) for start in (1, 3, 5))
    return "#" + "".join(f"{round(255 - strength * (255 - channel)):02X}" for channel in channels)
