"""Batches: the same answers to the bit as alone, bounded, fair, and nothing read for those who have gone."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dtbert.model import LengthSchedule, PackedBatch, SpanLogits
from dtbert.qa import QuestionAnswerer
from dtbert.qa.calls import Request
from dtbert.qa.windows import Example, parts_of
from dtbert.serve.batcher import Batcher, ClosedError, QueueFullError
from dtbert.serve.metrics import Metrics
from tests.serve.conftest import QUESTION, held

WORDS = ["Ada", "wrote", "the", "letter", "to", "Babbage", "in", "London", "1843", ",", "and", "answered", "."]
SCHEDULES = [
    None,
    LengthSchedule.ratios([0.7, 0.3], scorer="overlap"),
    LengthSchedule.absolute([40, 9], scorer="received"),
]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=90).map(" ".join)
# A word that is longer than an answer may be.
ENDLESS = "9" * 80


def examples_of(qa: QuestionAnswerer, texts: Sequence[str]) -> list[Example]:
    return [one for one in qa.prepare((QUESTION, text) for text in texts).examples if isinstance(one, Example)]


@pytest.fixture(scope="module")
def qa(make_answerer: Callable[..., QuestionAnswerer]) -> Iterator[QuestionAnswerer]:
    """Of windows so small that longer texts have several, and batches of a few of them.

    What its model says of a token depends on nothing beside it, to the bit, which no library's product promises.
    """
    answerer = make_answerer(window=48, stride=8, batch_tokens=150)

    def forward(batch: PackedBatch, schedule: LengthSchedule | None = None) -> SpanLogits:
        mixed = 7919 * batch.input_ids + 104729 * batch.position_ids + 31 * len(str(schedule))
        return SpanLogits((mixed % 997).float() / 64, (mixed % 1009).float() / 64)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answerer.model, "forward_packed", forward)
        yield answerer


@pytest.fixture
def start(qa: QuestionAnswerer) -> Iterator[Callable[..., Batcher]]:
    batchers = []

    def make(max_wait: float = 0.0, max_queue: int = 1000, metrics: Metrics | None = None) -> Batcher:
        batchers.append(Batcher(qa, max_wait, max_queue, metrics or Metrics()))
        return batchers[-1]

    yield make
    for batcher in batchers:
        batcher.close()


@settings(max_examples=12)
@given(st.lists(st.tuples(TEXTS, st.integers(0, 2), st.integers(1, 2)), min_size=2, max_size=6))
def test_answers_in_company_are_those_alone_to_the_bit(qa: QuestionAnswerer, asked: list[tuple[str, int, int]]) -> None:
    batcher = Batcher(qa, 0, 1000, Metrics())
    with held(batcher):
        jobs = [
            batcher.submit(examples_of(qa, [text]), Request(k, SCHEDULES[schedule]))[0] for text, schedule, k in asked
        ]
    found = [job.future.result().answers() for job in jobs]
    batcher.close()
    assert found == [qa.top(QUESTION, text, k, schedule=SCHEDULES[schedule]) for text, schedule, k in asked]


@pytest.mark.skipif(
    "AVX512" not in torch.backends.cpu.get_cpu_capability(),
    reason="without AVX512 products are MKL's, whose last bits may depend on how many rows there are",
)
def test_the_shipped_model_says_the_same_to_the_bit_in_company(shipped: QuestionAnswerer) -> None:
    texts = [" ".join(WORDS[: 1 + 5 * n % 13] * (1 + n)) for n in range(7)]
    for budget in (None, 0.5):
        schedule = None if budget is None else shipped.within_budget(budget).schedule
        metrics = Metrics()
        batcher = Batcher(shipped, 0, 1000, metrics)
        with held(batcher):
            jobs = batcher.submit(examples_of(shipped, texts), Request(2, schedule))
        found = [job.future.result().answers() for job in jobs]
        batcher.close()
        assert b"dtbert_batch_tokens_count 1.0" in metrics.text()
        assert found == [shipped.top(QUESTION, text, 2, schedule=schedule) for text in texts]


def test_a_text_that_is_one_endless_word_is_answered(qa: QuestionAnswerer, start: Callable[..., Batcher]) -> None:
    (job,) = start().submit(examples_of(qa, [ENDLESS]), Request())
    assert job.future.result().answers() == qa.top(QUESTION, ENDLESS, 1)


def test_a_batch_waits_until_it_is_full(qa: QuestionAnswerer, start: Callable[..., Batcher]) -> None:
    metrics = Metrics()
    batcher = start(max_wait=3600.0, metrics=metrics)
    (example,) = examples_of(qa, ["Ada wrote the letter in London ."])
    room = qa.batch_tokens // parts_of(0, example)[0].num_tokens
    jobs = batcher.submit([example] * (room - 1), Request())
    assert not jobs[0].future.done()
    jobs += batcher.submit([example], Request())
    for job in jobs:
        job.future.result()
    assert b"dtbert_batch_tokens_count 1.0" in metrics.text()


def test_what_is_beyond_the_queue_is_refused_at_once(qa: QuestionAnswerer, start: Callable[..., Batcher]) -> None:
    batcher = start(max_queue=3)
    examples = examples_of(qa, ["Ada wrote it ."] * 3)
    with held(batcher):
        jobs = batcher.submit(examples[:2], Request())
        jobs += batcher.submit(examples, Request())  # the limit is passed by one request, not by two
        assert batcher.waiting == 5
        with pytest.raises(QueueFullError) as refused:
            batcher.submit(examples[:1], Request())
        assert refused.value.retry_after >= 1
        with pytest.raises(QueueFullError), batcher.expecting(1):
            pass
    assert len({job.future.result().answers()[0] for job in jobs}) == 1
    # What is still to become windows takes room, though not from what has; and gives it back.
    with batcher.expecting(3):
        assert batcher.waiting == 3
        with pytest.raises(QueueFullError), batcher.expecting(1):
            pass
        batcher.submit(examples[:1], Request())[0].future.result()
    assert batcher.waiting == 0


def test_nothing_is_read_for_who_has_gone(qa: QuestionAnswerer, start: Callable[..., Batcher]) -> None:
    metrics = Metrics()
    batcher = start(metrics=metrics)
    with held(batcher):
        gone, stays = batcher.submit(examples_of(qa, ["Ada came .", "Ada wrote ."]), Request())
        gone.future.cancel()
    stays.future.result()
    assert b"dtbert_dropped_total 1.0" in metrics.text()
    assert b"dtbert_batch_windows_total 1.0" in metrics.text()


def test_who_goes_while_a_long_text_is_read_is_counted_once(
    qa: QuestionAnswerer, start: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = Metrics()
    batcher, forward = start(metrics=metrics), qa.model.forward_packed

    def leave(batch: PackedBatch, schedule: LengthSchedule | None = None) -> SpanLogits:
        job.future.cancel()
        assert batcher.waiting == 0
        return forward(batch, schedule)

    monkeypatch.setattr(qa.model, "forward_packed", leave)
    with held(batcher):
        (job,) = batcher.submit(examples_of(qa, ["Ada wrote it . " * 600]), Request())
    batcher.call(lambda: None).result()
    assert b"dtbert_dropped_total 1.0" in metrics.text()


def test_the_oldest_is_next_whatever_comes_after(qa: QuestionAnswerer, start: Callable[..., Batcher]) -> None:
    batcher, order = start(), []
    one, other = (Request(schedule=schedule) for schedule in SCHEDULES[:2])
    with held(batcher):
        for name, request, count in (("first", one, 1), ("second", other, 1), ("crowd", one, 30)):
            for job in batcher.submit(examples_of(qa, ["Ada wrote it ."] * count), request):
                job.future.add_done_callback(lambda _, name=name: order.append(name))
    batcher.call(lambda: None).result()
    # The first takes a batch of the crowd along; the second comes before the rest of it.
    second = order.index("second")
    assert order[0] == "first"
    assert 0 < order[:second].count("crowd") < 30


def test_a_long_text_takes_turns_with_those_after_it(qa: QuestionAnswerer, start: Callable[..., Batcher]) -> None:
    batcher, order = start(), []
    with held(batcher):
        for name, text in (("long", "Ada wrote it . " * 600), ("short", "Ada wrote it .")):
            (job,) = batcher.submit(examples_of(qa, [text]), Request())
            job.future.add_done_callback(lambda _, name=name: order.append(name))
    batcher.close()
    assert order == ["short", "long"]


def test_an_error_of_the_model_is_the_askers_and_the_next_is_answered(
    qa: QuestionAnswerer, start: Callable[..., Batcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    batcher = start()
    examples = examples_of(qa, [" ".join(WORDS * 12), "Ada wrote it ."])
    with monkeypatch.context() as broken:
        broken.setattr(qa.model, "forward_packed", fail)
        for job in batcher.submit(examples, Request()):
            with pytest.raises(RuntimeError, match="out of memory"):
                job.future.result()
    assert batcher.waiting == 0
    assert batcher.submit(examples[1:], Request())[0].future.result().answers()


def test_what_was_taken_is_finished_at_the_end_and_no_more_is_taken(
    qa: QuestionAnswerer, start: Callable[..., Batcher]
) -> None:
    batcher = start(max_wait=3600.0)
    (job,) = batcher.submit(examples_of(qa, ["Ada wrote it ."]), Request())
    batcher.close()
    assert job.future.done()
    assert not batcher.is_alive
    with pytest.raises(ClosedError):
        batcher.submit([job.example], Request())
