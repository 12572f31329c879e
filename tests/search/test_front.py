"""Fronts, their intervals, and the order of questions."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.axes import Axes
from numpy.typing import NDArray

import dtbert
from dtbert.evaluation import GoldAnswer, SquadQuestion
from dtbert.model import LengthSchedule, Macs, Threshold
from dtbert.qa import Latency, read_schedules, write_schedules
from dtbert.search import (
    Effort,
    Record,
    Search,
    bootstrap_intervals,
    front_of,
    in_search_order,
    pareto,
    plot,
    records_of,
)
from dtbert.search.front import distinct
from tests.search.toys import MIXED, STARTS, Toy, toy_search


def question(identifier: str, title: str = "") -> SquadQuestion:
    return SquadQuestion(identifier, title, "who?", "Ada", (GoldAnswer("Ada", 0),))


QUESTIONS = [question(f"q{number}") for number in range(600)]


def record(cost: float, f1: NDArray[np.float64] | None = None) -> Record:
    return Record(0, STARTS[0], Macs(1, 1), cost, cost, np.zeros(1) if f1 is None else f1, 0, None, "")


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_pareto_is_what_nothing_else_beats(points: list[tuple[int, int]]) -> None:
    chosen = [points[index] for index in pareto([record(cost) for cost, _ in points], [f1 for _, f1 in points])]
    expected = {
        (cost, f1) for cost, f1 in points if not any(c <= cost and f >= f1 and (c, f) != (cost, f1) for c, f in points)
    }
    assert chosen == sorted(expected)


def test_bootstrap_interval_is_that_of_the_normal_approximation() -> None:
    f1 = np.random.default_rng(0).uniform(size=2000)
    half = 100 * 1.96 * f1.std() / 2000**0.5
    ((low, high),) = bootstrap_intervals([f1])
    assert 100 * f1.mean() - low == pytest.approx(half, rel=0.12)
    assert high - 100 * f1.mean() == pytest.approx(half, rel=0.12)
    assert bootstrap_intervals([f1]) == [(low, high)]
    assert bootstrap_intervals([f1], seed=1) != [(low, high)]
    assert bootstrap_intervals([np.ones(5), np.zeros(5)]) == [(100, 100), (0, 0)]


def test_clearly_worse_at_nearly_the_cost_is_left_out() -> None:
    random = np.random.default_rng(0)
    good = (random.random(300) < 0.82).astype(float)
    bad, hardly_worse = good * (random.random(300) < 0.5), good.copy()
    hardly_worse[good.argmax()] = 0
    cheap = record(0.3, bad * 0)
    for cost, f1, stays in (
        (0.5096, bad, False),
        (0.5096, hardly_worse, True),
        (0.5097 / 1.0049, bad, False),
        (0.5097 / 1.0051, bad, True),
    ):
        near = record(cost, f1)
        last = record(0.5097, good)
        assert [one.cost for one in distinct([cheap, near, last])] == [0.3, *[cost] * stays, 0.5097]
    # Each is clearly worse than the next, and nearly as dear; those that go make room for nobody.
    chain = [record(0.5 * 1.003**step, (random.random(2000) < 0.1 + 0.2 * step).astype(float)) for step in range(5)]
    assert distinct(chain) == chain[::2]


def test_tight_budget_gets_the_good_one_of_two_that_cost_the_same() -> None:
    search = toy_search()
    # The cost of a toy is the mean of its ratios, and `random` is worse by 10 points.
    near = LengthSchedule.ratios([0.85, 0.7694], scorer="random"), LengthSchedule.ratios([0.85, 0.7696], scorer="cls")
    search.add_starts(near, "start")
    search.run(2)
    front = front_of(search, QUESTIONS, "toy.json", "abc")
    assert [entry.schedule for entry in front.schedules] == [near[1]]
    assert front.within(0.8098).schedule == near[1]
    assert front.settings == {"toy": 1}


def test_front_holds_only_what_answered_all_questions(tmp_path: Path) -> None:
    search = toy_search(toy=Toy(noise=0.1), sampler="nsga2", effort=Effort((50, 200)))
    with pytest.raises(ValueError, match="no trial"):
        front_of(search, QUESTIONS, "toy.json", "abc")
    search.add_starts(STARTS, "start")
    search.run(40)
    front = front_of(search, QUESTIONS, "toy.json", "abc")
    attributes = [trial.user_attrs for trial in search.study.trials]
    complete = {each["macs_fraction"] for each in attributes if len(each.get("f1", ())) == 600}
    assert 3 <= len(front.schedules) < len(complete) < 40
    for entry in front.schedules:
        assert entry.macs_fraction in {round(fraction, 6) for fraction in complete}
        assert entry.f1_interval[0] < entry.f1 < entry.f1_interval[1]
        assert entry.f1 == entry.exact_match  # as the toy has it
        assert entry.schedule is not None
        assert entry.macs == Toy().macs(entry.schedule)
    f1 = [entry.f1 for entry in front.schedules]
    assert f1 == sorted(f1)
    assert front.full_model.f1 == pytest.approx(90, abs=0.2)
    ids = "\n".join(sorted(question.id for question in QUESTIONS))
    assert front.question_ids_sha256 == hashlib.sha256(ids.encode()).hexdigest()
    assert (front.questions_file, front.num_questions, front.model_sha256) == ("toy.json", 600, "abc")
    assert front.dtbert_version == dtbert.__version__
    path = tmp_path / "schedules.json"
    write_schedules(path, front)
    assert read_schedules(path) == front
    assert front_of(search, QUESTIONS, "toy.json", "abc").to_json() == path.read_text()


def test_front_of_macs_is_timed_once_a_device() -> None:
    timed: list[LengthSchedule] = []

    class Timed(Toy):
        def latencies(self, schedules: Sequence[LengthSchedule]) -> list[Latency]:
            timed.extend(schedules)
            return super().latencies(schedules)

    search = toy_search(toy=Timed())
    search.add_starts(STARTS, "start")
    search.run(6)
    assert timed == []
    front = front_of(search, QUESTIONS, "toy.json", "abc")
    assert timed == [entry.schedule for entry in front.schedules]
    assert [entry.latency for entry in front.schedules] == Toy().latencies(timed)
    assert front_of(search, QUESTIONS, "toy.json", "abc") == front
    assert len(timed) == len(front.schedules)
    search.evaluator = other = Timed(name="another toy")
    again = front_of(search, QUESTIONS, "toy.json", "abc")
    assert [entry.latency for entry in again.schedules] == other.latencies(timed[: len(front.schedules)])


def test_front_of_times_is_in_the_order_of_macs() -> None:
    class Backwards(Toy):
        """What has fewer MACs takes longer, and is more right."""

        def latencies(self, schedules: Sequence[LengthSchedule]) -> list[Latency]:
            return [Latency(1 / self.macs(one).executed, 1e-6, "toy", "float32", 1) for one in schedules]

        def quality(self, schedule: LengthSchedule | None) -> float:
            return 1 - super().quality(schedule)

    search = toy_search(toy=Backwards(), objective="latency")
    search.add_starts(STARTS, "start")
    search.run(6)
    front = front_of(search, QUESTIONS, "toy.json", "abc")
    fractions = [entry.macs_fraction for entry in front.schedules]
    assert len(fractions) > 1
    assert fractions == sorted(fractions)
    f1 = [entry.f1 for entry in front.schedules]
    assert f1 == sorted(f1, reverse=True)


def test_front_keeps_the_best_lengths_beside_what_beats_them() -> None:
    shares = [Threshold((share, share), scorer="cls") for share in (0.021, 0.011, 0.004)]
    mixed, alone = toy_search(space=MIXED), toy_search()
    mixed.add_starts([*STARTS, *shares], "start")
    mixed.run(9)
    alone.add_starts(STARTS, "start")
    alone.run(6)
    front, of_lengths = (front_of(search, QUESTIONS, "toy.json", "abc") for search in (mixed, alone))
    assert front.choices(static=True) == of_lengths.schedules != ()
    assert [entry.schedule for entry in front.choices()] == shares
    assert [entry.macs_fraction for entry in front.schedules] == sorted(
        entry.macs_fraction for entry in (*front.choices(), *of_lengths.schedules)
    )


def test_baseline_of_the_plot_drops_by_what_the_front_drops_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = toy_search()
    search.space = replace(search.space, scorers=search.space.scorers[::-1])  # `random` first, which loses
    search.add_starts(STARTS, "constant ratio")
    search.run(6)
    labels = legend_of(search, tmp_path / "front.png", monkeypatch)
    assert "constant ratio, cls" in labels
    assert "ended early (estimate)" not in labels


def legend_of(search: Search, path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the legend of a search's picture names."""
    labels: list[str] = []
    monkeypatch.setattr(Axes, "legend", lambda axes, **_: labels.extend(axes.get_legend_handles_labels()[1]))
    plot.plot_front(search, front_of(search, QUESTIONS, "toy.json", "abc"), path)
    return labels


