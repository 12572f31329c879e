"""What a forward asks of a GPU that is not there: how many launches, and how many compiled variants of each kernel."""

from collections import Counter, defaultdict

import pytest
import torch

from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch
from scripts.compile_report import recording
from scripts.host_bench.stand_ins import as_on_a_gpu, model_without_weights, recorded

LENGTHS = (269, 253, 252, 202, 104, 34)
# Calls that launch nothing.
ALLOCATIONS = "allocations"


def launches(schedule: LengthSchedule | None) -> int:
    batch = PackedBatch.from_lists([list(range(384))] * 32, device="meta")
    with as_on_a_gpu(), torch.inference_mode():
        model = model_without_weights(num_hidden_layers=len(LENGTHS))
        _, calls = recorded(lambda: model.forward_packed(batch, schedule))
    return sum(count for name, count in calls.items() if name != ALLOCATIONS)


def test_forward_launches_eight_times_a_layer() -> None:
    # Products of 4 linear layers, attention, GELU, 2 norms; embeddings and span head.
    assert launches(None) == 6 * 8 + 2


@pytest.mark.parametrize("score", ["received", "received_max", "value_norm"])
@pytest.mark.parametrize("keep_cls", [False, True])
def test_dropping_takes_a_launch_a_layer_and_one_to_restore(score: str, keep_cls: bool) -> None:
    schedule = LengthSchedule.absolute(LENGTHS, scorer=score, keep_cls=keep_cls)
    assert launches(schedule) == launches(None) + 6 + 1 < 60


def test_protecting_the_question_launches_nothing() -> None:
    one, other = (LengthSchedule.absolute(LENGTHS, scorer="cls", keep_question=keep) for keep in (False, True))
    # Two more a layer for the score itself.
    assert launches(one) == launches(other) == launches(None) + 6 * 3 + 1


@pytest.mark.parametrize("keep_question", [False, True])
def test_forward_compiles_one_variant_of_a_kernel_and_its_constants(keep_question: bool) -> None:
    config = BertConfig(hidden_size=96, num_hidden_layers=6, num_attention_heads=3, intermediate_size=96, vocab_size=50)
    ratios = [0.9, 0.7, 0.5, 0.4, 0.3, 0.1]
    keys = defaultdict(set)
    with as_on_a_gpu(), torch.inference_mode(), recording("sm_90") as made:
        model = BertForQuestionAnswering(config, backend="triton").eval().requires_grad_(False)
        # Counts that 16 divides and others, and 1; in rows of one tensor, offsets and ids of every alignment.
        for tokens in ([16, 16], [33, 7], [5], [1], [320, 48, 30]):
            batch = PackedBatch.from_lists([[1] * count for count in tokens])
            for scorer in ("received", "cls"):
                schedule = LengthSchedule.ratios(ratios, scorer=scorer, keep_question=keep_question)
                model.forward_packed(batch, schedule)
    for launch in made:
        constants = tuple(sorted((name, str(value)) for name, value in launch.source.constants.items()))
        keys[launch.source.name, constants].add(launch.key)
    for kernel, variants in keys.items():
        assert len(variants) == 1, kernel
    # With and without a gather, a score, tokens dropped before, a context to move.
    counted = Counter(name for name, _ in keys)
    assert counted["_embed_kernel"] == counted["_scatter_kernel"] == 1
    assert counted["_add_norm_kernel"] == 2
    assert counted["_attention_kernel"] == 3
    assert counted["_select_kernel"] == 4
