"""When a model takes graphs and when not, what they hold, and that padding is nobody's business; no GPU is needed."""

import copy
import logging
from collections.abc import Callable
from threading import Barrier, Thread
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dtbert.kernels import Backend, Kept, Packing
from dtbert.kernels.parameters import Linear
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch, TopP, register_scorer
from dtbert.model.graphs import Graphs
from dtbert.model.padding import Bucket, PaddedInputs, Plan
from dtbert.model.scorers import BUILT_IN_SCORERS
from tests.graphs import StandIn, meet

CONFIG = BertConfig(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=50)
POSITIONS = CONFIG.max_position_embeddings
RATIOS = LengthSchedule.ratios([0.8, 0.5, 0.2])


def packing(lengths: list[int]) -> Packing:
    return Packing.stack([lengths], torch.device("cpu"))[0]


def batch_of(lengths: list[int], seed: int = 0) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    ids = [torch.randint(0, 50, (n,), generator=generator).tolist() for n in lengths]
    return PackedBatch.from_lists(ids, [[int(3 * i >= n) for i in range(n)] for n in lengths])


def make_model(**options: Any) -> BertForQuestionAnswering:
    model = BertForQuestionAnswering(CONFIG, backend="reference", **options)
    model.reset_parameters(torch.Generator().manual_seed(0))
    return model.eval().requires_grad_(False)


def with_graphs(model: BertForQuestionAnswering, most: int = 32, tokens: int = 2048) -> StandIn:
    """Give a model graphs that stand-ins make; a bucket's batches must have the same lengths, which `Padded` reads."""
    recorder = StandIn()
    model._chosen = Padded()
    model._graphs = Graphs(model.encoder, model.span, tokens, recorder, most)
    return recorder


class Padded(Backend):
    """Plain steps that take padded packings; what belongs to no sequence is NaN, or names the last row."""

    def linear(self, x: Tensor, layer: Linear, activation: Any = None) -> Tensor:
        # Row by row: a library rounds otherwise where there are more rows.
        return torch.cat([super(Padded, self).linear(row[None], layer, activation) for row in x])

    def add_norm(self, x: Tensor, layer: Linear, residual: Tensor, norm: Any, rows: Tensor | None = None) -> Tensor:
        rows = torch.arange(len(residual)) if rows is None else rows
        parts = [
            super(Padded, self).add_norm(one[None], layer, residual, norm, row[None])
            for one, row in zip(x, rows, strict=True)
        ]
        return torch.cat(parts)

    def attention(self, qkv: Tensor, packing: Packing, num_heads: int, queries: Kept | None = None) -> Tensor:
        asked = packing if queries is None else queries.packing
        return filled(super().attention(qkv, packing, num_heads, queries), asked.num_tokens)

    def scored_attention(self, qkv: Tensor, packing: Packing, *rest: Any) -> tuple[Tensor, Tensor]:
        context, significance = super().scored_attention(qkv, packing, *rest)
        return filled(context, packing.num_tokens), filled(significance, packing.num_tokens)

    def significance(self, qkv: Tensor, packing: Packing, *rest: Any) -> Tensor:
        return filled(super().significance(qkv, packing, *rest), packing.num_tokens)

    def select(self, significance: Tensor, packing: Packing, target: Packing) -> Kept:
        kept = super().select(significance, packing, target)
        rows = kept.rows.new_full((target.num_tokens,), packing.num_tokens - 1)
        rows[: len(kept.rows)] = kept.rows
        return kept._replace(rows=rows)


def filled(values: Tensor, rows: int) -> Tensor:
    return torch.cat([values, values.new_full((rows - len(values), *values.shape[1:]), float("nan"))])


def padded_logits(model: BertForQuestionAnswering, batch: PackedBatch, schedule: LengthSchedule | None) -> Tensor:
    plan = Plan.of(batch.packing, schedule, POSITIONS)
    inputs = PaddedInputs(plan.bucket, torch.device("cpu"))
    inputs.fill(batch, plan)
    padded, targets = inputs.batch(plan)
    assert padded.packing.num_tokens == plan.bucket.tokens == len(padded.input_ids)
    logits = model._forward(padded, plan.bucket.schedule, Padded(), targets)
    assert len(logits) == plan.bucket.tokens
    return logits[: batch.packing.num_tokens]


