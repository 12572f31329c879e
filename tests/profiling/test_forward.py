"""Repeats, their spread, what is left between the steps, memory, ceilings, traces."""

import itertools
import json
from pathlib import Path

import pytest
import torch

from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.model.work import Work
from dtbert.profiling import (
    Calls,
    Ceilings,
    Profile,
    ceilings,
    check_device,
    describe,
    measure_ceilings,
    profile_forwards,
    random_batch,
    random_model,
    write_trace,
)
from dtbert.profiling.forward import Spread, peak_memory
from dtbert.profiling.watch import Clock
from tests.profiling.conftest import CONFIG


def test_what_no_step_takes_is_other(
    model: BertForQuestionAnswering, batch: PackedBatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments = itertools.count()  # one passes at each look at the clock
    monkeypatch.setattr(Clock, "mark", lambda _: next(moments))
    (forward,) = profile_forwards(model, batch, [None], repeats=2)
    assert forward.seconds == (1, 1)
    # Looked at around the whole, around each layer, and around each step: 5 in a layer, and the two outside.
    assert forward.watched_seconds == (1 + 2 * (3 + 3 * 5 + 2),) * 2
    assert {key: one.seconds for key, one in forward.steps.items() if key[1] == "other"} == {
        (0, "other"): (6, 6),
        (1, "other"): (6, 6),
        (2, "other"): (6, 6),
        (None, "other"): (6, 6),
    }
    assert {one.seconds for key, one in forward.steps.items() if key[1] != "other"} == {(1, 1)}


def test_spread_is_median_and_outer_tenths() -> None:
    assert Spread.of((3.0,)) == (3, 3, 3)
    assert Spread.of(tuple(float(number) for number in range(11))) == (5, 1, 9)


def test_profile_accounts_for_each_step_and_layer(profile: Profile) -> None:
    assert profile.dropping is not None
    assert profile.everything.tokens == (67, 67, 67, 67)
    assert profile.dropping.tokens == (67, 18 + 18 + 15, 16 + 16 + 15, 5 + 5 + 5)
    steps = profile.dropping.by_step()
    assert {name: one.calls for name, one in steps.items()} == {
        "embeddings": 1,
        "qkv": 3,
        "attention": 3,
        "significance": 3,
        "selection": 3,
        "attention_output": 3,
        "intermediate": 3,
        "output": 3,
        "restore": 1,
        "span_head": 1,
        "other": 0,
    }
    assert not {"significance", "selection", "restore"} & profile.everything.by_step().keys()
    for forward in (profile.everything, profile.dropping):
        total = forward.total()
        for parts in (forward.by_step().values(), forward.by_layer().values()):
            assert Calls.total(parts).work == total.work
            assert Calls.total(parts).seconds == pytest.approx(total.seconds)
        assert len(forward.seconds) == len(forward.watched_seconds) == len(total.seconds) == 3
        assert all(seconds > 0 for one in forward.steps.values() if one.works for seconds in one.seconds)
        # No time is lost: the steps and what lies between them are the whole.
        assert all(steps >= whole - 1e-9 for steps, whole in zip(total.seconds, forward.watched_seconds, strict=True))


def test_later_layers_of_a_schedule_do_less(profile: Profile) -> None:
    assert profile.dropping is not None
    layers = [profile.dropping.by_layer()[layer].work.flops for layer in range(3)]
    assert layers[0] > layers[1] > layers[2]
    saving = profile.saving()
    assert saving is not None
    assert saving.flops == profile.dropping.total().work.flops / profile.everything.total().work.flops < 1


def test_bound_is_the_lower_ceiling() -> None:
    limits = Ceilings(flops_per_second=100, bytes_per_second=10)
    assert limits.ridge == 10
    assert (limits.bound(Work(1000, 10)), limits.seconds(Work(1000, 10))) == ("compute", 10)
    assert (limits.bound(Work(100, 100)), limits.seconds(Work(100, 100))) == ("memory", 10)
    # Each call has its own limit: together they are above the limit of the sum.
    calls = Calls((Work(1000, 10), Work(100, 100)), (40.0, 40.0, 40.0))
    assert calls.limit(limits) == 20
    assert calls.reached(limits) == 0.5
    assert Calls((), (1.0,)).reached(limits) is None
    assert Calls((), (1.0,)).bound(limits) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_ceilings_are_measured(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ceilings.PRODUCT_ROWS, "cpu", 64)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**16)
    measured = measure_ceilings(torch.device("cpu"), dtype)
    assert measured.flops_per_second > 0
    assert measured.bytes_per_second > 0


