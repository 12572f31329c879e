"""One layer, and the books of what the layers drop."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dtbert.kernels import Backend, Packing
from dtbert.kernels.parameters import LayerNorm, Linear
from dtbert.model.batch import PackedBatch
from dtbert.model.config import BertConfig
from dtbert.model.schedule import LengthSchedule
from dtbert.model.scorers import LayerView, SpanHead, Text, scorer_named

_Parts = tuple[Linear, Linear, LayerNorm, Linear, Linear, LayerNorm]


class Layer(nn.Module):
    """Attention and feed-forward over packed tokens; where a layer drops, both outputs are of the kept tokens."""

    def __init__(self, config: BertConfig, index: int) -> None:
        super().__init__()
        hidden_size, wide, eps = config.hidden_size, config.intermediate_size, config.layer_norm_eps
        self.index, self.num_heads, self.activation = index, config.num_attention_heads, config.activation
        self.qkv = Linear(hidden_size, 3 * hidden_size, "qkv", index)
        self.attention_output = Linear(hidden_size, hidden_size, "attention_output", index)
        self.attention_norm = LayerNorm(hidden_size, eps)
        self.intermediate = Linear(hidden_size, wide, "intermediate", index)
        self.output = Linear(wide, hidden_size, "output", index)
        self.output_norm = LayerNorm(hidden_size, eps)

    def forward(self, states: Tensor, tokens: "TokensLeft", backend: Backend) -> Tensor:
        """States ``[T, H]`` of the tokens that are left to those ``[K, H]`` of the tokens that the layer keeps."""
        # One look at the modules, in the order in which they were made: each by its name would cost a microsecond.
        parts = cast(_Parts, self._modules.values())
        qkv_layer, attention_output, attention_norm, intermediate, output, output_norm = parts
        qkv = backend.linear(states, qkv_layer)
        if tokens.drops_at(self.index):
            context, rows = tokens.drop(self, states, qkv)
        else:
            context, rows = backend.attention(qkv, tokens.packing, self.num_heads), None
        states = backend.add_norm(context, attention_output, states, attention_norm, rows)
        wide = backend.linear(states, intermediate, self.activation)
        return backend.add_norm(wide, output, states, output_norm)


class TokensLeft:
    """Which tokens of a batch are left, layer by layer, and the final states of those that are not.

    Args:
        batch: as it enters the first layer.
        schedule: how many each layer keeps; None: all.
        num_layers: of the model.
        backend: scores, selects and scatters.
        span_head: for scorers that read it; None where there is none.
        spare_inputs: leave the states that enter a layer as they are: somebody else reads them.
        targets: the packing that leaves each layer; of the schedule and the batch's lengths by default.

    Attributes:
        packing: of the tokens that are left.
        rows: int64 ``[K]``, where these stand among the batch's; None while all are left.
    """

    def __init__(
        self,
        batch: PackedBatch,
        schedule: LengthSchedule | None,
        num_layers: int,
        backend: Backend,
        span_head: SpanHead | None = None,
        spare_inputs: bool = False,
        targets: Sequence[Packing] | None = None,
    ) -> None:
        self.packing = batch.packing
        self.rows: Tensor | None = None
        self._schedule, self._backend, self._span_head = schedule, backend, span_head
        self._spare_inputs = spare_inputs
        self._final: Tensor | None = None
        if schedule is not None:
            schedule.check_layers(num_layers)
            self._text = Text(batch)
            if targets is None:
                packing = batch.packing
                targets = Packing.stack(schedule.kept(packing.seqlens), packing.cu_seqlens.device)
            self._targets = targets
            self._scorers = [scorer_named(name) for name in schedule.scorers]
            if span_head is None and any(scorer.needs_span_head for scorer in self._scorers):
                raise ValueError(f"a scorer of {schedule.scorers} reads the span head: a bare encoder has none")

    def drops_at(self, layer: int) -> bool:
        """Whether some of the tokens that are left do not leave this layer."""
        return self._schedule is not None and self._targets[layer].seqlens != self.packing.seqlens

    def drop(self, layer: Layer, states: Tensor, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the tokens that a layer keeps: their context ``[K, H]``, and their rows among those that entered it.

        From here on the others' states are final: those that entered the layer.
        """
        backend, packing = self._backend, self.packing
        scorer, target = self._scorers[layer.index], self._targets[layer.index]
        view = LayerView(
            layer.index, states, qkv, packing, layer.num_heads, self._text, self.rows, backend, self._span_head
        )
        if scorer.with_context and scorer.attention is not None:
            context, significance = backend.scored_attention(qkv, packing, layer.num_heads, scorer.attention)
            kept = backend.select(self._protect(significance, view), packing, target)
            context = context.index_select(0, kept.rows)
        else:
            kept = backend.select(self._protect(scorer.function(view), view), packing, target)
            # The choice did not need every query's attention: compute the kept ones alone.
            context = backend.attention(qkv, packing, layer.num_heads, kept)
        if self._final is None or self.rows is None:
            self._final, self.rows = states.clone() if self._spare_inputs else states, kept.rows
        else:
            self._final = backend.scatter(self._final, self.rows, states)
            self.rows = self.rows.index_select(0, kept.rows)
        self.packing = target
        return context, kept.rows

    def restore(self, states: Tensor) -> Tensor:
        """The final states of all tokens, ``[T, H]``, from those of the tokens that are left."""
        if self._final is None or self.rows is None:
            return states
        return self._backend.scatter(self._final, self.rows, states)

    def _protect(self, significance: Tensor, view: LayerView) -> Tensor:
        assert self._schedule is not None
        if self._schedule.keep_question:
            significance = significance.masked_fill(view.token_type_ids == 0, torch.inf)
        if self._schedule.keep_cls:
            significance = significance.index_fill(0, self.packing.cu_seqlens[:-1].long(), torch.inf)
        return significance