SCHEDULES = st.builds(
    lambda numbers, absolute, **options: LengthSchedule(
        "absolute" if absolute else "ratios",
        tuple(sorted((max(1, round(90 * x)) if absolute else x for x in numbers), reverse=True)),
        **options,
    ),
    st.lists(st.floats(1e-8, 1), min_size=3, max_size=3),
    st.booleans(),
    scorer=st.sampled_from(BUILT_IN_SCORERS),
    keep_cls=st.booleans(),
    keep_question=st.booleans() | st.lists(st.booleans(), min_size=3, max_size=3),
    accumulate=st.booleans(),
    skip_layers=st.sampled_from([(), (1,), (0, 2)]),
)
LENGTHS = st.lists(st.integers(1, 100), min_size=1, max_size=9)


@given(lengths=st.lists(st.integers(1, 50), min_size=1, max_size=6), schedule=st.none() | SCHEDULES)
@example([64], LengthSchedule.ratios([0.8, 0.5, 0.2], keep_cls=True))
@example([20, 24, 20], LengthSchedule.ratios([0.8, 0.5, 0.2], scorer="cls", keep_cls=True))
def test_padding_changes_no_bit_of_the_plain_steps(lengths: list[int], schedule: LengthSchedule | None) -> None:
    model, batch = make_model(), batch_of(lengths)
    want = model._forward(batch, schedule, Padded())
    assert torch.equal(padded_logits(model, batch, schedule), want)
    assert torch.isfinite(want).all()