def test_legend_names_what_can_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = toy_search(toy=Toy(noise=0.1), effort=Effort((50, 200)))
    search.add_starts([one for one in STARTS if one.scorer == "cls"], "constant ratio")
    search.run(3)
    assert {"cls", "constant ratio, cls"} < set(labels := legend_of(search, tmp_path / "front.svg", monkeypatch))
    assert not {"random", "ended early (estimate)"} & set(labels)
    # What ends early is named by the open marks that are all there is of it.
    search.add_starts([one for one in STARTS if one.scorer == "random"], "constant ratio")
    search.run(6)
    assert all(len(one.f1) < 600 for one in records_of(search.study) if one.schedule.scorer == "random")
    assert {"random", "ended early (estimate)"} < set(legend_of(search, tmp_path / "front.svg", monkeypatch))


def test_plot_tells_kinds_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = toy_search(space=MIXED)
    for part in MIXED.parts:
        search.add_starts(part.constants(), part.constant)
    search.add_starts([Threshold((0.0145, 0.0145), scorer="cls")], "start")
    search.run(13)
    assert {
        *("lengths, cls", "threshold, cls", "lengths, random", "front", "front of lengths alone"),
        *("constant ratio, cls", "constant threshold, cls"),
    } <= set(legend_of(search, tmp_path / "front.png", monkeypatch))


