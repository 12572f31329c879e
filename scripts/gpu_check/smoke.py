"""Each kernel against float64, on integers whose results are exact, and a digest of the bits that it wrote.

    python -m gpu_check.smoke --records FILE [--ptxas PATH]

A job is one kernel in one dtype. With ``--ptxas`` the kernels are assembled by that ptxas: `summary` compares the bits.
"""

import argparse
import hashlib
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_bench.setting import linear_of, norm_of
from gpu_bench.timing import relative_error
from torch import Tensor

from dtbert.kernels import ATTENTION_SCORES, AttentionScore, Backend, Kept, Packing, TokenIds
from dtbert.kernels.float8 import ScaledRows, rows_product
from dtbert.kernels.float8 import scale_rows as plain_rows
from dtbert.kernels.parameters import Embeddings, of_tensors
from dtbert.model.scorers import scorer_named
from gpu_check import records
from gpu_check.pool import NO_TIME, Answer, Job, answer_jobs, run_jobs
from gpu_check.turn import add_part_arguments, wait_for_turn, worker_command

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# |out - float64| / |float64|: a few roundings to the dtype. Scores are float32 whatever the dtype.
_BOUND = {"bf16": 1e-2, "fp16": 2e-3, "fp32": 1e-5}
_SCORE_BOUND = 1e-5
_EPS = 1e-12
_WORKERS, _JOB_S = 6, 40.0


class Size(NamedTuple):
    """``tokens`` and ``width`` of the steps row by row; ``wide`` is the feed-forward's width."""

    heads: int
    head_size: int
    lengths: tuple[int, ...]
    wide: int

    @property
    def width(self) -> int:
        return self.heads * self.head_size

    @property
    def tokens(self) -> int:
        return sum(self.lengths)


FULL = Size(12, 64, (1, 63, 0, 127, 128, 200, 384, 512), 3072)
TINY = Size(2, 16, (1, 9, 0, 20), 48)


