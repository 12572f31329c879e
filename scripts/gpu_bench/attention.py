"""Attention alone: against PyTorch's own, with scores against without, and for kept queries alone."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dtbert.kernels import ATTENTION_SCORES, AttentionScore, Backend, Kept
from dtbert.model import Packing
from dtbert.model.scorers import scorer_named
from gpu_bench.setting import QUESTION_TOKENS, Row, Rows, Setting
from gpu_bench.timing import Contender, compare, peak_bytes

OWN = "dtbert"
MATERIALISED = "probabilities in memory"
GATHERED, SCORED_FIRST = "all queries, then gather", "scores first, then kept queries"
DROPPED_BY: tuple[AttentionScore, ...] = ("received", "cls")
_FRACTIONS = (0.9, 0.7, 0.5, 0.3, 0.1)


Heads = tuple[Tensor, Tensor, Tensor]  # queries, keys and values


class Inputs:
    """Random queries, keys and values of one packing, packed and padded, in as many sets as outlast the caches."""

    def __init__(self, setting: Setting, lengths: Sequence[int]) -> None:
        sizes = setting.sizes
        self.setting, self.lengths, self.packing = setting, lengths, setting.packing(lengths)
        tokens, width = sum(lengths), 3 * sizes.hidden_size
        self.sets = setting.sets(tokens * width * setting.dtype.itemsize)
        self.qkv = [setting.randn(tokens, width, seed=seed) for seed in range(self.sets)]
        longest = max(lengths)
        self.real = torch.arange(longest, device=setting.device) < torch.tensor(lengths, device=setting.device)[:, None]
        self.equal = min(lengths) == longest
        positions = torch.cat([torch.arange(length) for length in lengths])
        self.segments = (positions >= QUESTION_TOKENS).long().to(setting.device)

    @functools.cached_property
    def padded(self) -> list[Heads]:
        """Queries, keys and values ``[B, N, S, D]`` of each set, 0 at padding."""
        sizes = self.setting.sizes
        found = []
        for qkv in self.qkv:
            rows = qkv.new_zeros(*self.real.shape, qkv.shape[1])
            rows[self.real] = qkv
            query, key, value = rows.unflatten(2, (3, sizes.heads, sizes.head_size)).permute(2, 0, 3, 1, 4)
            found.append((query, key, value))
        return found

    @functools.cached_property
    def packed(self) -> list[Heads]:
        """Queries, keys and values ``[T, N, D]`` of each set."""
        shape, found = (3, self.setting.sizes.heads, self.setting.sizes.head_size), []
        for qkv in self.qkv:
            query, key, value = qkv.unflatten(1, shape).unbind(1)
            found.append((query, key, value))
        return found

    @functools.cached_property
    def nested(self) -> list[Heads]:
        """Queries, keys and values ``[B, N, jagged, D]`` of each set; flash attention wants these contiguous."""

        def nested(part: Tensor) -> Tensor:
            shortest, longest = min(self.lengths), max(self.lengths)
            jagged = torch.nested.nested_tensor_from_jagged(
                part.contiguous(), offsets, min_seqlen=shortest, max_seqlen=longest
            )
            return jagged.transpose(1, 2)

        offsets = self.packing.cu_seqlens.long()
        return [(nested(query), nested(key), nested(value)) for query, key, value in self.packed]

    @property
    def flops(self) -> int:
        """Of the two products, over all heads."""
        return sum(4 * length**2 * self.setting.sizes.hidden_size for length in self.lengths)

    def attend(self, index: int, queries: Kept | None = None) -> Tensor:
        """Context of all queries, or of some."""
        return self.setting.backend.attention(self.qkv[index], self.packing, self.setting.sizes.heads, queries)

    def attend_and_score(self, score: AttentionScore, index: int) -> tuple[Tensor, Tensor]:
        """Context and score: in one pass where the score needs every query, as in a layer."""
        return self._scored(self.setting.backend, score, self.qkv[index])

    def score(self, score: AttentionScore, index: int) -> Tensor:
        heads = self.setting.sizes.heads
        return self.setting.backend.significance(self.qkv[index], self.packing, heads, score, self.segments)

    def expected(self) -> Tensor:
        """The context of the first set, by the reference in float32."""
        return Backend().attention(self.qkv[0].float(), self.packing, self.setting.sizes.heads)

    def expected_score(self, score: AttentionScore) -> Tensor:
        return self._scored(Backend(), score, self.qkv[0].float())[1]

    def _scored(self, backend: Backend, score: AttentionScore, qkv: Tensor) -> tuple[Tensor, Tensor]:
        packing, heads = self.packing, self.setting.sizes.heads
        if scorer_named(score).with_context:
            return backend.scored_attention(qkv, packing, heads, score)
        significance = backend.significance(qkv, packing, heads, score, self.segments)
        return backend.attention(qkv, packing, heads), significance

    def to_packed(self, padded: Tensor) -> Tensor:
        """``[B, N, S, D]`` to ``[T, H]``."""
        return padded.transpose(1, 2).flatten(2)[self.real]


def without_scores(setting: Setting) -> Rows:
    """Context alone, against the attention that PyTorch has."""
    for work, lengths in setting.works.items():
        inputs = Inputs(setting, lengths)
        expected = inputs.expected()
        contenders = [Contender(OWN, inputs.attend, expected=expected), *_peers(inputs, expected)]
        row = compare(contenders, setting.device, setting.effort, sets=inputs.sets, launch="replayed")
        yield {"section": "attention", "work": work, "flops": inputs.flops, **row}


def _peers(inputs: Inputs, expected: Tensor) -> list[Contender]:
    def padded(backend: SDPBackend) -> Callable[[int], Tensor]:
        def run(index: int) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(*inputs.padded[index], attn_mask=mask)

        return run

    mask = None if inputs.equal else inputs.real[:, None, None, :]
    backends = {"sdpa cuDNN": SDPBackend.CUDNN_ATTENTION, "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION}
    if inputs.equal:
        backends = {"sdpa flash": SDPBackend.FLASH_ATTENTION, **backends}
    found = [Contender(name, padded(backend), inputs.to_packed, expected) for name, backend in backends.items()]
    if not inputs.equal:
        # Flash attention takes no mask, but sequences of their own lengths.
        jagged = functools.partial(_jagged_flash, inputs)
        found.append(Contender("sdpa flash, jagged", jagged, _values_of_jagged, expected))
    found.append(Contender("varlen_attn", functools.partial(_varlen, inputs), lambda out: out.flatten(1), expected))
    return found


def _jagged_flash(inputs: Inputs, index: int) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return F.scaled_dot_product_attention(*inputs.nested[index])


def _values_of_jagged(nested: Tensor) -> Tensor:
    return nested.transpose(1, 2).values().flatten(1)


def _varlen(inputs: Inputs, index: int) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    offsets, longest = inputs.packing.cu_seqlens, inputs.packing.max_seqlen
    # By position: later versions have more options, and none in these places.
    out = varlen_attn(*inputs.packed[index], offsets, offsets, longest, longest)
    assert isinstance(out, Tensor)
    return out


def with_scores(setting: Setting) -> Rows:
    """Context and each score of the keys, against the context alone and against probabilities in memory."""
    for work, lengths in setting.works.items():
        inputs = Inputs(setting, lengths)
        contenders = [Contender("no score", inputs.attend, expected=inputs.expected())]
        for score in ATTENTION_SCORES:
            run = functools.partial(inputs.attend_and_score, score)
            expected = inputs.expected_score(score)
            contenders.append(Contender(score, run, lambda out: out[1], expected, _peak(setting, run)))
        if inputs.equal:
            stored = functools.partial(_materialised, inputs)
            expected = inputs.expected_score("received")
            contenders.append(Contender(MATERIALISED, stored, lambda out: out[1], expected, _peak(setting, stored)))
        row = compare(contenders, setting.device, setting.effort, sets=inputs.sets, launch="replayed")
        yield {"section": "scores", "work": work, "flops": inputs.flops, **row}


def _peak(setting: Setting, run: Callable[[int], Any]) -> tuple[tuple[str, int | None], ...]:
    try:
        return (("peak_bytes", peak_bytes(lambda: run(0), setting.device)),)
    except Exception:
        return ()  # `compare` says why


def _materialised(inputs: Inputs, index: int) -> tuple[Tensor, Tensor]:
    """What transformers computes when it is asked for attention weights, and their sum over heads and queries."""
    query, key, value = inputs.padded[index]
    scores = (query @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    probabilities = scores.softmax(-1, dtype=torch.float32).to(query.dtype)
    return probabilities @ value, probabilities.sum((1, 2), dtype=torch.float32).flatten()


def dropping(setting: Setting) -> Rows:
    """A layer's attention that keeps a part of its tokens: two ways, and which of them wins."""
    for work, lengths in setting.works.items():
        inputs = Inputs(setting, lengths)
        for score in DROPPED_BY:
            for fraction in _FRACTIONS:
                target = setting.packing([math.ceil(fraction * length) for length in lengths])
                contenders = [
                    Contender(GATHERED, functools.partial(_all_then_gather, inputs, score, target)),
                    Contender(SCORED_FIRST, functools.partial(_scores_first, inputs, score, target)),
                ]
                row = compare(contenders, setting.device, setting.effort, sets=inputs.sets, launch="replayed")
                yield {"section": "drops", "work": work, "scorer": score, "kept": fraction, **row, **_winner(row)}


def _winner(row: Row) -> Row:
    ms = {result["provider"]: result["ms"] for result in row["results"]}
    return {"winner": min(ms, key=lambda name: ms[name])} if len(ms) == 2 else {}


def _all_then_gather(inputs: Inputs, score: AttentionScore, target: Packing, index: int) -> Tensor:
    context, significance = inputs.attend_and_score(score, index)
    return context.index_select(0, _select(inputs, significance, target).rows)


def _scores_first(inputs: Inputs, score: AttentionScore, target: Packing, index: int) -> Tensor:
    return inputs.attend(index, _select(inputs, inputs.score(score, index), target))


def _select(inputs: Inputs, significance: Tensor, target: Packing) -> Kept:
    return inputs.setting.backend.select(significance, inputs.packing, target)
