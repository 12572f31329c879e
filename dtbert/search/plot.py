"""The picture of a search: all trials, the baseline, and the front with its intervals."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dtbert.files import naming
from dtbert.model import Policy
from dtbert.model.store import read_store
from dtbert.pictures import picture
from dtbert.search.evaluation import Evaluator
from dtbert.search.records import Record, records_of
from dtbert.search.space import Space

if TYPE_CHECKING:
    from dtbert.model import BertConfig
    from dtbert.qa import MeasuredSchedule, ScheduleFront
    from dtbert.search.study import Search

_NOMINAL_LENGTH = 384
_STYLE = {"font.size": 9, "axes.grid": True, "grid.color": "0.92", "axes.axisbelow": True}
# Okabe and Ito's colours, which most eyes tell apart; black is the front's.
_COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999933", "#882255")
# Trials far below the cheapest point of the front say little and would flatten the rest.
_MARGIN_BELOW = 6.0


class PublishedPoint(NamedTuple):
    """A published schedule: its executed MACs as part of the full model's on the questions at hand, and its F1."""

    macs_fraction: float
    f1: float


class _Group(NamedTuple):
    """The policies that are drawn in one colour."""

    part: Space
    scorer: str
    color: str
    label: str

    def holds(self, policy: Policy | None) -> bool:
        return isinstance(policy, self.part.made) and policy.scorer == self.scorer


def plot_front(search: "Search", front: "ScheduleFront", path: Path, published: Sequence[PublishedPoint] = ()) -> None:
    """Draw a search, in the format that the ending names: F1 against executed MACs as part of the full model's.

    Args:
        search: its trials are drawn, those that ended early with their estimated F1.
        front: of `front_of`.
        published: of `read_published`.
    """
    with picture(path, 7.2, 4.6, 160, _STYLE) as figure:
        axes = figure.subplots()
        _set_limits(axes, front)
        _draw_trials(axes, search)
        _draw_baseline(axes, search, front)
        if published:
            label = "published, on SQuAD's development set"
            axes.plot(*zip(*published, strict=True), "x", color="#D55E00", markersize=6, label=label, zorder=7)
        _draw_front(axes, front, search)
        axes.set_xlabel(f"executed MACs, part of the full model's at each {search.evaluator.piece}'s own length")
        axes.set_ylabel(f"{search.evaluator.measure} on {front.num_questions:,} {search.evaluator.unit}")
        axes.legend(loc="lower right", fontsize=8, frameon=True, framealpha=0.9, edgecolor="none")


def read_published(path: str, config: "BertConfig", evaluator: Evaluator) -> list[PublishedPoint]:
    """Published schedules of a model of the same sizes, each at what its lengths cost on the questions at hand.

    Args:
        path: a table as `read_store` reads it; lengths and MACs for 384 tokens.
        config: of the model at hand.
        evaluator: counts the MACs.

    Raises:
        OSError: the file cannot be read.
        ValueError: not such a table, or its MACs are not those of a model of these sizes.
    """
    with naming(path):
        rows = read_store(Path(path).read_text("utf-8"))
    full = evaluator.macs(None).executed
    points = []
    for line, schedule, macs, f1 in rows:
        with naming(f"{path}, line {line}"):
            own = schedule.macs(config, _NOMINAL_LENGTH).published
            if own != macs:
                raise ValueError(f"{macs} MACs, a model of these sizes has {own}: the points do not compare")
            by_received = replace(schedule, scorer="received")  # as all of the literature
            points.append(PublishedPoint(evaluator.macs(by_received).executed / full, f1))
    return points


def _groups(search: "Search") -> list[_Group]:
    parts = search.space.parts
    found = zip(product(parts, search.space.scorers), _COLORS * 9, strict=False)
    return [
        _Group(part, scorer, color, f"{part.name}, {scorer}" if len(parts) > 1 else scorer)
        for (part, scorer), color in found
    ]


