"""Attention whose probabilities are powers of two: its results are exact in any order of summation."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

# A miss scores 2 * _SCALE below a match at least: 260 powers of two after the softmax's own factor.
_SCALE = 1024
_OFFSETS = 4  # dimensions that make room for the offset in float16
EXACT_SCORES = ["received", "received_off_diagonal", "received_max", "cls", "from_question"]


class Exact(NamedTuple):
    """Attention whose probabilities are powers of two: ``qkv``, and exact context and probabilities of a sequence."""

    qkv: Tensor  # [n, 3, N, D]
    context: Tensor  # [n, N, D], float64
    probabilities: Tensor  # [N, n, n], float64


def exact_sequence(length: int, heads: int, head_size: int, generator: torch.Generator) -> Exact:
    """Keys fall into groups of 1, 2, 4 ... tokens with one code each; each query matches the keys of one group.

    Codes are rows of signs, and the last dimensions move the score of a match to 0. Every other score is so low that
    its probability is 0 in float32, so a match has probability 1 / (size of the group), and the context is the mean
    of integers over a group.
    """
    device = generator.device
    sizes = [2**bit for bit in range(length.bit_length()) if length >> bit & 1]
    sizes = [part for size in sizes for part in ([size] if size <= 32 else [32] * (size // 32))]
    group_of_token = torch.repeat_interleave(
        torch.arange(len(sizes), device=device), torch.tensor(sizes, device=device)
    )
    # The group's number in binary makes codes distinct.
    codes = torch.randint(0, 2, (heads, len(sizes), head_size - _OFFSETS), generator=generator, device=device) * 2 - 1
    bits = torch.arange(len(sizes), device=device)[:, None] >> torch.arange(10, device=device) & 1
    codes[..., :10] = 2 * bits - 1

    def shuffled() -> Tensor:
        return torch.stack(
            [group_of_token[torch.randperm(length, generator=generator, device=device)] for _ in range(heads)]
        )

    key_group, query_group = shuffled(), shuffled()  # [N, n]
    offset = torch.ones(heads, length, _OFFSETS, dtype=torch.float64, device=device)
    query = torch.cat([_rows(codes, query_group), -codes.shape[-1] / _OFFSETS * offset], -1) * _SCALE
    key = torch.cat([_rows(codes, key_group), offset], -1)
    value = torch.randint(-8, 9, key.shape, generator=generator, device=device).double()
    matches = (query_group[:, :, None] == key_group[:, None, :]).double()
    probabilities = matches / matches.sum(-1, keepdim=True)
    qkv = torch.stack([part.transpose(0, 1) for part in (query, key, value)], 1)
    return Exact(qkv, (probabilities @ value).transpose(0, 1), probabilities)


def _rows(codes: Tensor, groups: Tensor) -> Tensor:
    return codes.double().gather(1, groups[..., None].expand(-1, -1, codes.shape[-1]))


def exact_score(kind: str, probabilities: Tensor, question: int) -> Tensor:
    """By the definitions: float64 ``[n]`` from ``[N, n, n]``; the first ``question`` tokens are segment 0."""
    if kind == "received_off_diagonal":
        return probabilities.sum((0, 1)) - probabilities.diagonal(dim1=1, dim2=2).sum(0)
    if kind == "received_max":
        return probabilities.amax((0, 1))
    queries = {"received": slice(None), "cls": slice(1), "from_question": slice(question)}[kind]
    return probabilities[:, queries].sum((0, 1))


def question_of(length: int) -> int:
    return math.ceil(length / 3)
