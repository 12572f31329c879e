"""A search in which several processes take part, one after another or together, any of them stopped or killed."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna import Study

from dtbert.evaluation import Score
from dtbert.model import LengthSchedule
from dtbert.search import naming_storage, records_of, storage, study
from tests.search.toys import STARTS, Toy, sqlite, take_part, toy_search


def test_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    first = toy_search(sqlite(tmp_path))
    assert first.add_starts(STARTS, "start") == 6
    first.run(7)
    before = [trial.params for trial in first.study.trials]
    toy = Toy()
    second = toy_search(sqlite(tmp_path), toy)
    assert toy.answered == []  # the full model's scores are in the study
    assert second.add_starts(STARTS, "start") == 0
    second.run(7)
    assert toy.answered == []
    second.run(10)
    assert [trial.params for trial in second.study.trials][: len(before)] == before
    assert second.num_finished() == 10
    drawn = [str(trial.params) for trial in second.study.trials]
    assert len(set(drawn)) == len(drawn)  # a continued search does not repeat its draws
    assert np.array_equal(second.full_model.f1, first.full_model.f1)


def test_interrupted_trial_is_tried_again(tmp_path: Path) -> None:
    class Interrupted(Toy):
        def scores(self, schedule: LengthSchedule | None, begin: int, end: int) -> list[Score]:
            if len(self.answered) == 3:
                raise KeyboardInterrupt
            return super().scores(schedule, begin, end)

    search = toy_search(sqlite(tmp_path), Interrupted())
    search.add_starts(STARTS, "start")
    with pytest.raises(KeyboardInterrupt):
        search.run(20)
    assert search.errors() == []
    assert search.num_finished() == 2
    toy = Toy()
    again = toy_search(sqlite(tmp_path), toy)
    again.run(8)
    tried = [schedule for schedule, _, _ in toy.answered]
    assert STARTS[2] in tried
    assert set(STARTS[3:]) <= set(tried)
    assert {record.origin for record in records_of(again.study) if record.schedule in STARTS} == {"start"}


def test_trial_whose_process_was_killed_is_tried_again(tmp_path: Path) -> None:
    killed = toy_search(sqlite(tmp_path))
    killed.add_starts(STARTS, "start")
    killed.run(1)
    for sign in (time.time() - 3600, time.time()):  # the second one's process may live
        trial = killed.study.ask()
        trial.set_user_attr("alive", sign)
        killed.space.suggest(trial)
    toy = Toy()
    search = toy_search(sqlite(tmp_path), toy)
    assert search.add_starts(STARTS, "start") == 0
    search.run(5)
    tried = [schedule for schedule, _, _ in toy.answered]
    assert STARTS[1] in tried
    assert STARTS[2] not in tried
    assert set(STARTS[3:]) <= set(tried)
    assert search.counts().failed == 0


def test_trial_that_the_sampler_drew_is_tried_again_with_what_it_drew(tmp_path: Path) -> None:
    class Interrupted(Toy):
        def scores(self, schedule: LengthSchedule | None, begin: int, end: int) -> list[Score]:
            if len(self.answered) == 4:
                drawn.append(schedule)
                raise KeyboardInterrupt
            return super().scores(schedule, begin, end)

    drawn: list[LengthSchedule | None] = []
    with pytest.raises(KeyboardInterrupt):
        toy_search(sqlite(tmp_path), Interrupted()).run(9)
    toy = Toy()
    toy_search(sqlite(tmp_path), toy, seed=5).run(4)
    assert [schedule for schedule, _, _ in toy.answered] == drawn


def test_trial_that_never_gave_a_sign_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = toy_search(sqlite(tmp_path))
    killed.add_starts(STARTS[:1], "start")
    killed.study.ask()
    toy = Toy()
    search = toy_search(sqlite(tmp_path), toy)
    search.run(2)
    assert STARTS[0] not in [schedule for schedule, _, _ in toy.answered]  # the process may live
    monkeypatch.setattr(study, "LOST_AFTER", 0.001)
    search.run(3)
    assert toy.answered[-1][0] == STARTS[0]


def let_another_process_take_over(tmp_path: Path) -> None:
    """It takes every trial that goes on for lost, and finishes one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "LOST_AFTER", -1.0)
        toy_search(sqlite(tmp_path)).run(1)


def test_trial_is_tried_once_where_two_take_it_for_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed = toy_search(sqlite(tmp_path))
    killed.add_starts(STARTS[:1], "start")
    trial = killed.study.ask()
    trial.set_user_attr("alive", time.time() - 3600)
    killed.space.suggest(trial)
    toy = Toy()
    search = toy_search(sqlite(tmp_path), toy)
    tell = search.study.tell

    def come_late(*arguments: Any) -> object:
        monkeypatch.undo()
        let_another_process_take_over(tmp_path)
        return tell(*arguments)

    monkeypatch.setattr(search.study, "tell", come_late)
    search.run(2)
    assert [trial.state.name for trial in killed.study.get_trials()] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert killed.study.trials[1].params == trial.params
    assert STARTS[0] not in [schedule for schedule, _, _ in toy.answered]


