"""The backend under a watch: the same numbers as without, each step in its layer, the work that the schedule counts."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dtbert.kernels import ATTENTION_SCORES, BackendName
from dtbert.kernels.cpu import Cpu
from dtbert.model import BertConfig, BertForQuestionAnswering, LayerView, LengthSchedule, PackedBatch, register_scorer
from dtbert.model.scorers import BUILT_IN_SCORERS, scorer_named
from dtbert.model.work import Work
from dtbert.profiling import random_batch
from dtbert.profiling.watch import Clock, Stopwatch, watched_forward
from tests.profiling.conftest import CONFIG


class Log:
    """A watch that notes what begins, and at the end of a layer its number."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.steps: list[tuple[int | None, str]] = []

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        self.layers.append(f"+{index}")
        yield
        self.layers.append(f"-{index}")

    @contextmanager
    def step(self, layer: int | None, name: str, work: Callable[[], Work]) -> Iterator[None]:
        self.steps.append((layer, name))
        yield


def watch_forward(model: BertForQuestionAnswering, batch: PackedBatch, schedule: LengthSchedule | None) -> Log:
    log = Log()
    with torch.inference_mode():
        watched_forward(model, batch, schedule, log)
    return log


def counted(model: BertForQuestionAnswering, batch: PackedBatch, schedule: LengthSchedule | None) -> int:
    watch = Stopwatch(Clock(model.device))
    with torch.inference_mode():
        watched_forward(model, batch, schedule, watch)
    return sum(timed.work().flops for timed in watch.timed)


def counted_by_schedule(
    schedule: LengthSchedule, seqlens: list[int], backend: BackendName = "cpu", config: BertConfig = CONFIG
) -> int:
    """Two FLOPs for each executed MAC but those of LayerNorm and of the span head's bias, which are no products'."""
    total = 0
    for length in seqlens:
        lengths = [length, *schedule.lengths(length)]
        norms = length + sum(before + kept for before, kept in zip(lengths, lengths[1:], strict=False))
        macs = schedule.macs(config, length, question_length=min(length, 12), backend=backend)
        total += 2 * (macs.executed - config.hidden_size * norms - 2 * length)
    return total


@pytest.mark.parametrize("scorer", BUILT_IN_SCORERS)
@pytest.mark.parametrize("schedule", [None, [18, 16, 5]], ids=["all", "dropping"])
def test_watched_forward_gives_the_same_bits(
    model: BertForQuestionAnswering, batch: PackedBatch, schedule: list[int] | None, scorer: str
) -> None:
    lengths = None if schedule is None else LengthSchedule.absolute(schedule, scorer=scorer)
    with torch.inference_mode():
        expected = model.forward_packed(batch, lengths)
        got = watched_forward(model, batch, lengths, Log())
    assert torch.equal(got.start_logits, expected.start_logits)
    assert torch.equal(got.end_logits, expected.end_logits)


@given(
    # Of one length: where only some sequences of a batch drop, the others are scored too, which no schedule counts.
    seqlens=st.builds(lambda count, length: [length] * count, st.integers(1, 3), st.integers(1, 40)),
    ratios=st.lists(st.floats(0.05, 1), min_size=3, max_size=3).map(lambda ratios: sorted(ratios, reverse=True)),
    scorer=st.sampled_from(BUILT_IN_SCORERS),
)
def test_flops_are_twice_the_macs_that_the_schedule_counts(
    model: BertForQuestionAnswering, seqlens: list[int], ratios: list[float], scorer: str
) -> None:
    # With keep_question the question's tokens that are left are known beforehand.
    schedule = LengthSchedule.ratios(ratios, scorer=scorer, keep_question=True)
    batch = random_batch(CONFIG, seqlens, model.device)
    assert counted(model, batch, schedule) == counted_by_schedule(schedule, seqlens)


