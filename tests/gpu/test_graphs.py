"""CUDA graphs: the bits of the same padded batch run eagerly, in any order, from any thread, in bounded memory."""

from collections.abc import Iterator
from threading import Thread

import pytest
import torch
from torch import Tensor

from dtbert.model import BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.model.graphs import LARGE, SMALL, Graphs, _run
from dtbert.model.padding import PaddedInputs, Plan
from dtbert.weights import load_model
from tests.gpu.cases import DTYPES, relative_error
from tests.gpu.test_model import FLOAT32_BOUND, MULTIPLE, random_batch

pytestmark = pytest.mark.gpu

RATIOS = (1, 0.9, 0.7, 0.5, 0.3, 0.1)
SCHEDULES = [
    None,
    LengthSchedule.ratios(RATIOS),
    LengthSchedule.ratios(RATIOS, scorer="cls", keep_cls=True),
    LengthSchedule.ratios(RATIOS, scorer="answer_overlap", keep_question=True),
    LengthSchedule.ratios(RATIOS, scorer=("received", "from_question", "value_norm", "random", "overlap", "answer")),
    LengthSchedule.absolute([300, 200, 120, 60, 30, 7], keep_cls=True),
]
# Batches of the same bucket stand side by side, and buckets come back.
BATCHES = [
    *([120], [101], [128], [200, 3, 57], [150, 60, 50], [120], [384, 384, 384, 380], [384, 300, 384, 384]),
    *([1], [64], [384, 128, 1, 200, 57], [90] * 9, [127], [200, 3, 57], [88] * 9, [2]),
]


def identify(schedule: LengthSchedule | None) -> str:
    return (
        "all"
        if schedule is None
        else f"{schedule.kind} {schedule.scorer if len(set(schedule.scorers)) == 1 else 'mixed'}"
    )


@pytest.fixture(autouse=True)
def _in_inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def batch_of(lengths: list[int], seed: int = 0) -> PackedBatch:
    batch = random_batch(lengths, 30000)
    ids = batch.input_ids.roll(seed)
    return PackedBatch(ids, batch.token_type_ids, batch.position_ids, batch.packing, batch.id_ranges)


def logits(model: BertForQuestionAnswering, batch: PackedBatch, schedule: LengthSchedule | None = None) -> Tensor:
    return torch.stack(model.forward_packed(batch, schedule), -1)


def padded(model: BertForQuestionAnswering, batch: PackedBatch, schedule: LengthSchedule | None) -> Tensor:
    """Without a graph, on the rows that a graph would run on."""
    if schedule is not None:
        schedule = schedule.resolve(model.config.own_scorer)
    plan = Plan.of(batch.packing, schedule, model.config.max_position_embeddings)
    inputs = PaddedInputs(plan.bucket, model.device)
    inputs.fill(batch, plan)
    return _run(model._forward, inputs, plan, model.backend)[: batch.packing.num_tokens]


def graphs_of(model: BertForQuestionAnswering) -> Graphs:
    assert model._graphs is not None
    return model._graphs


@pytest.mark.parametrize("schedule", SCHEDULES, ids=identify)
@pytest.mark.parametrize("dtype", DTYPES)
def test_replays_have_the_bits_of_an_eager_run(dtype: torch.dtype, schedule: LengthSchedule | None) -> None:
    model = load_model(device="cuda", dtype=dtype)
    for seed, lengths in enumerate(BATCHES):
        batch = batch_of(lengths, seed)
        assert torch.equal(logits(model, batch, schedule), padded(model, batch, schedule)), lengths
    assert len(graphs_of(model)) >= 3


@pytest.mark.parametrize("dtype", DTYPES)
def test_full_buckets_have_the_bits_of_a_model_without_graphs(dtype: torch.dtype) -> None:
    model, without = load_model(device="cuda", dtype=dtype), load_model(device="cuda", dtype=dtype, graphs=False)
    assert without._graphs is None
    for lengths in ([128], [384], [100, 28], [384] * 4):
        for seed in range(3):
            batch = batch_of(lengths, seed)
            assert torch.equal(logits(model, batch), logits(without, batch)), lengths
    assert len(graphs_of(model)) == 4


@pytest.mark.parametrize(
    "schedule",
    [
        None,
        LengthSchedule.ratios(RATIOS, scorer="random", keep_cls=True),
        LengthSchedule.absolute([300, 200, 120, 60, 30, 7], scorer="random", keep_question=True),
    ],
    ids=identify,
)
def test_padding_is_as_right_as_the_batch_alone(schedule: LengthSchedule | None) -> None:
    # cuBLAS may round a row otherwise where there are more, which would swap tokens of near scores: these have none.
    model, without = load_model(device="cuda"), load_model(device="cuda", graphs=False)
    for lengths in BATCHES[:8]:
        batch = batch_of(lengths)
        assert relative_error(logits(model, batch, schedule), logits(without, batch, schedule)) <= FLOAT32_BOUND


