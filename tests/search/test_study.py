"""The search over a toy whose front is known: what it finds, what it saves, and how it goes on."""

import re
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.exceptions import StorageInternalError
from optuna.samplers import NSGAIISampler, TPESampler

from dtbert.evaluation import Score
from dtbert.model import LengthSchedule, Macs, Threshold
from dtbert.search import Effort, Record, is_beaten, open_study, pareto, records_of, sqlite_url, study
from dtbert.search.front import full_records
from dtbert.search.records import margin_of_many
from dtbert.search.storage import SamplerName, naming_storage
from tests.search.toys import MIXED, STARTS, Toy, best_f1, sqlite, toy_search


@pytest.mark.parametrize("sampler", ["tpe", "nsga2"])
def test_search_finds_the_known_front(sampler: SamplerName) -> None:
    search = toy_search(sampler=sampler)
    assert type(search.study.sampler) is (TPESampler if sampler == "tpe" else NSGAIISampler)
    search.add_starts(STARTS, "start")
    search.run(90)
    records = full_records(search)
    f1 = [100 * record.f1.mean() for record in records]
    front = [(records[index].cost, f1[index]) for index in pareto(records, f1)]
    assert all(f1 <= best_f1(cost) + 0.2 for cost, f1 in front)  # nobody can beat it, but for rounding to questions
    for cost in (0.6, 0.7, 0.8, 0.9):
        found = max((f1 for own, f1 in front if own <= cost), default=0)
        assert found > best_f1(cost) - 3, f"at {cost}"


def test_rungs_save_questions_and_lose_nothing_of_the_front() -> None:
    toy = Toy(noise=0.03)
    search = toy_search(toy=toy, sampler="nsga2", effort=Effort((50, 100, 200), 2.0))
    search.add_starts(STARTS, "start")
    search.run(70)
    records = records_of(search.study)
    savings = search.savings()
    assert savings.answered == sum(len(record.f1) for record in records) < 0.8 * savings.without_rungs
    assert savings.without_rungs == 70 * toy.num_questions
    # What all of them would have scored with all questions.
    f1 = [np.mean([score.f1 for score in toy.scores(record.schedule, 0, toy.num_questions)]) for record in records]
    true_front = {records[index].number for index in pareto(records, [float(value) for value in f1])}
    assert true_front <= {record.number for record in full_records(search)}
    assert len(true_front) >= 5
    counts = search.counts()
    assert counts.all_questions + counts.ended_early == counts.finished == 70
    assert counts.ended_early > 10


def test_search_of_several_kinds_finds_the_front_of_each() -> None:
    search = toy_search(space=MIXED)
    for part in MIXED.parts:
        search.add_starts(part.constants(), part.constant)
    search.run(90)
    records = full_records(search)
    for kind, harm in ((LengthSchedule, 1.0), (Threshold, 0.5)):
        own = [(record.cost, 100 * record.f1.mean()) for record in records if isinstance(record.schedule, kind)]
        for cost in (0.7, 0.8, 0.9):
            best = 90 - harm * 100 * (1 - cost) ** 2
            assert max((f1 for paid, f1 in own if paid <= cost), default=0) > best - 4, f"{kind.__name__} at {cost}"


def test_a_schedule_of_lengths_is_ended_early_by_others_alone() -> None:
    search = toy_search(space=MIXED, effort=Effort((50, 200)))
    good, bad = Threshold((0.01, 0.01), scorer="cls"), Threshold((0.0095, 0.0095), scorer="random")
    lengths = LengthSchedule.ratios([0.81, 0.81], scorer="random")
    search.add_starts([good, bad, lengths], "start")
    search.run(3)
    assert {record.schedule: len(record.f1) < 600 for record in records_of(search.study)} == {
        good: False,
        bad: True,
        lengths: False,
    }


def test_cheapest_starts_are_tried_first() -> None:
    search = toy_search()
    search.add_starts(STARTS[::-1], "start")
    search.run(len(STARTS))
    ratios = [record.schedule.length_config[0] for record in records_of(search.study)]
    assert ratios == [0.7, 0.7, 0.85, 0.85, 0.95, 0.95]


