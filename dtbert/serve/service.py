"""From requests to answers: what a request chooses, its texts' way through the batches, and what comes back."""

import asyncio
import json
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch

from dtbert import __version__
from dtbert.model import LengthSchedule, Policy
from dtbert.qa import Answer, QuestionAnswerer
from dtbert.qa.calls import Asking as QaAsking
from dtbert.qa.calls import Request
from dtbert.qa.documents import BestOfDocuments
from dtbert.qa.windows import Example, PairError, parts_of
from dtbert.serve import schemas
from dtbert.serve.batcher import Batcher, ClosedError, Job, QueueFullError
from dtbert.serve.metrics import Metrics
from dtbert.serve.problems import ProblemError
from dtbert.serve.settings import Settings
from dtbert.serve.shedding import Shedding

T = TypeVar("T")


class Chosen(NamedTuple):
    """What a request asks for, checked, the budget that chose its schedule, and whether the load made it smaller."""

    request: Request
    budget: float | None
    shed: bool
    began: float


class Service:
    """One model that answers the requests of one process.

    Args:
        qa: the answerer.
        settings: limits, and what is done under load.
        name: of the model, for people.

    Raises:
        ValueError: the settings shed to budgets that the model has no schedules for.
    """

    def __init__(self, qa: QuestionAnswerer, settings: Settings, name: str) -> None:
        for budget in settings.shed:
            qa.within_budget(budget)
        self.qa, self.settings, self.name, self.metrics = qa, settings, name, Metrics()
        self.batcher = Batcher(qa, settings.max_wait, settings.max_queue, self.metrics)
        self._shedding = Shedding(settings.shed, settings.max_queue)
        # Tokenizing and ranking, beside the loop that talks to clients and the thread of the model.
        self._texts = ThreadPoolExecutor(1, "dtbert-texts")
        with torch.inference_mode():  # as it answers
            self._backend = qa.model.backend_name
        self._executed = lru_cache(4096)(self._executed_macs)

    def close(self) -> None:
        """Finish what was taken, take nothing more."""
        self.batcher.close()
        self._texts.shutdown()

    async def answer(self, asked: schemas.AnswerRequest) -> schemas.AnswerResponse:
        """The best answers to a question about a context or several documents."""
        chosen = self._choose(asked, _asking(asked), asked.top_k)
        documents = asked.documents
        texts = [str(asked.context)] if documents is None else [one.text for one in documents]
        names = [str(n) if one.name is None else one.name for n, one in enumerate(documents or ())]
        examples = await self._prepare([(asked.question, text) for text in texts])
        for number, example in enumerate(examples):
            if isinstance(example, PairError):
                place = "" if documents is None else f"document {names[number]!r}: "
                raise ProblemError("cannot-answer", f"{place}{example}")
        jobs = await self._read([one for one in examples if isinstance(one, Example)], chosen)
        found = await self._in_thread(self._best, jobs, chosen.request, names)
        return schemas.AnswerResponse(answers=found, used=self._used(jobs, chosen))

    async def answers(self, asked: schemas.AnswersRequest) -> schemas.AnswersResponse:
        """Answers to many questions; one that cannot be answered says why, the others have theirs."""
        chosen = self._choose(asked, _asking(asked), asked.top_k)
        examples = await self._prepare([(one.question, one.context) for one in asked.questions])
        jobs = await self._read([one for one in examples if isinstance(one, Example)], chosen)
        found = iter(await self._in_thread(lambda: [self._best([job], chosen.request, ()) for job in jobs]))
        results = [
            schemas.PairAnswers(id=pair.id, answers=next(found))
            if isinstance(example, Example)
            else schemas.PairAnswers(id=pair.id, error=str(example))
            for pair, example in zip(asked.questions, examples, strict=True)
        ]
        return schemas.AnswersResponse(results=results, used=self._used(jobs, chosen))

    async def trace(self, asked: schemas.TraceRequest) -> schemas.TraceResponse:
        """What each layer kept of a text."""
        chosen = self._choose(asked, QaAsking(), 1)
        self._check_lengths([asked.question, asked.context])
        schedule = None if chosen.budget is not None else chosen.request.schedule

        def trace() -> tuple[float, dict[str, Any]]:
            began = time.monotonic()
            found = self.qa.trace(asked.question, asked.context, schedule=schedule, budget=chosen.budget)
            return began - chosen.began, found.to_dict()

        with _refusals():
            waited, fields = await asyncio.wrap_future(self.batcher.call(trace))
        used = self._used_for(fields["work"], waited, chosen)
        return schemas.TraceResponse(trace=fields, used=used)

    def model(self) -> schemas.ModelResponse:
        """What there is to know about the model and the limits."""
        qa, config = self.qa, self.qa.config
        points = [] if qa.front is None else [*qa.schedules, qa.front.full_model]
        return schemas.ModelResponse(
            name=self.name,
            version=__version__,
            device=str(qa.model.device),
            dtype=str(qa.model.dtype).removeprefix("torch."),
            backend=self._backend,
            layers=config.num_hidden_layers,
            hidden_size=config.hidden_size,
            window=qa.window,
            stride=qa.stride,
            threshold=qa.threshold,
            front=[
                schemas.FrontPoint(schedule=_plain(one.schedule), work=one.macs_fraction, f1=one.f1) for one in points
            ],
            measured_on=None
            if qa.front is None
            else f"{qa.front.num_questions} questions of {qa.front.questions_file}",
            limits=schemas.Limits(
                max_body=self.settings.max_body,
                max_context=self.settings.max_context,
                max_documents=self.settings.max_documents,
                deadline_ms=int(self.settings.deadline * 1000),
            ),
        )

    def _choose(self, asked: schemas.Spending, asking: QaAsking, k: int) -> Chosen:
        """The schedule that a request asks for, or the load allows.

        Raises:
            ProblemError: its options are wrong.
        """
        began, most_ms = time.monotonic(), int(1000 * self.settings.deadline)
        if asked.deadline_ms is not None and asked.deadline_ms > most_ms:
            said = f"{asked.deadline_ms} ms are more than this service's {most_ms} (`--deadline`): allow less"
            errors = [{"pointer": "/deadline_ms", "detail": said}]
            raise ProblemError("invalid-request", f"/deadline_ms: {said}", errors=errors)
        with _refusals():
            if isinstance(asked.schedule, list):
                asking["schedule"] = LengthSchedule.parse(json.dumps(asked.schedule))
            elif asked.schedule is not None:
                asking["schedule"] = Policy.from_dict(asked.schedule)
            budget, most = asked.budget, self._shedding.budget(self.batcher.waiting)
            shed = asked.schedule is None and most is not None and (budget is None or budget > most)
            used = asking["budget"] = most if shed else budget
            request = self.qa._request(k, **asking)
            return Chosen(request, used, shed, began)

    def _check_lengths(self, texts: Sequence[str]) -> None:
        longest = max(map(len, texts))
        if longest > self.settings.max_context:
            raise ProblemError(
                "too-large",
                f"a text has {longest:,} characters, this service takes {self.settings.max_context:,} "
                "(`--max-context`): cut it into documents",
            )

    async def _prepare(self, pairs: Sequence[tuple[str, str]]) -> Sequence[Example | PairError]:
        """Tokens of the texts, or what is wrong with them."""
        if len(pairs) > self.settings.max_documents:
            raise ProblemError(
                "too-large",
                f"there are {len(pairs)} texts, this service takes {self.settings.max_documents} in a request "
                "(`--max-documents`): send several requests",
            )
        self._check_lengths([text for pair in pairs for text in pair])
        with _refusals(), self.batcher.expecting(len(pairs)):
            return await self._in_thread(
                lambda: [example for part in self.qa.prepare_many(pairs) for example in part.examples]
            )

    async def _read(self, examples: Sequence[Example], chosen: Chosen) -> list[Job]:
        """The examples, with what the model says of them; who cancels this takes them out of the queue."""
        with _refusals():
            jobs = self.batcher.submit(examples, chosen.request)
            try:
                await asyncio.gather(*(asyncio.wrap_future(job.future) for job in jobs))
            finally:  # of one that failed the others are of no use
                for job in jobs:
                    job.future.cancel()
        return jobs

    async def _in_thread(self, call: Callable[..., T], *arguments: Any) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._texts, call, *arguments)

    def _best(self, jobs: Sequence[Job], request: Request, names: Sequence[str]) -> list[schemas.AnswerOut]:
        """The best answers: of the documents with these names, or of one text where there are none."""
        if not names:
            return [_answer(one) for one in jobs[0].best.answers(request.threshold)]
        best = BestOfDocuments(request.k)
        best.add(names, [job.best for job in jobs])
        return [_answer(one.answer, one.document) for one in best.answers(request.threshold)]

    def _used(self, jobs: Sequence[Job], chosen: Chosen) -> schemas.Used:
        schedule = chosen.request.schedule
        spent = full = 0
        for job in jobs:
            question = len(job.example.question.ids) + 2
            lengths = [part.num_tokens for part in parts_of(0, job.example)]
            full += sum(self._executed(None, length, question) for length in lengths)
            if isinstance(schedule, LengthSchedule | None):
                spent += sum(self._executed(schedule, length, question) for length in lengths)
                continue
            for length, kept in job.kept:
                spent += schedule.macs_of_kept(
                    self.qa.config, length, kept, question_length=question, backend=self._backend
                ).executed
        waited = max((job.started - job.arrived for job in jobs), default=0.0)
        return self._used_for(spent / full if full else 1.0, waited, chosen, len(jobs))

    def _used_for(self, work: float, waited: float, chosen: Chosen, answers: int = 1) -> schemas.Used:
        for _ in range(answers):
            self.metrics.work.observe(work)
        if chosen.shed:
            self.metrics.shed.inc(answers)
        return schemas.Used(
            budget=chosen.budget,
            schedule=_plain(chosen.request.schedule),
            work=work,
            shed=chosen.shed,
            waited_ms=1000 * waited,
            total_ms=1000 * (time.monotonic() - chosen.began),
        )

    def _executed_macs(self, schedule: LengthSchedule | None, length: int, question: int) -> int:
        config = self.qa.config
        if schedule is None:
            schedule = LengthSchedule.absolute([length] * config.num_hidden_layers)
        return schedule.macs(config, length, question_length=question, backend=self._backend).executed


@contextmanager
def _refusals() -> Iterator[None]:
    """What the queue or the answerer refuses, as problems."""
    try:
        yield
    except QueueFullError as error:
        raise ProblemError("queue-full", str(error), {"Retry-After": str(error.retry_after)}) from None
    except ClosedError as error:
        raise ProblemError("ending", str(error), {"Retry-After": "1"}) from None
    except (TypeError, ValueError) as error:
        raise ProblemError("cannot-answer", str(error)) from None


def _asking(asked: schemas.Asking) -> QaAsking:
    return QaAsking(overlap=asked.overlap, no_answer=asked.no_answer, threshold=asked.threshold)


def _answer(answer: Answer, document: str | None = None) -> schemas.AnswerOut:
    return schemas.AnswerOut(
        text=answer.text,
        start=answer.start,
        end=answer.end,
        score=answer.score,
        margin=answer.margin,
        document=document,
    )


def _plain(schedule: Policy | None) -> dict[str, Any] | None:
    return None if schedule is None else schedule.to_dict()
