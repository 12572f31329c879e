"""What a forward asks of a GPU that is not there: how many launches, and how many compiled variants of each kernel."""

from collections import Counter, defaultdict
from typing import Any
from unittest import mock

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode

from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.weights.quantize import quantize_layers
from scripts.compile_report import recording
from scripts.host_bench.stand_ins import as_on_a_gpu, model_without_weights

LENGTHS = (269, 253, 252, 202, 104, 34)


class Operations(TorchDispatchMode):
    """Counts torch's operations that launch something on a GPU: all but views, allocations and transfers."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = result if isinstance(result, tuple | list) else [result]
        on_a_gpu = any(isinstance(tensor, torch.Tensor) and tensor.is_meta for tensor in tensors)
        if on_a_gpu and not func.is_view and func._schema.name not in ("aten::empty", "aten::_to_copy"):
            self.counted[func._schema.name] += 1
        return result


def launches(schedule: LengthSchedule | None, *, in_float8: bool = False) -> int:
    batch = PackedBatch.from_lists([list(range(384))] * 32, device="meta")
    with as_on_a_gpu(), torch.inference_mode(), Operations() as operations:
        model = model_without_weights(num_hidden_layers=len(LENGTHS))
        if in_float8:
            quantize_layers(model, torch.float8_e4m3fn)
            model._chosen = None
        operations.counted.clear()
        with mock.patch.object(triton.JITFunction, "run") as run:
            model.forward_packed(batch, schedule)
    return run.call_count + operations.counted.total()


def test_forward_launches_seven_times_a_layer() -> None:
    # Products of 4 linear layers, one of them with its GELU, attention, 2 norms; embeddings and span head.
    assert launches(None) == 6 * 7 + 2


def test_fp8_takes_two_launches_more_a_layer() -> None:
    # The rows of the context; and GELU, with its rows, is no part of a product.
    assert launches(None, in_float8=True) == launches(None) + 2 * 6


@pytest.mark.parametrize("score", ["received", "received_max", "value_norm"])
@pytest.mark.parametrize("keep_cls", [False, True])
def test_dropping_takes_a_launch_a_layer_and_one_to_restore(score: str, keep_cls: bool) -> None:
    schedule = LengthSchedule.absolute(LENGTHS, scorer=score, keep_cls=keep_cls)
    assert launches(schedule) == launches(None) + 6 + 1 < 60


def test_protecting_the_question_launches_nothing() -> None:
    one, other = (LengthSchedule.absolute(LENGTHS, scorer="cls", keep_question=keep) for keep in (False, True))
    # Two more a layer for the score itself.
    assert launches(one) == launches(other) == launches(None) + 6 * 3 + 1


def test_words_of_the_question_are_found_in_one_launch() -> None:
    schedule = LengthSchedule.absolute(LENGTHS, scorer="answer_overlap", keep_question=True)
    # Twice a constant and a logarithm; in a layer span head, the greater logit, overlap, sum, and selection: after
    # the first, the overlap is gathered.
    assert launches(schedule) == launches(None) + 1 + 2 + 6 * 4 + 5 + 1


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