def test_no_question_is_answered_twice_for_a_schedule() -> None:
    toy = Toy()
    search = toy_search(toy=toy, effort=Effort((50, 200)))
    search.add_starts(STARTS, "start")
    search.run(20)
    steps = {(0, 50), (50, 200), (200, 600)}
    assert toy.answered[0] == (None, 0, 600)
    assert {(begin, end) for _, begin, end in toy.answered[1:]} == steps
    assert len(set(toy.answered)) == len(toy.answered)


def test_beaten_needs_a_peer_that_costs_no_more_and_is_clearly_better() -> None:
    search = toy_search()
    search.add_starts([LengthSchedule.ratios([0.9, 0.9], scorer="cls")], "")
    search.run(1)
    (peer,) = records_of(search.study)
    same, worse = peer.f1[:100], peer.f1[:100].copy()
    worse[np.flatnonzero(worse)[:20]] = 0
    one_worse = peer.f1[:100].copy()
    one_worse[np.flatnonzero(one_worse)[:1]] = 0
    assert is_beaten(worse, peer.cost, [peer], 2.0)
    assert not is_beaten(worse, peer.cost - 1e-9, [peer], 2.0)
    assert not is_beaten(same, peer.cost, [peer], 2.0)
    assert not is_beaten(one_worse, peer.cost, [peer], 2.0)
    assert is_beaten(one_worse, peer.cost, [peer], 0.5)
    assert not is_beaten(worse, 1.0, [], 2.0)
    # Only those that it may be compared with make it harder: by 2.5 standard errors is beyond doubt of one peer.
    six_worse = peer.f1[:100].copy()
    six_worse[np.flatnonzero(six_worse)[:6]] = 0
    others = [replace(peer, cost=peer.cost + 0.1), replace(peer, f1=peer.f1[:50])] * 50
    assert is_beaten(six_worse, peer.cost, [peer, *others], 2.0)
    assert not is_beaten(six_worse, peer.cost, [peer, *[replace(peer, f1=six_worse)] * 100], 2.0)


@given(st.floats(0, 6), st.integers(1, 1000))
def test_best_of_many_takes_more_to_be_beyond_doubt(margin: float, count: int) -> None:
    upper_tail = NormalDist().cdf
    assert count * upper_tail(-margin_of_many(margin, count)) == pytest.approx(upper_tail(-margin), rel=1e-6)


def test_equal_peers_seldom_end_a_trial_however_many_they_are() -> None:
    random = np.random.default_rng(0)
    toy = LengthSchedule.ratios([0.9, 0.9], scorer="cls")
    ended = 0
    for _ in range(200):
        f1, *others = random.uniform(size=(41, 100))
        peers = [Record(0, toy, Macs(1, 1), 0.5, 0.5, other, 0, None, "") for other in others]
        ended += is_beaten(f1, 0.5, peers, 2.0)
    assert ended <= 12  # 2.3% of 200 are 4.6; without regard to their number they would be 80


def test_nothing_is_beyond_the_greatest_margin() -> None:
    assert margin_of_many(1000.0, 7) == 1000.0


def test_failing_trials_are_recorded_and_the_rest_goes_on() -> None:
    class Failing(Toy):
        def scores(self, schedule: LengthSchedule | None, begin: int, end: int) -> list[Score]:
            if schedule is not None and schedule.scorer == "random":
                raise RuntimeError("no luck today")
            return super().scores(schedule, begin, end)

    search = toy_search(toy=Failing())
    search.add_starts(STARTS, "start")
    search.run(12)
    counts = search.counts()
    assert counts.finished == 12
    assert counts.failed >= 3
    assert counts.all_questions >= 3
    assert set(search.errors()) == {"RuntimeError: no luck today"}
    assert {record.schedule.scorer for record in full_records(search)} == {"cls"}


def test_schedules_outside_the_range_cost_no_question() -> None:
    toy = Toy()
    search = toy_search(toy=toy, macs_range=(0.6, 0.8))
    assert search.add_starts(STARTS, "start") == 2  # 0.95, 0.85 and 0.7 cost 0.926, 0.786 and 0.595
    search.run(15)
    costs = [toy.macs(schedule).executed / 1e6 for schedule, _, _ in toy.answered if schedule is not None]
    assert len(costs) == 15
    assert all(0.6 <= cost <= 0.8 for cost in costs)
    assert search.counts().outside_range > 0