@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_padding_in_half_precision_is_as_right_as_the_batch_alone(dtype: torch.dtype) -> None:
    # The scorer "random" keeps the same tokens in any dtype.
    schedule = LengthSchedule.ratios(RATIOS, scorer="random")
    exact, without = load_model(device="cuda", graphs=False), load_model(device="cuda", dtype=dtype, graphs=False)
    model = load_model(device="cuda", dtype=dtype)
    for lengths in BATCHES[:8]:
        batch = batch_of(lengths)
        want = logits(exact, batch, schedule)
        error, alone = (relative_error(logits(one, batch, schedule), want) for one in (model, without))
        assert error <= MULTIPLE * alone


def test_replays_do_not_wait_for_the_device() -> None:
    model, schedule = load_model(device="cuda", dtype=torch.bfloat16), SCHEDULES[3]
    batch = batch_of([120, 70])
    want = [logits(model, batch, schedule) for _ in range(3)][-1]
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = logits(model, batch, schedule)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, want)


def test_two_threads_on_streams_of_their_own_get_their_own_results() -> None:
    model, schedules = load_model(device="cuda", dtype=torch.bfloat16), SCHEDULES[:3]
    work = [(batch_of(BATCHES[i % 6], i), schedules[i % 3]) for i in range(60)]
    want = [padded(model, *one) for one in work]
    torch.cuda.synchronize()
    found: list[list[Tensor]] = [[], []]

    def run(place: int) -> None:
        # Inference mode is each thread's own.
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(3):
                found[place] += [logits(model, *one) for one in work]
            torch.cuda.current_stream().synchronize()

    threads = [Thread(target=run, args=(place,)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for place in range(2):
        assert len(found[place]) == 180
        assert all(torch.equal(got, want[i % 60]) for i, got in enumerate(found[place]))


def test_graphs_that_left_are_recorded_anew() -> None:
    model = load_model(device="cuda", dtype=torch.bfloat16)
    graphs_of(model)._most = 2
    for seed in range(12):
        batch = batch_of([[60], [120], [190]][seed // 2 % 3], seed)
        assert torch.equal(logits(model, batch), padded(model, batch, None))
        assert len(graphs_of(model)) <= 2


def test_graphs_share_their_memory() -> None:
    model = load_model(device="cuda", dtype=torch.bfloat16)

    def record(tokens: int) -> int:
        for _ in range(2):
            logits(model, batch_of([256] * (tokens // 256 - 1) + [128, 128]))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    largest = record(2048)
    for tokens in range(1024, 2048, 256):
        after = record(tokens)
    assert len(graphs_of(model)) == 5
    # torch takes 20 MiB at a time for tensors of this size: pools of their own would be four times that, or more.
    assert after - largest <= 24 * 2**20


def test_larger_batches_are_replayed_where_graphs_were_asked_for() -> None:
    batch = batch_of([384] * (SMALL // 384 + 1))
    assert SMALL < batch.packing.num_tokens <= LARGE
    for graphs, count in ((None, 0), (True, 1)):
        model = load_model(device="cuda", dtype=torch.bfloat16, graphs=graphs)
        found = [logits(model, batch) for _ in range(3)]
        assert len(graphs_of(model)) == count
        assert all(torch.equal(one, found[0]) for one in found)


def test_changed_weights_give_their_own_results() -> None:
    model, batch = load_model(device="cuda"), batch_of([120])
    before = [logits(model, batch) for _ in range(3)][-1]
    model.to("cpu").to("cuda")
    assert len(graphs_of(model)) == 0
    assert all(torch.equal(logits(model, batch), before) for _ in range(3))
    model.span.weight = torch.nn.Parameter(2 * model.span.weight, requires_grad=False)
    for _ in range(3):
        got = logits(model, batch)
        assert not torch.equal(got, before)
        assert relative_error(got, model._forward(batch, None, model.backend)) <= FLOAT32_BOUND


def test_results_are_usable_outside_inference_mode() -> None:
    model, batch = load_model(device="cuda"), batch_of([120])
    want = [logits(model, batch) for _ in range(3)][-1]
    with torch.inference_mode(False):
        plain = batch_of([120])
        got = logits(model, plain)
        got.add_(0)
    assert torch.equal(got, want)