def test_peak_memory_holds_the_widest_states(model: BertForQuestionAnswering) -> None:
    peaks = []
    for seqlens in ([32] * 8, [32] * 16):
        batch = random_batch(CONFIG, seqlens, model.device)
        with torch.inference_mode():
            peaks.append(peak_memory(model, batch, None))
        tokens = sum(seqlens)
        assert 4 * tokens * (CONFIG.intermediate_size + CONFIG.hidden_size) <= peaks[-1]
    assert 1.9 < peaks[1] / peaks[0] < 2.1


def test_trace_names_forwards_layers_and_steps(
    model: BertForQuestionAnswering, batch: PackedBatch, tmp_path: Path
) -> None:
    path = tmp_path / "trace.json"
    write_trace(model, batch, [LengthSchedule.absolute([18, 16, 5]), None], path)
    events = json.loads(path.read_text())["traceEvents"]
    names = [event.get("name") for event in events if event.get("ph") == "X" and event["cat"] == "user_annotation"]
    assert names.count("forward, tokens dropped") == names.count("forward, nothing dropped") == 3
    assert names.count("layer 2") == names.count("layer 2: attention") == names.count("embeddings") == 6
    assert names.count("layer 0: selection") == names.count("layer 1: selection") == names.count("restore") == 3


def test_random_batch_is_the_same_every_time(batch: PackedBatch) -> None:
    again = random_batch(CONFIG, [20, 32, 15], torch.device("cpu"))
    assert torch.equal(again.input_ids, batch.input_ids)
    assert 0 <= int(batch.input_ids.min()) <= int(batch.input_ids.max()) < CONFIG.vocab_size
    assert [int((ids == 0).sum()) for ids in batch.token_type_ids.split(batch.packing.seqlens)] == [12, 12, 12]


@pytest.mark.parametrize(
    ("seqlens", "message"),
    [([], "at least one"), ([5, 0], "0 tokens: .* 64"), ([65], "65 tokens")],
)
def test_lengths_that_do_not_fit_are_refused(seqlens: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        random_batch(CONFIG, seqlens, torch.device("cpu"))


def test_profile_of_nothing_is_refused(model: BertForQuestionAnswering, batch: PackedBatch) -> None:
    with pytest.raises(ValueError, match=r"^repeats .* not 0"):
        profile_forwards(model, batch, [None], 0)
    with pytest.raises(ValueError, match="'meta'"):
        check_device(torch.device("meta"))


def test_random_model_has_the_published_sizes() -> None:
    model = random_model(1, 1024, device="cpu", dtype=torch.float32, backend="reference")
    assert model.config == BertConfig(
        hidden_size=1024, num_hidden_layers=1, num_attention_heads=16, intermediate_size=4096
    )
    setting = describe("x", model, random_batch(model.config, [3], model.device))
    assert (setting.backend, setting.dtype, setting.batch) == ("reference", "float32", "1 x 3 tokens")
    assert setting.weight_bytes == 4 * sum(parameter.numel() for parameter in model.parameters())
    assert setting.device
    with pytest.raises(ValueError, match="multiple"):
        random_model(1, 100, device="cpu", dtype=torch.float32)
    with pytest.raises(ValueError, match="device 'nowhere'"):
        random_model(1, 96, device="nowhere", dtype=torch.float32)