def test_beginnings_of_the_search_order_are_spread_over_articles() -> None:
    sizes = {"long": 300, "middle": 90, "short": 30}
    questions = [question(f"{title}-{number}", title) for title, size in sizes.items() for number in range(size)]
    ordered = in_search_order(questions)
    assert sorted(map(str, ordered)) == sorted(map(str, questions))
    for count in (14, 42, 100, 250):
        found = Counter(question.title for question in ordered[:count])
        assert all(abs(found[title] - count * size / 420) <= 2 for title, size in sizes.items())
    assert in_search_order(questions[::-1]) == ordered
    first = [question.id for question in ordered if question.title == "long"][:20]
    assert first != [f"long-{number}" for number in range(20)]


def test_plot_is_a_picture_of_the_search(tmp_path: Path) -> None:
    search = toy_search(toy=Toy(noise=0.1), sampler="nsga2", effort=Effort((50, 200)))
    search.add_starts(STARTS, "constant ratio")
    search.run(12)
    front = front_of(search, QUESTIONS, "toy.json", "abc")
    for name, published in (("plain.png", []), ("published.png", [plot.PublishedPoint(0.7, 85.0)])):
        plot.plot_front(search, front, tmp_path / name, published)
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert (tmp_path / "plain.png").read_bytes() != (tmp_path / "published.png").read_bytes()


def test_published_points_are_read_where_the_sizes_agree(tmp_path: Path) -> None:
    config = dtbert.BertConfig(hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32)
    schedule = LengthSchedule.absolute([200, 40])
    path, own = tmp_path / "published.tsv", schedule.macs(config, 384).published
    path.write_text(f"length_config\tmacs\tf1\n200,40\t{own}\t87.5\n")

    class Costs(Toy):
        def macs(self, schedule: LengthSchedule | None) -> Macs:
            return (schedule or LengthSchedule.ratios([1, 1])).macs(config, 150)

    (point,) = plot.read_published(str(path), config, Costs())
    full = LengthSchedule.ratios([1, 1]).macs(config, 150).executed
    assert point == (schedule.macs(config, 150).executed / full, 87.5)
    path.write_text("length_config\tmacs\tf1\n200,40\t1000\t87.5\n")
    with pytest.raises(ValueError, match=rf"published\.tsv, line 2: 1000 MACs, .* has {own}"):
        plot.read_published(str(path), config, Costs())
    path.write_text("lengths\tf1\n")
    with pytest.raises(ValueError, match=r"published\.tsv: .*columns length_config, macs and f1 .*lengths"):
        plot.read_published(str(path), config, Costs())
