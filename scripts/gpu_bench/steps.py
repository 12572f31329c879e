"""The other steps alone: each kernel against the separate passes that it replaces."""

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels import Backend, TokenIds
from dtbert.kernels.parameters import Embeddings, of_tensors
from gpu_bench.attention import OWN
from gpu_bench.setting import Rows, Setting, linear_of, norm_of
from gpu_bench.timing import Contender, compare

SEPARATE, PRODUCT, ONE_KERNEL = "separate passes", "the product alone", "one kernel"
_EPS = 1e-12
_KEPT = 0.7


def steps(setting: Setting) -> Rows:
    """One row a step and number of tokens, with the FLOPs of its product or the fewest bytes it can move."""
    for tokens in setting.sizes.step_tokens:
        for name, step in _STEPS.items():
            contenders, sets, amount = step(setting, tokens)
            row = compare(contenders, setting.device, setting.effort, sets=sets, launch="replayed")
            yield {"section": "steps", "work": f"{name}, {tokens} tokens", **amount, **row}


Prepared = tuple[list[Contender], int, dict[str, int]]


def _fused_linear(setting: Setting, tokens: int) -> Prepared:
    hidden, wide = setting.sizes.hidden_size, setting.sizes.feed_forward
    sets = setting.sets(tokens * (hidden + wide) * setting.dtype.itemsize)
    x = [setting.randn(tokens, hidden, seed=seed) for seed in range(sets)]
    weight, bias = setting.randn(wide, hidden) / hidden**0.5, setting.randn(wide)
    fused = setting.launchers.fused_linear
    expected = Backend().linear(x[0].float(), linear_of(weight.float(), bias.float()), "gelu")
    product = F.linear(x[0].float(), weight.float(), bias.float())
    contenders = [
        Contender(ONE_KERNEL, lambda i: fused(x[i], weight, bias, "gelu"), expected=expected),
        Contender(
            SEPARATE,
            lambda i: torch.ops.aten.gelu_(F.linear(x[i], weight, bias), approximate="none"),
            expected=expected,
        ),
        Contender(PRODUCT, lambda i: F.linear(x[i], weight, bias), expected=product),
    ]
    return contenders, sets, {"flops": 2 * tokens * hidden * wide}


def _add_norm(setting: Setting, tokens: int) -> Prepared:
    hidden, kept = setting.sizes.hidden_size, math.ceil(_KEPT * tokens)
    row_bytes = hidden * setting.dtype.itemsize
    sets = setting.sets((tokens + kept) * row_bytes)
    generator = torch.Generator().manual_seed(0)
    keep = torch.randperm(tokens, generator=generator)[:kept].sort().values.to(setting.device)
    product = [setting.randn(kept, hidden, seed=seed) for seed in range(sets)]
    residual = [setting.randn(tokens, hidden, seed=seed + sets) for seed in range(sets)]
    bias, weight, shift = (setting.randn(hidden, seed=seed) for seed in range(3))

    def separate(index: int) -> Tensor:
        summed = product[index] + bias + residual[index].index_select(0, keep)
        return F.layer_norm(summed, weight.shape, weight, shift, _EPS)

    summed = product[0].float() + bias.float() + residual[0][keep].float()
    expected = F.layer_norm(summed, weight.shape, weight.float(), shift.float(), _EPS)
    fused = setting.launchers.add_norm
    contenders = [
        Contender(OWN, lambda i: fused(product[i], bias, residual[i], weight, shift, _EPS, keep), expected=expected),
        Contender(SEPARATE, separate, expected=expected),
    ]
    return contenders, sets, {"bytes": 3 * kept * row_bytes + 8 * kept}


def _embed(setting: Setting, tokens: int) -> Prepared:
    hidden = setting.sizes.hidden_size
    row_bytes = hidden * setting.dtype.itemsize
    sets = setting.sets(2 * tokens * row_bytes)
    generator = torch.Generator().manual_seed(0)
    rows = (30522, 2, 512)  # words, segments, positions
    tables = [setting.randn(count, hidden, seed=count) for count in rows]
    ids = [
        TokenIds(*(torch.randint(0, count, (tokens,), generator=generator).to(setting.device) for count in rows))
        for _ in range(sets)
    ]
    weight, bias = setting.randn(hidden, seed=1), setting.randn(hidden, seed=2)

    def embeddings(tensors: Sequence[Tensor]) -> Embeddings:
        word, token_type, position, weight, bias = tensors
        norm = norm_of(weight, bias, _EPS)
        return of_tensors(Embeddings, word=word, token_type=token_type, position=position, norm=norm)

    values = [*tables, weight, bias]
    own, exact = embeddings(values), embeddings([tensor.float() for tensor in values])
    reference = Backend()
    expected = reference.embed(ids[0], exact)
    contenders = [
        Contender(OWN, lambda i: setting.backend.embed(ids[i], own), expected=expected),
        Contender(SEPARATE, lambda i: reference.embed(ids[i], own), expected=expected),
    ]
    return contenders, sets, {"bytes": 2 * tokens * row_bytes + 24 * tokens}


def _select(setting: Setting, tokens: int) -> Prepared:
    length = setting.sizes.equal[1]
    sequences = max(1, tokens // length)
    kept = math.ceil(_KEPT * length)
    now, target = setting.packing([length] * sequences), setting.packing([kept] * sequences)
    generator = torch.Generator(setting.device).manual_seed(0)
    scores = [torch.rand(now.num_tokens, device=setting.device, generator=generator) for _ in range(4)]
    begins = now.cu_seqlens[:-1, None].long()

    def separate(index: int) -> Tensor:
        rows = scores[index].view(sequences, length).topk(kept, sorted=False).indices
        return (rows.sort().values + begins).flatten()

    contenders = [
        Contender(OWN, lambda i: setting.backend.select(scores[i], now, target).rows, expected=separate(0)),
        Contender("topk and sort, equal lengths alone", separate, expected=separate(0)),
    ]
    return contenders, len(scores), {"bytes": 4 * now.num_tokens + 8 * target.num_tokens}


def _scatter(setting: Setting, tokens: int) -> Prepared:
    hidden, kept = setting.sizes.hidden_size, math.ceil(_KEPT * tokens)
    row_bytes = hidden * setting.dtype.itemsize
    sets = setting.sets((tokens + kept) * row_bytes)
    keep = torch.randperm(tokens, generator=torch.Generator().manual_seed(0))[:kept].sort().values.to(setting.device)
    states = [setting.randn(tokens, hidden, seed=seed) for seed in range(sets)]
    restored = [setting.randn(kept, hidden, seed=seed + sets) for seed in range(sets)]
    expected = states[0].index_copy(0, keep, restored[0])
    contenders = [
        Contender("a copy, then the rows", lambda i: states[i].index_copy(0, keep, restored[i]), expected=expected),
        # In place: it comes last, so that the others meet fresh states.
        Contender(OWN, lambda i: setting.backend.scatter(states[i], keep, restored[i]), expected=expected),
    ]
    return contenders, sets, {"bytes": 2 * kept * row_bytes + 8 * kept}


_STEPS: dict[str, Callable[[Setting, int], Prepared]] = {
    "fused_linear": _fused_linear,
    "add_norm": _add_norm,
    "embed": _embed,
    "select": _select,
    "scatter": _scatter,
}
