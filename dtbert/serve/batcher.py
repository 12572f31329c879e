"""Dynamic batches: windows of many requests go through one model together, on a thread of its own."""

import math
import threading
import time
from asyncio import CancelledError
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

from dtbert.model import LayerKept, LengthSchedule
from dtbert.qa import QuestionAnswerer
from dtbert.qa.answering import spans_of
from dtbert.qa.calls import Request
from dtbert.qa.spans import BestAnswers
from dtbert.qa.tokenize import special_ids
from dtbert.qa.windows import Example, Part, parts_of
from dtbert.serve.metrics import Metrics


class QueueFullError(Exception):
    """As much is waiting as may; ``retry_after`` seconds from now it will have been done."""

    def __init__(self, retry_after: int) -> None:
        super().__init__(f"the queue is full; it will have been done in {retry_after} s")
        self.retry_after = retry_after


class ClosedError(Exception):
    """Nothing is taken any more."""


class Job:
    """One question about one context: the windows of it that are still to be read, the longest first.

    Attributes:
        future: of its `BestAnswers`; to cancel it drops the job.
        arrived, started: when it came and when its first window was read, by `time.monotonic`.
        kept: where the policy's work depends on the text, of each window its tokens, and how many each layer kept.
    """

    def __init__(self, example: Example, request: Request, max_answer_tokens: int) -> None:
        self.example, self.request, self._longest = example, request, max_answer_tokens
        self.future: Future[BestAnswers] = Future()
        self.arrived, self.started = time.monotonic(), math.inf
        self._begin()

    def _begin(self) -> None:
        self.best = BestAnswers(self.example, self.request.k, self._longest, self.request.overlap)
        self.parts = deque(sorted(parts_of(0, self.example), key=lambda part: -part.num_tokens))
        self.unread = len(self.parts)
        self.kept: list[tuple[int, list[int]]] = []

    def finish(self) -> bool:
        """Whether it is answered; a text without a span at the edges of words is read again for one inside a word."""
        if self.best.is_empty:
            self.example = self.example.at_any_token()
            self._begin()
            return False
        return True