@given(lengths=LENGTHS, fewer=LENGTHS, schedule=SCHEDULES)
def test_a_bucket_has_room_for_all_its_batches(lengths: list[int], fewer: list[int], schedule: LengthSchedule) -> None:
    for one in (lengths, fewer, [max(1, length // 2) for length in lengths]):
        bucket, kept = Plan.of(packing(one), schedule, POSITIONS)
        assert (bucket.schedule is None) == (not any(bucket.drops) and not schedule.skip_layers)
        assert len(bucket.sizes) == len(kept)
        assert bucket.sequences >= len(one)
        spare = bucket.schedule is not None
        for (rows, longest), row in zip(bucket.sizes, kept, strict=True):
            assert sum(row) + spare <= rows
            assert max(row) <= longest <= POSITIONS
        assert sorted((rows for rows, _ in bucket.sizes), reverse=True) == [rows for rows, _ in bucket.sizes]


@given(lengths=LENGTHS, schedule=SCHEDULES, more=st.tuples(st.integers(0, 3), st.integers(0, 99), st.integers(0, 9)))
def test_most_kept_is_a_bound(lengths: list[int], schedule: LengthSchedule, more: tuple[int, int, int]) -> None:
    sequences, tokens, longest = len(lengths) + more[0], sum(lengths) + more[1], max(lengths) + more[2]
    for most, kept in zip(schedule.most_kept(sequences, tokens, longest), schedule.kept(lengths), strict=True):
        assert sum(kept) <= most <= tokens


def test_most_kept_of_one_sequence_is_what_it_keeps() -> None:
    for schedule in (RATIOS, LengthSchedule.absolute([300, 90, 7])):
        assert schedule.most_kept(1, 128, 128) == schedule.lengths(128)


def test_batches_share_few_buckets() -> None:
    of_one = {
        Plan.of(packing([length]), schedule, POSITIONS).bucket
        for length in range(1, 385)
        for schedule in (None, RATIOS)
    }
    # Of each 64 tokens one; what a single token keeps, and the row that dropping needs, make others.
    assert len(of_one) <= 6 + 7 + 3
    assert Plan.of(packing([128]), None, POSITIONS).bucket == Bucket(1, 128, 128, None, ())
    assert Plan.of(packing([300, 100, 20]), None, POSITIONS).bucket == Bucket(4, 448, 384, None, ())
    assert Plan.of(packing([500, 500, 500]), None, 512).bucket == Bucket(4, 1536, 512, None, ())


@torch.inference_mode()
def test_a_bucket_is_met_recorded_and_replayed() -> None:
    model = make_model()
    recorder = with_graphs(model)
    for seed, (recorded, replayed) in enumerate([(0, 0), (1, 1), (1, 2), (1, 3)]):
        batch = batch_of([20, 9], seed)
        got, want = model.forward_packed(batch), model._forward(batch, None, Backend())
        torch.testing.assert_close(torch.stack(got, 1), want)
        assert (recorder.recorded, recorder.replayed) == (recorded, replayed)
    # The padded interface takes them too.
    model(torch.ones(2, 20, dtype=torch.int64))
    assert recorder.replayed == 4


@torch.inference_mode()
def test_what_the_layers_kept_is_told_without_graphs() -> None:
    model = make_model()
    recorder = with_graphs(model)
    for _ in range(3):
        got = model.forward_packed(batch_of([20, 9]), RATIOS, output_kept=True)
    assert [one.mask.sum().item() for one in got.kept] == [24, 15, 6]
    assert (recorder.recorded, recorder.replayed) == (0, 0)


@torch.inference_mode()
def test_results_of_earlier_calls_stay() -> None:
    model = make_model()
    with_graphs(model)
    batches = [batch_of([20], seed) for seed in range(4)]
    kept = [torch.stack(model.forward_packed(batch), 1) for batch in batches]
    views = [model.forward_packed(batch).start_logits for batch in batches]
    for batch, logits, view in zip(batches, kept, views, strict=True):
        torch.testing.assert_close(logits, model._forward(batch, None, Backend()))
        assert torch.equal(view, logits[:, 0])


def test_results_are_usable_with_and_without_inference_mode() -> None:
    model, batch = make_model(), batch_of([20])
    recorder = with_graphs(model)
    for _ in range(2):
        with torch.inference_mode():
            assert model.forward_packed(batch).start_logits.is_inference()
    logits = model.forward_packed(batch).start_logits
    assert recorder.replayed == 2
    assert not logits.is_inference()
    assert not logits.requires_grad


def test_the_least_recently_used_graph_goes() -> None:
    model = make_model()
    recorder = with_graphs(model, most=2)
    first, second, third = batch_of([20]), batch_of([100]), batch_of([150])
    for batch in (first, first, second, second, first, third, third):
        model.forward_packed(batch)
    assert len(model._graphs) == 2
    assert recorder.recorded == 3
    model.forward_packed(first)  # the second went
    assert recorder.recorded == 3
    model.forward_packed(second)  # met anew
    assert recorder.recorded == 3
    model.forward_packed(second)
    assert recorder.recorded == 4
    assert len(model._graphs) == 2


def test_threads_take_turns_and_get_their_own_results() -> None:
    model = make_model()
    recorder = with_graphs(model)
    barrier, inside = Barrier(2), []
    follow = recorder.follow
    # Both threads would meet between the lines of a replay, were there no lock.
    recorder.follow = lambda: (follow(), inside.append(meet(barrier)), barrier.reset())  # type: ignore[method-assign]
    batches = [batch_of([20], seed) for seed in range(8)]
    for batch in batches[:2]:
        model.forward_packed(batch)
    found: dict[int, Tensor] = {}

    def work(seeds: range) -> None:
        for seed in seeds:
            found[seed] = torch.stack(model.forward_packed(batches[seed]), 1)

    threads = [Thread(target=work, args=(range(start, 8, 2),)) for start in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert not any(inside)
    for seed, logits in found.items():
        torch.testing.assert_close(logits, model._forward(batches[seed], None, Backend()))


def watched_by_a_hook(model: BertForQuestionAnswering) -> Callable[[], object]:
    return model.encoder.layers[1].register_forward_hook(lambda *_: None).remove


def watched_by_a_global_hook(model: BertForQuestionAnswering) -> Callable[[], object]:
    return torch.nn.modules.module.register_module_forward_hook(lambda *_: None).remove


def watched_by_a_mode(model: BertForQuestionAnswering) -> Callable[[], object]:
    mode = FlopCounterMode(display=False)
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def cast_by_autocast(model: BertForQuestionAnswering) -> Callable[[], object]:
    mode = torch.autocast("cpu", torch.bfloat16)
    mode.__enter__()
    return lambda: mode.__exit__(None, None, None)


def recorded_by_another(model: BertForQuestionAnswering) -> Callable[[], object]:
    recorder = model._graphs._recorder
    recorder.occupied = True
    return lambda: setattr(recorder, "occupied", False)


@pytest.mark.parametrize(
    "watch",
    [watched_by_a_hook, watched_by_a_global_hook, watched_by_a_mode, cast_by_autocast, recorded_by_another],
)
def test_graphs_stay_out_of_the_way_of_who_watches(watch: Callable[..., Callable[[], object]]) -> None:
    model, batch = make_model(), batch_of([20])
    recorder = with_graphs(model)
    for _ in range(2):
        model.forward_packed(batch)
    end = watch(model)
    try:
        model.forward_packed(batch)
    finally:
        end()
    assert recorder.replayed == 1
    model.forward_packed(batch)
    assert recorder.replayed == 2


def test_graphs_are_for_the_models_own_backend_and_small_batches() -> None:
    model, batch = make_model(), batch_of([20])
    recorder = with_graphs(model, tokens=64)
    large = batch_of([30, 35])
    register_scorer("of_the_test", lambda view: view.position_ids)
    schedule = LengthSchedule.ratios([0.9, 0.5, 0.1], scorer="of_the_test")
    for _ in range(3):
        model.forward_packed(batch, backend=Backend())
        model.forward_packed(large)
        model.forward_packed(batch, schedule)
        model.forward_packed(batch, TopP([0.9, 0.5, 0.1]))  # asks the device
    assert len(model._graphs) == recorder.recorded == 0
    assert not model._graphs._met


def test_compiled_and_training_models_take_no_graphs() -> None:
    model, batch = make_model(), batch_of([20])
    recorder = with_graphs(model)
    compiled = torch.compile(model.forward_packed, backend="eager")
    for _ in range(3):
        compiled(batch)
    torch.compiler.reset()
    assert not model._graphs._met
    model.requires_grad_(True)
    assert model._graphs is None
    assert model.forward_packed(batch).start_logits.requires_grad
    assert recorder.recorded == 0


def test_wrong_schedules_are_refused_as_ever() -> None:
    model, batch = make_model(), batch_of([20])
    with_graphs(model)
    for _ in range(2):
        with pytest.raises(ValueError, match="the schedule has 2 entries, the model 3 layers"):
            model.forward_packed(batch, LengthSchedule.ratios([0.9, 0.5]))


def test_what_cannot_be_recorded_is_told_once_and_runs_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batch = make_model(), batch_of([20])
    recorder = with_graphs(model)

    def fail(forward: Callable[[], Tensor]) -> None:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(recorder, "record", fail)
    with caplog.at_level(logging.WARNING):
        found = [torch.stack(model.forward_packed(batch), 1) for _ in range(4)]
    want = model._forward(batch, None, Backend())
    for logits in found:
        torch.testing.assert_close(logits, want)
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.endswith("this model goes without: operation not permitted when stream is capturing")


def changed_in_place(model: BertForQuestionAnswering) -> None:
    with torch.no_grad():
        model.span.weight.mul_(2)


def replaced(model: BertForQuestionAnswering) -> None:
    model.span.weight = torch.nn.Parameter(2 * model.span.weight, requires_grad=False)


def moved(model: BertForQuestionAnswering) -> None:
    model.encoder.layers[0].to(torch.float64).to(torch.float32)
    model.encoder.layers[0].output.bias.data = model.encoder.layers[0].output.bias.data + torch.arange(16)


@pytest.mark.parametrize("change", [changed_in_place, replaced, moved])
def test_a_changed_model_gives_its_new_results(change: Callable[[BertForQuestionAnswering], None]) -> None:
    model, batch = make_model(), batch_of([20])
    recorder = with_graphs(model)
    for _ in range(3):
        before = torch.stack(model.forward_packed(batch), 1)
    change(model)
    for _ in range(4):
        after = torch.stack(model.forward_packed(batch), 1)
        torch.testing.assert_close(after, model._forward(batch, None, Backend()))
        assert not torch.allclose(before, after)
    assert recorder.recorded == (1 if change is changed_in_place else 2)


def test_graphs_go_where_the_model_moves_loads_or_is_prepared_and_are_not_copied() -> None:
    model = make_model()
    for change in (
        lambda: model.to(torch.float64),
        lambda: model.load_state_dict(model.state_dict()),
        model.prepare,
    ):
        model.prepare()
        with_graphs(model)
        change()
        assert model._graphs is None  # and none are made on a CPU
    with_graphs(model)
    assert copy.deepcopy(model)._graphs is None
    assert model._graphs is not None