class Inputs:
    """Fresh tensors of one dtype, the same in every process."""

    def __init__(self, dtype: torch.dtype, size: Size, device: torch.device) -> None:
        from dtbert.kernels.triton import Triton

        self.dtype, self.size, self.device, self.backend = dtype, size, device, Triton()
        self._generator = torch.Generator().manual_seed(0)
        self.packing = self.packed(size.lengths)
        self.target = self.packed([-(-2 * length // 5) for length in size.lengths])
        begins = [0, *accumulate(size.lengths)]
        rows = [
            torch.randperm(length, generator=self._generator)[:count].sort().values + begin
            for begin, length, count in zip(begins, size.lengths, self.target.seqlens, strict=False)
        ]
        self.rows = torch.cat(rows).to(device)

    def packed(self, lengths: Sequence[int]) -> Packing:
        return Packing.stack([list(lengths)], self.device)[0]

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.device, self.dtype)

    def integers(self, *shape: int) -> Tensor:
        return torch.randint(-3, 4, shape, generator=self._generator).to(self.device, self.dtype)

    def ids(self, below: int) -> Tensor:
        return torch.randint(0, below, (self.size.tokens,), generator=self._generator).to(self.device)

    @property
    def segments(self) -> Tensor:
        """The first third of each sequence is the question."""
        ids = [int(3 * place >= length) for length in self.size.lengths for place in range(length)]
        return torch.tensor(ids, dtype=torch.int64, device=self.device)


# What a check yields: the name of an output, the output, the right one, and the bound of its error; 0 is the same bits.
Checks = Iterator[tuple[str, Tensor, Tensor, float]]


def _attention(inputs: Inputs, bound: float, score: AttentionScore | None = None) -> Checks:
    size, packing, backend = inputs.size, inputs.packing, inputs.backend
    qkv = inputs.randn(size.tokens, 3 * size.width)
    exact = qkv.double()
    context = Backend().attention(exact, packing, size.heads)
    if score is None:
        yield "context", backend.attention(qkv, packing, size.heads), context, bound
        kept = Kept(inputs.rows, inputs.target)
        yield "kept queries", backend.attention(qkv, packing, size.heads, kept), context[inputs.rows], bound
        return
    segments = inputs.segments
    want = Backend().significance(exact, packing, size.heads, score, segments)
    if scorer_named(score).with_context:
        got, significance = backend.scored_attention(qkv, packing, size.heads, score)
        yield f"context beside {score}", got, context, bound
        yield f"{score} beside the context", significance, want, _SCORE_BOUND
    yield f"{score} alone", backend.significance(qkv, packing, size.heads, score, segments), want, _SCORE_BOUND


def _exact_attention(inputs: Inputs, _: float) -> Checks:
    from tests.gpu.exact import EXACT_SCORES, exact_score, exact_sequence, question_of

    size = inputs.size
    # Codes that tell the groups of long sequences apart take heads of 32 at least.
    heads, head_size = size.heads, max(32, size.head_size)
    lengths = [length for length in size.lengths if length]
    generator = torch.Generator(inputs.device).manual_seed(0)
    sequences = [exact_sequence(length, heads, head_size, generator) for length in lengths]
    qkv = torch.cat([sequence.qkv.flatten(1) for sequence in sequences]).to(inputs.dtype)
    context = torch.cat([sequence.context.flatten(1) for sequence in sequences]).to(inputs.dtype)
    packing = inputs.packed(lengths)
    yield "context", inputs.backend.attention(qkv, packing, heads), context, 0
    segments = torch.cat([torch.arange(length) >= question_of(length) for length in lengths]).long().to(inputs.device)
    for score in EXACT_SCORES:
        got = inputs.backend.significance(qkv, packing, heads, score, segments)  # type: ignore[arg-type]
        want = torch.cat([exact_score(score, s.probabilities, question_of(len(s.qkv))) for s in sequences])
        # 2^x and log2 are the hardware's approximations; a wrong operand is off by far more.
        yield score, got, want, 1e-6


def _embed(inputs: Inputs, bound: float) -> Checks:
    width, rows = inputs.size.width, (3000, 2, 512)
    values = [*(inputs.randn(count, width) for count in rows), inputs.randn(width), inputs.randn(width)]
    ids = TokenIds(*(inputs.ids(count) for count in rows))

    def embeddings(dtype: torch.dtype) -> Embeddings:
        word, token_type, position, weight, bias = (value.to(dtype) for value in values)
        norm = norm_of(weight, bias, _EPS)
        return of_tensors(Embeddings, word=word, token_type=token_type, position=position, norm=norm)

    got = inputs.backend.embed(ids, embeddings(inputs.dtype))
    yield "embed", got, Backend().embed(ids, embeddings(torch.float64)), bound


def _linear(inputs: Inputs, bound: float) -> Checks:
    from dtbert.kernels.triton.linear import fused_linear

    size = inputs.size
    x, bias = inputs.randn(size.tokens, size.width), inputs.randn(size.wide)
    weight = (inputs.randn(size.wide, size.width) / size.width**0.5).to(inputs.dtype)
    want = Backend().linear(x.double(), linear_of(weight.double(), bias.double()), "gelu")
    yield "linear", inputs.backend.linear(x, linear_of(weight, bias), "gelu"), want, bound
    yield "fused_linear", fused_linear(x, weight, bias, "gelu"), want, bound
    x, weight, bias = (inputs.integers(*tensor.shape) for tensor in (x, weight, bias))
    want = (x.double() @ weight.double().T + bias.double()).relu().to(inputs.dtype)
    yield "fused_linear of integers", fused_linear(x, weight, bias, "relu"), want, 0


def _add_norm(inputs: Inputs, bound: float) -> Checks:
    size, rows = inputs.size, inputs.rows
    x, residual = inputs.randn(size.tokens, size.wide), inputs.randn(size.tokens, size.width)
    weights = [(inputs.randn(size.width, size.wide) / size.wide**0.5).to(inputs.dtype), inputs.randn(size.width)]
    norms = [inputs.randn(size.width), inputs.randn(size.width)]

    def add_norm(backend: Backend, dtype: torch.dtype, chosen: Tensor | None) -> Tensor:
        linear = linear_of(*(tensor.to(dtype) for tensor in weights))
        weight, bias = (tensor.to(dtype) for tensor in norms)
        given = x if chosen is None else x[chosen]
        return backend.add_norm(given.to(dtype), linear, residual.to(dtype), norm_of(weight, bias, _EPS), chosen)

    for name, chosen in (("all rows", None), ("kept rows", rows)):
        got, want = add_norm(inputs.backend, inputs.dtype, chosen), add_norm(Backend(), torch.float64, chosen)
        yield f"add_norm of {name}", got, want, bound


def _select_and_scatter(inputs: Inputs, _: float) -> Checks:
    size = inputs.size
    # Few values, so that many tie.
    scores = inputs.randn(size.tokens).float().round(decimals=1)
    got = inputs.backend.select(scores, inputs.packing, inputs.target).rows
    yield "select", got, Backend().select(scores, inputs.packing, inputs.target).rows, 0
    final, states = inputs.randn(size.tokens, size.width), inputs.randn(len(inputs.rows), size.width)
    want = final.index_copy(0, inputs.rows, states)
    yield "scatter", inputs.backend.scatter(final.clone(), inputs.rows, states), want, 0


def _float8(inputs: Inputs, bound: float) -> Checks:
    """Nothing where the device has no products in fp8."""
    from dtbert.kernels.triton import why_not_float8
    from dtbert.kernels.triton.float8 import rows_of, scale_rows, scaled_linear

    if why_not_float8(inputs.device) is not None:
        return
    size = inputs.size
    x, wide = inputs.randn(size.tokens, size.width), inputs.randn(size.tokens, size.wide)
    for name, given in (("rows", x), ("wide rows", wide)):
        rows, want = ScaledRows(*scale_rows(given, "")), plain_rows(given)
        yield name, rows.values.float(), want.values.float(), 0
        yield f"scale of {name}", rows.scale, want.scale, 0
    activated = ScaledRows(*scale_rows(wide, "gelu"))
    meant = activated.values.double() * activated.scale.double()
    yield "activated rows", meant, F.gelu(wide.double()), 4e-2
    layer = linear_of(inputs.randn(size.wide, size.width), inputs.randn(size.wide).to(torch.bfloat16))
    weight = plain_rows(layer.weight)
    layer.hold_scaled(weight.values, weight.scale.squeeze(1))
    product = rows_product(rows_of(x), layer.weight, weight.scale.squeeze(1)) + layer.bias
    yield "product", scaled_linear(rows_of(x), layer, layer.bias), product, 1e-2


def _scored(score: AttentionScore) -> Callable[[Inputs, float], Checks]:
    return lambda inputs, bound: _attention(inputs, bound, score)


KERNELS: dict[str, Callable[[Inputs, float], Checks]] = {
    "attention": _attention,
    **{f"attention, {score}": _scored(score) for score in ATTENTION_SCORES},
    "attention of integers": _exact_attention,
    "embed": _embed,
    "linear": _linear,
    "add_norm": _add_norm,
    "select and scatter": _select_and_scatter,
    "float8": _float8,
}


def jobs(tiny: bool) -> list[Job]:
    """Every kernel in every dtype, the commonest first."""
    dtypes = ("bf16",) if tiny else tuple(DTYPES)
    return [{"kernel": kernel, "dtype": dtype} for dtype in dtypes for kernel in KERNELS]


def check(job: Job, size: Size, device: torch.device) -> Answer:
    """``error`` says what is wrong, and is empty where nothing is; ``digest`` is of the bits of all outputs."""
    inputs = Inputs(DTYPES[job["dtype"]], size, device)
    digest, wrong, worst = hashlib.sha256(), [], 0.0
    for name, got, want, bound in KERNELS[job["kernel"]](inputs, _BOUND[job["dtype"]]):
        again = "" if got.shape == want.shape else f"shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        if not again and bound:
            error = relative_error(got, want)
            worst = max(worst, error)
            again = "" if error <= bound else f"off by {error:.1e} of its norm, {bound:.0e} allowed"
        elif not again and not torch.equal(got, want):
            again = f"{int((got != want).sum())} of {got.numel()} values are not exact"
        if again:
            wrong.append(f"{name}: {again}")
        digest.update(got.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return {"error": "; ".join(wrong), "relative_error": worst, "digest": digest.hexdigest()[:16]}


def main() -> None:
    options = arguments()
    device, size = torch.device(options.device), TINY if options.tiny else FULL
    if options.worker:
        with torch.inference_mode():
            answer_jobs(lambda job: check(job, size, device))
        return
    deadline = wait_for_turn(options.await_turn)
    wrong = []

    def done(job: Job, answer: Answer) -> None:
        records.append(
            options.records, "smoke", {**job, "ptxas": "machine's" if options.ptxas else "Triton's", **answer}
        )
        if answer["error"] not in ("", NO_TIME):
            wrong.append(job)
            print(f"{job['kernel']}, {job['dtype']}: {answer['error']}", flush=True)

    # A cache of its own: nothing that another ptxas assembled is taken from it.
    with tempfile.TemporaryDirectory() as cache:
        environment = {"TRITON_PTXAS_PATH": str(options.ptxas), "TRITON_CACHE_DIR": cache} if options.ptxas else {}
        run_jobs(
            jobs(options.tiny),
            worker_command("gpu_check.smoke", options),
            done,
            workers=2 if options.tiny else _WORKERS,
            job_s=_JOB_S,
            deadline=deadline,
            environment=environment,
        )
    raise SystemExit(1 if wrong else 0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_part_arguments(parser)
    parser.add_argument("--ptxas", type=Path, help="assemble by this one instead of Triton's")
    return parser.parse_args()


if __name__ == "__main__":
    main()
