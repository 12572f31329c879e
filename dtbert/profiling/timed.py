"""A backend that tells a watch of each step: which it is, in which layer, and how much work it is.

It stands in for the model's own backend, which it calls, so the encoder is profiled as it is.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dtbert.kernels import Activation, AttentionScore
from dtbert.model import BertForQuestionAnswering, LengthSchedule, PackedBatch, SpanLogits
from dtbert.profiling import steps
from dtbert.profiling.steps import Work

# In the order in which a forward runs them; "other" is the time between steps: checks, index lists, gathers.
StepName = Literal[
    "embeddings",
    "qkv",
    "attention",
    "significance",
    "selection",
    "attention_output",
    "intermediate",
    "output",
    "restore",
    "span_head",
    "other",
]


class Watch(Protocol):
    """Is told when a layer or a step begins and ends. ``work`` may wait for the device: call it after the forward."""

    def layer(self, index: int) -> AbstractContextManager[None]: ...

    def step(self, layer: int | None, name: StepName, work: Callable[[], Work]) -> AbstractContextManager[None]: ...


class TimedBackend:
    """The `Backend` of a model with a watch around each step.

    Use it within `watching`, which tells it the layer. A restore counts for the layer that dropped the tokens.
    """

    def __init__(self, model: BertForQuestionAnswering, watch: Watch) -> None:
        self._backend, self._watch = model.backend, watch
        self._layer: int | None = None
        self._dropping: list[int | None] = []  # layers whose tokens are still to be restored
        self._names: dict[int, StepName] = {id(model.span.weight): "span_head"}
        for layer in model.encoder.layers:
            for name in ("qkv", "attention_output", "intermediate", "output"):
                self._names[id(layer.get_submodule(name).weight)] = name

    @contextmanager
    def watching(self, layers: nn.ModuleList) -> Iterator[None]:
        """Follow the layers while they run, one after another."""
        running: list[AbstractContextManager[None]] = []

        def enter(module: nn.Module, _: Any) -> None:
            self._layer = indices[module]
            running.append(self._watch.layer(indices[module]))
            running[-1].__enter__()

        def leave(*_: Any) -> None:
            running.pop().__exit__(None, None, None)
            self._layer = None

        indices = {layer: index for index, layer in enumerate(layers)}
        hooks = [layer.register_forward_pre_hook(enter) for layer in layers]
        hooks += [layer.register_forward_hook(leave) for layer in layers]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def embed_layer_norm(
        self,
        input_ids: Tensor,
        position_ids: Tensor,
        token_type_ids: Tensor,
        word: Tensor,
        position: Tensor,
        token_type: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
    ) -> Tensor:
        rows = len(word), len(position), len(token_type)
        work = steps.embed_layer_norm(len(input_ids), word.shape[1], rows, word.element_size())
        with self._watch.step(None, "embeddings", lambda: work):
            return self._backend.embed_layer_norm(
                input_ids, position_ids, token_type_ids, word, position, token_type, norm_weight, norm_bias, eps
            )

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        with self._product(x, weight):
            return self._backend.linear(x, weight, bias)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None, activation: Activation = "gelu") -> Tensor:
        with self._product(x, weight):
            return self._backend.linear_gelu(x, weight, bias, activation)

    def linear_add_layer_norm(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor,
        norm_weight: Tensor,
        norm_bias: Tensor,
        eps: float,
        keep_indices: Tensor | None = None,
    ) -> Tensor:
        out_features, in_features = weight.shape
        work = steps.linear_add_layer_norm(
            len(x), in_features, out_features, x.element_size(), gathered=keep_indices is not None
        )
        with self._watch.step(self._layer, self._names[id(weight)], lambda: work):
            return self._backend.linear_add_layer_norm(
                x, weight, bias, residual, norm_weight, norm_bias, eps, keep_indices
            )

    def attention(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        *,
        significance: AttentionScore | None = None,
        token_type_ids: Tensor | None = None,
        query_indices: Tensor | None = None,
        cu_seqlens_q: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        hidden_size, value_bytes, gathered = qkv.shape[1] // 3, qkv.element_size(), query_indices is not None

        def work() -> Work:
            seqlens = cu_seqlens.diff().tolist()
            queries = seqlens if cu_seqlens_q is None else cu_seqlens_q.diff().tolist()
            return steps.attention(
                queries, seqlens, hidden_size, value_bytes, significance=significance, gathered=gathered
            )

        with self._watch.step(self._layer, "attention", work):
            return self._backend.attention(
                qkv,
                cu_seqlens,
                max_seqlen,
                num_heads,
                significance=significance,
                token_type_ids=token_type_ids,
                query_indices=query_indices,
                cu_seqlens_q=cu_seqlens_q,
            )

    def attention_significance(
        self,
        qkv: Tensor,
        cu_seqlens: Tensor,
        max_seqlen: int,
        num_heads: int,
        kind: AttentionScore,
        token_type_ids: Tensor | None = None,
    ) -> Tensor:
        hidden_size, value_bytes = qkv.shape[1] // 3, qkv.element_size()

        def work() -> Work:
            seqlens = queries = cu_seqlens.diff().tolist()
            if kind == "cls":
                queries = [min(1, length) for length in seqlens]
            elif kind == "from_question" and token_type_ids is not None:
                queries = [int((segment == 0).sum()) for segment in token_type_ids.split(seqlens)]
            return steps.attention_significance(queries, seqlens, hidden_size, value_bytes, kind)

        with self._watch.step(self._layer, "significance", work):
            return self._backend.attention_significance(qkv, cu_seqlens, max_seqlen, num_heads, kind, token_type_ids)

    def select_tokens(
        self, significance: Tensor, cu_seqlens: Tensor, next_cu_seqlens: Tensor, num_kept: int, max_seqlen: int
    ) -> Tensor:
        self._dropping.append(self._layer)
        work = steps.select_tokens(len(significance), num_kept)
        with self._watch.step(self._layer, "selection", lambda: work):
            return self._backend.select_tokens(significance, cu_seqlens, next_cu_seqlens, num_kept, max_seqlen)

    def restore(self, states: Tensor, keep_indices: Tensor, kept_states: Tensor) -> Tensor:
        work = steps.restore(len(keep_indices), states.shape[1], states.element_size())
        with self._watch.step(self._dropping.pop(), "restore", lambda: work):
            return self._backend.restore(states, keep_indices, kept_states)

    def _product(self, x: Tensor, weight: Tensor) -> AbstractContextManager[None]:
        out_features, in_features = weight.shape
        work = steps.linear(len(x), in_features, out_features, x.element_size())
        return self._watch.step(self._layer, self._names[id(weight)], lambda: work)


def watched_forward(
    model: BertForQuestionAnswering, batch: PackedBatch, schedule: LengthSchedule | None, watch: Watch
) -> SpanLogits:
    """`BertForQuestionAnswering.forward_packed` under a watch; call it in inference mode."""
    backend = TimedBackend(model, watch)
    span_head = model.span_head(backend)
    with backend.watching(model.encoder.layers):
        encoding = model.encoder(batch, schedule, backend=backend, span_head=span_head)
    return SpanLogits(*span_head(encoding.states).unbind(1))


class Clock:
    """Marks moments: CUDA events on the current stream of a GPU, else the host's own clock.

    Between two events lies also the time in which the GPU waits for the host to launch the next kernel.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> Any:
        if self._device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to another, in seconds; waits until the device has passed the later one."""
        if self._device.type != "cuda":
            return float(end - begin)
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3


class Span(NamedTuple):
    """A step between two marks; ``name`` is None for a whole layer."""

    layer: int | None
    name: StepName | None
    work: Callable[[], Work]
    begin: Any
    end: Any


class Stopwatch:
    """A `Watch` that marks the begin and the end of each layer and step of one forward."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.spans: list[Span] = []

    @contextmanager
    def layer(self, index: int) -> Iterator[None]:
        begin = self._clock.mark()
        yield
        self.spans.append(Span(index, None, lambda: Work(0, 0), begin, self._clock.mark()))

    @contextmanager
    def step(self, layer: int | None, name: StepName, work: Callable[[], Work]) -> Iterator[None]:
        begin = self._clock.mark()
        yield
        self.spans.append(Span(layer, name, work, begin, self._clock.mark()))

    def seconds(self, span: Span) -> float:
        return self._clock.seconds(span.begin, span.end)