def test_flops_without_a_schedule_are_those_of_keeping_all(model: BertForQuestionAnswering, batch: PackedBatch) -> None:
    everything = LengthSchedule.ratios([1] * 3)
    assert counted(model, batch, None) == counted_by_schedule(everything, list(batch.packing.seqlens))


def test_steps_belong_to_their_layers(model: BertForQuestionAnswering, batch: PackedBatch) -> None:
    log = watch_forward(model, batch, LengthSchedule.absolute([18, 18, 5], scorer=("cls", "cls", "answer")))
    kept = ["attention_output", "intermediate", "output"]
    names = [
        *["qkv", "significance", "selection", "attention", *kept],
        *["qkv", "attention", *kept],
        *["qkv", "span_head", "selection", "attention", *kept],
    ]
    layers = [0] * 7 + [1] * 5 + [2] * 7
    assert log.steps == [
        (None, "embeddings"),
        *zip(layers, names, strict=True),
        (None, "restore"),
        (None, "span_head"),
    ]
    assert log.layers == ["+0", "-0", "+1", "-1", "+2", "-2"]


def test_layer_that_fails_ends_the_watch_and_leaves_the_model_as_it_was(
    model: BertForQuestionAnswering, batch: PackedBatch
) -> None:
    with pytest.raises(ValueError, match="4 entries, the model 3 layers"):
        watch_forward(model, batch, LengthSchedule.ratios([1] * 4))
    assert watch_forward(model, batch, None).layers == ["+0", "-0", "+1", "-1", "+2", "-2"]


@pytest.mark.parametrize("scorer", BUILT_IN_SCORERS)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_each_backend_counts_what_it_does(batch: PackedBatch, backend: BackendName, scorer: str) -> None:
    model = BertForQuestionAnswering(CONFIG, backend=backend).requires_grad_(False)
    model.reset_parameters()
    if backend == "cpu":
        Cpu(blocked=True).prepare(model)
    assert model.span.weight.is_mkldnn == (backend == "cpu")
    # Every sequence drops in every layer; with its question kept, the question's tokens are known.
    schedule = LengthSchedule.absolute([14, 13, 12], scorer=scorer, keep_question=True)
    assert counted(model, batch, schedule) == counted_by_schedule(schedule, list(batch.packing.seqlens), backend)


@pytest.mark.parametrize("asked", [*ATTENTION_SCORES, "answer"])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_registered_scorer_is_counted_by_what_it_asks_for(
    batch: PackedBatch, backend: BackendName, asked: str
) -> None:
    model = BertForQuestionAnswering(CONFIG, backend=backend).requires_grad_(False)
    model.reset_parameters()
    function = LayerView.span_logits if asked == "answer" else lambda view: view.attention(asked)
    register_scorer("asks", lambda view: -function(view).reshape(len(view.hidden_states), -1).amax(1), macs=asked)
    schedule = LengthSchedule.absolute([14, 13, 12], scorer="asks", keep_question=True)
    assert counted(model, batch, schedule) == counted_by_schedule(schedule, list(batch.packing.seqlens), backend)


@pytest.mark.usefixtures("built_steps")
@pytest.mark.parametrize("scorer", BUILT_IN_SCORERS)
def test_compiled_steps_count_the_queries_that_they_compute(scorer: str) -> None:
    config = replace(CONFIG, hidden_size=64, num_attention_heads=2, intermediate_size=128)
    model = BertForQuestionAnswering(config, backend="native").requires_grad_(False)
    model.reset_parameters()
    model.backend.prepare(model)
    # No layer but the second drops: the others have the queries of all.
    schedule = LengthSchedule.absolute([99, 13, 13], scorer=scorer, keep_question=True)
    seqlens = [30, 17]
    batch = random_batch(config, seqlens, model.device)
    got = counted(model, batch, schedule)
    assert got == counted_by_schedule(schedule, seqlens, "native", config)
    saved = sum(2 * (length - 13) * 64 * 64 for length in seqlens) * (not scorer_named(scorer).reads_queries)
    assert got == counted_by_schedule(schedule, seqlens, "cpu", config) - saved