def test_trial_that_others_take_for_lost_while_it_is_told_does_not_stop_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = toy_search(sqlite(tmp_path))
    search.add_starts(STARTS[:1], "start")

    def after_trial(*_: object) -> None:
        monkeypatch.undo()
        let_another_process_take_over(tmp_path)

    monkeypatch.setattr(search.study.sampler, "after_trial", after_trial)
    search.run(2)
    assert [trial.state.name for trial in search.study.get_trials()] == ["FAIL", "COMPLETE", "COMPLETE"]


def test_trial_that_others_took_for_lost_does_not_stop_the_search(tmp_path: Path) -> None:
    class Slow(Toy):
        def scores(self, schedule: LengthSchedule | None, begin: int, end: int) -> list[Score]:
            if schedule == STARTS[0]:
                let_another_process_take_over(tmp_path)
            return super().scores(schedule, begin, end)

    search = toy_search(sqlite(tmp_path), Slow())
    search.add_starts(STARTS[:2], "start")
    search.run(3)
    assert [record.schedule for record in records_of(search.study)].count(STARTS[0]) == 1
    assert (search.counts().finished, search.counts().failed) == (3, 0)


def test_living_process_gives_signs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(study, "SIGN_EVERY", 0.01)
    signs = set()

    class Slow(Toy):
        def scores(self, schedule: LengthSchedule | None, begin: int, end: int) -> list[Score]:
            until = time.time() + 60
            while schedule is not None and len(signs) < 3 and time.time() < until:
                signs.add(search.study.trials[-1].user_attrs["alive"])
            return super().scores(schedule, begin, end)

    search = toy_search(sqlite(tmp_path), Slow())
    search.run(1)
    assert len(signs) == 3


def die_in_a_trial(storage: str, signed: bool) -> None:
    """A process that is killed while it answers, or before it could even say that it does."""

    class Killed(Toy):
        def scores(self, schedule: LengthSchedule | None, begin: int, end: int) -> list[Score]:
            if schedule is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().scores(schedule, begin, end)

    search = toy_search(storage, Killed())
    search.add_starts(STARTS[:1], "start")
    if not signed:
        search.study.ask = lambda: (Study.ask(search.study), os.kill(os.getpid(), signal.SIGKILL))  # type: ignore
    search.run(1)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="which process has ended is told on Linux alone")
@pytest.mark.parametrize("signed", [True, False])
def test_start_whose_process_was_killed_is_tried_by_the_next_at_once(tmp_path: Path, signed: bool) -> None:
    killed = multiprocessing.get_context("fork").Process(target=die_in_a_trial, args=(sqlite(tmp_path), signed))
    killed.start()
    killed.join()
    assert killed.exitcode == -signal.SIGKILL
    toy = Toy()
    search = toy_search(sqlite(tmp_path), toy)
    assert search.add_starts(STARTS[:1], "start") == 0
    search.run(1)
    assert [schedule for schedule, _, _ in toy.answered if schedule is not None] == STARTS[:1]
    assert (search.counts().finished, search.counts().failed) == (1, 0)


def test_start_that_was_lost_is_tried_though_there_are_trials_enough(tmp_path: Path) -> None:
    search = toy_search(sqlite(tmp_path))
    search.add_starts(STARTS[:1], "start")
    search.study.ask().set_user_attr("alive", time.time())
    search.run(2)
    toy = Toy()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study, "LOST_AFTER", -1.0)
        toy_search(sqlite(tmp_path), toy).run(2)
    assert toy.answered[-1][0] == STARTS[0]


def test_storage_that_fails_ends_the_search_and_no_trial_is_blamed(tmp_path: Path) -> None:
    class Full(Toy):
        def scores(self, schedule: LengthSchedule | None, begin: int, end: int) -> list[Score]:
            if schedule is not None:
                (tmp_path / "study.db").unlink()
            return super().scores(schedule, begin, end)

    search = toy_search(sqlite(tmp_path), Full())
    with pytest.raises(OSError, match=r"^the study in sqlite:.*study\.db cannot be read or written any more \(.*\): "):  # noqa: SIM117
        with naming_storage(sqlite(tmp_path)):
            search.run(3)


def test_locked_folder_is_waited_for_a_while_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fcntl = pytest.importorskip("fcntl", reason="Windows has no flock")
    monkeypatch.setattr(storage, "_LOCK_PATIENCE", 0.05)
    holder = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    toy_search(sqlite(tmp_path)).run(1)
    os.close(holder)
    assert [record.getMessage() for record in caplog.records if record.name.startswith("dtbert")] == [
        f"another process has locked the folder {tmp_path}: going on without that lock"
    ]


def test_two_processes_share_a_study(tmp_path: Path) -> None:
    # Copies of this process, which has all imports behind it: a toy needs no threads.
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    workers = [context.Process(target=take_part, args=(sqlite(tmp_path), seed, 8, barrier)) for seed in (1, 2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    search = toy_search(sqlite(tmp_path))
    # The other process may have been in the middle of one when the last was counted.
    assert 8 <= search.num_finished() <= 9
    assert len({str(record.schedule) for record in records_of(search.study)}) == search.counts().all_questions