def _draw_trials(axes: Any, search: "Search") -> None:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    everything, any_ended_early = search.evaluator.num_questions, False
    for group in _groups(search):
        named = {"label": group.label}  # once, by what there is of it
        for whole in (True, False):
            points = [
                (x, y)
                for record, x, y in _places(search)
                if group.holds(record.schedule) and (len(record.f1) == everything) == whole
                if left <= x <= right and bottom <= y <= top
            ]
            if points:
                style: dict[str, Any] = {"s": 14, "color": group.color, "linewidths": 0.7, "alpha": 0.75, "zorder": 3}
                style |= named if whole else {**named, "facecolors": "none"}
                axes.scatter(*zip(*points, strict=True), **style)
                named, any_ended_early = {}, any_ended_early or not whole
    if any_ended_early:
        axes.scatter([], [], s=14, facecolors="none", edgecolors="0.4", linewidths=0.7, label="ended early (estimate)")


def _draw_baseline(axes: Any, search: "Search", front: "ScheduleFront") -> None:
    """What does the same in every layer, by what most of the front drops by."""

    def drops_by(schedule: Policy) -> tuple[str, bool]:
        return str(schedule.scorer), any(schedule.keeps_question)

    ((most, _),) = Counter(drops_by(entry.schedule) for entry in front.schedules if entry.schedule).most_common(1)
    for marker, part in zip("s^v", search.space.parts, strict=False):
        points = sorted(
            (x, y)
            for record, x, y in _places(search)
            if record.origin == part.constant and drops_by(record.schedule) == most
        )
        if any(y >= axes.get_ylim()[0] for _, y in points):
            label = f"{part.constant}, {most[0]}{' +question' * most[1]}"
            style = {"color": "0.45", "markersize": 4, "linewidth": 1}
            axes.plot(*zip(*points, strict=True), f"{marker}--", **style, label=label, zorder=4)


def _draw_front(axes: Any, front: "ScheduleFront", search: "Search") -> None:
    def places(entries: "Sequence[MeasuredSchedule]") -> tuple[list[float], list[float]]:
        return [entry.macs_fraction for entry in entries], [entry.f1 for entry in entries]

    choices, static = front.choices(), front.choices(static=True)
    low, high = zip(*(entry.f1_interval for entry in choices), strict=True)
    shade: dict[str, Any] = {"color": "black", "alpha": 0.09, "linewidth": 0, "label": "95% interval", "zorder": 1}
    axes.fill_between(places(choices)[0], low, high, **shade)
    axes.plot(*places(choices), "-", color="black", linewidth=1.3, label="front", zorder=5)
    if not set(static) <= set(choices):
        axes.plot(*places(static), ":", color="black", linewidth=1.3, label="front of lengths alone", zorder=5)
    groups = _groups(search)
    filled = [next((one.color for one in groups if one.holds(entry.schedule)), "0.5") for entry in front.schedules]
    axes.scatter(*places(front.schedules), s=26, color=filled, edgecolors="black", linewidths=0.9, zorder=6)
    full, (low_full, high_full) = front.full_model, front.full_model.f1_interval
    error = [[full.f1 - low_full], [high_full - full.f1]]
    axes.errorbar(1, full.f1, error, fmt="D", color="black", markersize=5, capsize=3, label="full model", zorder=6)


def _set_limits(axes: Any, front: "ScheduleFront") -> None:
    entries: list[MeasuredSchedule] = [*front.schedules, front.full_model]
    lowest = min(entry.f1_interval[0] for entry in entries) - _MARGIN_BELOW
    highest = max(entry.f1_interval[1] for entry in entries)
    axes.set_ylim(max(0, lowest), min(100, highest + 0.06 * (highest - lowest)))
    axes.set_xlim(max(0, min(entry.macs_fraction for entry in entries) - 0.03), 1.03)


def _places(search: "Search") -> list[tuple[Record, float, float]]:
    """The trials, each with its cost and its F1, estimated where it ended early."""
    full = search.full_model.f1
    return [(record, record.macs_fraction, record.estimated_f1(full)) for record in records_of(search.study)]