def test_range_without_schedules_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "MOST_IDLE", 20)
    search = toy_search(macs_range=(0.5, 0.5000001))
    with pytest.raises(ValueError, match=r"20 draws .* outside 0.5 to 0.5000001"):
        search.run(5)
    with pytest.raises(ValueError, match=r"not 0.5 to 0.5"):
        toy_search(macs_range=(0.5, 0.5))


def test_schedule_drawn_again_takes_its_old_scores() -> None:
    toy = Toy()
    search = toy_search(toy=toy)
    search.add_starts(STARTS[:1], "start")
    search.run(1)
    answered = len(toy.answered)
    search.study.enqueue_trial(search.study.trials[0].params)
    search.run(2)
    assert [schedule for schedule, _, _ in toy.answered[answered:]].count(STARTS[0]) == 0
    assert search.counts().repeated == 1
    assert search.study.trials[1].values == search.study.trials[0].values
    assert len(records_of(search.study)) == 2


def test_latency_may_be_the_cost() -> None:
    search = toy_search(objective="latency")
    search.add_starts(STARTS, "start")
    search.run(6)
    for record in records_of(search.study):
        assert record.latency is not None
        assert record.cost == record.latency.seconds / record.latency.full_model_seconds
        assert record.cost == pytest.approx(record.macs_fraction)


def test_study_of_other_settings_is_refused(tmp_path: Path) -> None:
    open_study(sqlite(tmp_path), "one", {"model": 1, "questions": 2}, "tpe", 0)
    open_study(sqlite(tmp_path), "one", {"model": 1, "questions": 2}, "nsga2", 1)
    with pytest.raises(ValueError, match=r"'one' in sqlite.* \(model\): name another"):
        open_study(sqlite(tmp_path), "one", {"model": 3, "questions": 2}, "tpe", 0)


@pytest.mark.parametrize("storage", ["nothing", "sqlite:////no/such/folder/study.db", "what://is.this/study"])
def test_storage_that_cannot_be_opened_is_named(storage: str) -> None:
    with pytest.raises(ValueError, match=f"'toy' in .*{re.escape(storage)}"):
        open_study(storage, "toy", {}, "tpe", 0)


@pytest.mark.parametrize(
    "url",
    [
        "nothing://me:secret@host/studies",
        "postgresql://me:secret@host:port/studies",
        "redis://:secret@host/0",
        "me:secret@host",
        "mysql://host/db?charset=utf8&password=secret",
        "mysql://host/db?Token=secret&x=y",
        "mysql://me:sec@ret@host/db",
    ],
)
def test_password_of_a_storage_is_not_shown(url: str) -> None:
    with pytest.raises(ValueError, match=r"\*\*\*") as caught:
        open_study(url, "toy", {}, "tpe", 0)
    assert not {"secret", "ret@"} & {str(caught.value), *re.split(r"[^\w@]", str(caught.value))}


def test_failing_storage_is_named_in_one_line() -> None:
    with (
        pytest.raises(OSError, match=r"^the study in a://me:\*\*\*@b .* \(the disk is full\): ") as caught,
        naming_storage("a://me:secret@b"),
    ):
        raise StorageInternalError("An exception is raised") from RuntimeError("the disk is full\nat line 3")
    assert "\n" not in str(caught.value)


def test_study_may_be_in_a_file_of_any_name(tmp_path: Path) -> None:
    file = tmp_path / "what? {100%} #1.db"
    toy_search(sqlite_url(file)).run(1)
    assert toy_search(sqlite_url(file)).num_finished() == 1
    assert file.is_file()


@pytest.mark.parametrize("rungs", [(0,), (100, 100), (400, 100)])
def test_rungs_that_do_not_grow_are_refused(rungs: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=rf"^rungs .* not {re.escape(str(list(rungs)))}"):
        Effort(rungs)


@pytest.mark.parametrize("margin", [-1, np.inf])
def test_margin_that_is_no_number_of_standard_errors_is_refused(margin: float) -> None:
    with pytest.raises(ValueError, match=f"^margin .* not {margin}"):
        Effort((), margin)