class Call:
    """Something else that is to be done with the model, while no batch is."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.function = function
        self.future: Future[Any] = Future()
        self.arrived = time.monotonic()
        self.parts = (None,)


class Batcher:
    """Answers what many threads ask, in batches of one schedule each.

    The first job of the queue is always in the next batch, so none waits for ever; those of its schedule whose windows
    are nearest in length to its own are its mates. What is left of a long text goes to the end of the queue. A batch
    starts when it is full, or when its first job has waited ``max_wait``.

    Args:
        qa: the answerer; nothing else should use its device meanwhile.
        max_wait: seconds.
        max_queue: windows that may wait.
        metrics: told of each batch.
    """

    def __init__(self, qa: QuestionAnswerer, max_wait: float, max_queue: int, metrics: Metrics) -> None:
        self._qa, self._max_wait, self._max_queue, self._metrics = qa, max_wait, max_queue, metrics
        self._special = special_ids(qa.tokenizer, qa.config.vocab_size)
        self._jobs: deque[Job | Call] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._expected = 0
        self._windows_per_second = 100.0
        self._thread = threading.Thread(target=self._run, name="dtbert-model", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Windows in the queue, and texts that are `expecting` to have theirs there, as one each."""
        with self._changed:
            return self._waiting()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    def submit(self, examples: Sequence[Example], request: Request) -> list[Job]:
        """Take questions in: all of them, or none.

        A single request may take the queue beyond its limit, lest a long one never come in.

        Raises:
            QueueFullError, ClosedError: none was taken.
        """
        jobs = [Job(example, request, self._qa.max_answer_tokens) for example in examples]
        self._put(jobs)
        return jobs

    def call(self, function: Callable[[], Any]) -> "Future[Any]":
        """Do something else with the model when its turn comes; raises as `submit`."""
        call = Call(function)
        self._put([call])
        return call.future

    @contextmanager
    def expecting(self, texts: int) -> Iterator[None]:
        """Room for so many texts until this ends, while they become windows that are submitted then.

        Raises:
            QueueFullError, ClosedError: there is none, as for `submit`; said before any work is done for them.
        """
        with self._changed:
            self._check_room(self._waiting())
            self._expected += texts
            self._waiting()
        try:
            yield
        except CancelledError:
            self._metrics.dropped.inc(texts)
            raise
        finally:
            with self._changed:
                self._expected -= texts
                self._waiting()

    def close(self) -> None:
        """Take nothing more, finish what was taken, and end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join()

    def _put(self, jobs: Sequence[Job | Call]) -> None:
        with self._changed:
            # Those that came later do not take its room from what was tokenized.
            self._check_room(self._waiting() - self._expected)
            self._jobs.extend(jobs)
            self._changed.notify_all()

    def _check_room(self, waiting: int) -> None:
        if not self.is_alive:
            raise ClosedError("the service is ending: nothing is taken any more")
        if waiting >= self._max_queue:
            raise QueueFullError(math.ceil(waiting / self._windows_per_second))

    def _waiting(self) -> int:
        # Whoever has gone waits no longer.
        for job in [job for job in self._jobs if job.future.cancelled()]:
            self._jobs.remove(job)
            self._metrics.dropped.inc()
        count = self._expected + sum(len(job.parts) for job in self._jobs)
        self._metrics.queue.set(count)
        return count

    def _run(self) -> None:
        while (batch := self._next()) is not None:
            if isinstance(batch, Call):
                _settle(batch.future, _outcome(batch.function))
            else:
                self._read(batch)

    def _next(self) -> Call | list[tuple[Job, Part]] | None:
        """What is to be done next, taken out of the queue; None at the end."""
        with self._changed:
            while True:
                self._waiting()
                if not self._jobs:
                    if self._closing:
                        return None
                    self._changed.wait()
                    continue
                oldest = self._jobs[0]
                if isinstance(oldest, Call):
                    self._jobs.popleft()
                    return oldest
                batch, full = self._mates(oldest)
                patience = oldest.arrived + self._max_wait - time.monotonic()
                if full or patience <= 0 or self._closing:
                    return self._taken(batch)
                self._changed.wait(patience)

    def _mates(self, oldest: Job) -> tuple[list[tuple[Job, int]], bool]:
        """The jobs of the next batch, each with how many of its windows; and whether there is no room for more."""
        schedule, length = oldest.request.schedule, oldest.parts[0].num_tokens
        mates = [job for job in self._jobs if isinstance(job, Job) and job.request.schedule == schedule]
        mates.sort(key=lambda job: abs(job.parts[0].num_tokens - length))  # of equals the older
        longest = windows = 0
        batch: list[tuple[Job, int]] = []
        for job in [oldest, *(job for job in mates if job is not oldest)]:
            longest = max(longest, job.parts[0].num_tokens)
            room = self._qa.batch_tokens // longest - windows
            if room <= 0:
                return batch, True
            batch.append((job, min(room, len(job.parts))))
            windows += batch[-1][1]
        return batch, (windows + 1) * longest > self._qa.batch_tokens

    def _taken(self, batch: list[tuple[Job, int]]) -> list[tuple[Job, Part]]:
        taken = [(job, job.parts.popleft()) for job, count in batch for _ in range(count)]
        now = time.monotonic()
        for job, _ in batch:
            job.started = min(job.started, now)
            self._jobs.remove(job)
            if job.parts:  # a long text takes turns with the others
                self._jobs.append(job)
        self._waiting()
        return sorted(taken, key=lambda one: -one[1].num_tokens)

    def _read(self, batch: list[tuple[Job, Part]]) -> None:
        """Put one batch through the model, and hand out the answers that are complete."""
        jobs = list(dict.fromkeys(job for job, _ in batch))
        rows = {job: row for row, job in enumerate(jobs)}
        parts = [part._replace(row=rows[job]) for job, part in batch]
        began = time.monotonic()
        try:
            qa, schedule = self._qa, jobs[0].request.schedule
            examples = [job.example for job in jobs]
            watch = None
            if not isinstance(schedule, LengthSchedule | None):
                watch = partial(_count_kept, [job for job, _ in batch])
            spans = spans_of(qa.model, examples, parts, schedule, self._special, qa.max_answer_tokens, watch)
            for window, (job, part) in enumerate(batch):
                job.best.add(spans, window, part)
                job.unread -= 1
        except Exception as error:  # whatever it is, it is the askers' to know, and the thread goes on
            self._fail(jobs, error)
            return
        seconds = time.monotonic() - began
        self._windows_per_second += 0.1 * (len(batch) / max(seconds, 1e-6) - self._windows_per_second)
        self._metrics.batch(sum(part.num_tokens for part in parts), len(parts), seconds)
        for job in jobs:
            if job.unread:  # it is in the queue, or its asker has gone
                continue
            if job.finish():
                _settle(job.future, job.best)
                continue
            with self._changed:
                self._jobs.appendleft(job)

    def _fail(self, jobs: Sequence[Job], error: Exception) -> None:
        with self._changed:
            for job in jobs:
                if job in self._jobs:
                    self._jobs.remove(job)
        for job in jobs:
            _settle(job.future, error)


def _count_kept(jobs: Sequence[Job], parts: Sequence[Part], kept: Sequence[LayerKept]) -> None:
    """Tell the job of each window of a batch how many tokens every layer kept of it."""
    for job, part, *counts in zip(jobs, parts, *(layer.lengths for layer in kept), strict=True):
        job.kept.append((part.num_tokens, counts))


def _outcome(function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        return error


def _settle(future: "Future[Any]", outcome: Any) -> None:
    with suppress(InvalidStateError):  # whoever asked has gone
        if isinstance(outcome, Exception):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
