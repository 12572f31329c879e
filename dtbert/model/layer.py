"""One layer, and the books of what the layers drop."""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from dtbert.kernels import Backend, Kept, Left, Packing, Partials
from dtbert.kernels.parameters import LayerNorm, Linear
from dtbert.model.batch import PackedBatch
from dtbert.model.config import BertConfig
from dtbert.model.policy import KnownTargets, Policy
from dtbert.model.scorers import EarlierScore, LayerView, SpanHead, Text, in_order, scorer_named

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
        if tokens.scores_at(self.index):
            context, rows = tokens.drop(self, states)
        else:
            qkv = backend.linear(states, qkv_layer)
            context, rows = backend.attention(qkv, tokens.left.packing, self.num_heads), None
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
        output_kept: hold what the tokens scored, too.
        restores: whether somebody reads the states of dropped tokens; if not, nothing of them is kept or moved.

    Attributes:
        left: the tokens; where nothing is restored they are as good as a batch of their own.
        rows: where they stand in the batch, int64; None while all are left.
        significance: on request, of the layers that dropped, float32 ``[T]``: infinite where a token stays whatever its
            score, NaN where it had been dropped before.
    """

    def __init__(
        self,
        batch: PackedBatch,
        schedule: Policy | None,
        num_layers: int,
        backend: Backend,
        span_head: SpanHead | None = None,
        spare_inputs: bool = False,
        targets: Sequence[Packing] | None = None,
        output_kept: bool = False,
        restores: bool = True,
    ) -> None:
        self.left = Left(batch.packing)
        self.rows: Tensor | None = None
        self._restores = restores
        self.significance: dict[int, Tensor] | None = {} if output_kept else None
        self._schedule, self._backend, self._span_head = schedule, backend, span_head
        self._spare_inputs = spare_inputs
        if schedule is None:
            return
        schedule.check_layers(num_layers)
        self._keeps_question = schedule.keeps_question
        self._segments = batch.token_type_ids if any(self._keeps_question) else None
        self.left = Left(batch.packing, keep_first=schedule.keep_cls)
        self._text = Text(batch)
        self._scorers = [scorer_named(name) for name in schedule.scorers]
        if span_head is None and any(scorer.needs_span_head for scorer in self._scorers):
            raise ValueError(
                f"a scorer of {schedule.scorers} reads the span head: a bare encoder has none, name another scorer"
            )
        self._targets = schedule.targets(batch.packing) if targets is None else KnownTargets(batch.packing, targets)
        # What comes later reads these scores, so that all layers up to the last that drops have some.
        self._score_until = self._targets.last_drop if schedule.remembers else -1
        self._reads_scores = output_kept or schedule.remembers or not isinstance(self._targets, KnownTargets)
        self._accumulates, self._accumulated = schedule.accumulate, cast(Tensor | None, None)
        self._earlier: list[EarlierScore] | None = [] if any(one.remembers for one in self._scorers) else None

    def scores_at(self, layer: int) -> bool:
        """Whether this layer scores the tokens that are left, some of which may go."""
        if self._schedule is None:
            return False
        return layer <= self._score_until or self._targets.may_drop(layer, self.left.packing)

    def drop(self, layer: Layer, states: Tensor) -> tuple[Tensor, Tensor | None]:
        """Choose the tokens that a layer keeps: their context ``[K, H]``, and their rows among those that entered it.

        From here on the others' states are final: those that entered the layer. The rows are None where all stay.
        """
        backend, reads_queries = self._backend, self._scorers[layer.index].reads_queries
        qkv = (backend.linear if reads_queries else backend.keys_and_values)(states, layer.qkv)
        segments = self._segments if self._keeps_question[layer.index] else None
        left = self.left = self.left._replace(segments=segments)
        context, significance = self._score(layer, states, qkv)
        target = self._targets.target(layer.index, left, significance)
        if target.seqlens == left.packing.seqlens:
            return self._context(layer, states, qkv, left.packing) if context is None else context, None
        if left.final is None and self._spare_inputs:
            states = states.clone()
        self._hold(layer.index, significance, states)
        rows, self.left, kept_context = backend.drop(left, target, in_order(significance, states), states, context)
        if self._restores:
            self.rows = self.left.rows
        else:
            self._forget_others(rows)
        if self._accumulated is not None:
            self._accumulated = self._accumulated[rows]
        if kept_context is None:
            # The choice did not need every query's attention: compute the kept ones alone.
            kept_context = self._context(layer, states, qkv, left.packing, Kept(rows, target))
        return kept_context, rows

    def _context(self, layer: Layer, states: Tensor, qkv: Tensor, packing: Packing, kept: Kept | None = None) -> Tensor:
        if not self._scorers[layer.index].reads_queries:
            qkv = self._backend.queries(states, layer.qkv, qkv, None if kept is None else kept.rows)
        return self._backend.attention(qkv, packing, layer.num_heads, kept)

    def _forget_others(self, kept: Tensor) -> None:
        self.rows = kept if self.rows is None else self.rows.index_select(0, kept)
        if self._segments is not None:
            self._segments = self._segments.index_select(0, kept)
        self.left = self.left._replace(rows=None, final=None)

    def _score(self, layer: Layer, states: Tensor, qkv: Tensor) -> tuple[Tensor | None, Tensor | Partials]:
        """The context of all queries, where the scorer needs it, and the significance."""
        backend, left, scorer = self._backend, self.left, self._scorers[layer.index]
        context: Tensor | None = None
        significance: Tensor | Partials
        if scorer.with_context and scorer.attention is not None:
            # Parts are for the step that drops, and nobody else reads them.
            attention = backend.scored_attention if self._reads_scores else backend.partial_attention
            context, significance = attention(qkv, left.packing, layer.num_heads, scorer.attention)
        else:
            at_hand = layer.index, states, qkv, left.packing, layer.num_heads, self._text, self.rows
            significance = scorer.function(LayerView(*at_hand, backend, self._span_head, self._earlier))
        if isinstance(significance, Tensor) and self._reads_scores:
            if self._earlier is not None:
                self._earlier.append(EarlierScore(significance, self.rows))
            if self._accumulates:
                before = self._accumulated
                self._accumulated = significance = significance if before is None else before + significance
        return context, significance

    def _hold(self, layer: int, significance: Tensor | Partials, states: Tensor) -> None:
        if self.significance is None:
            return
        assert isinstance(significance, Tensor)
        held = self.left.above_all(significance.to(torch.promote_types(states.dtype, torch.float32)))
        if self.rows is not None:
            held = held.new_full((len(self._text.batch.input_ids),), torch.nan).index_copy(0, self.rows, held)
        self.significance[layer] = held

    def restore(self, states: Tensor) -> Tensor:
        """The final states of all tokens, ``[T, H]``, from those of the tokens that are left."""
        if self.left.final is None or self.left.rows is None:
            return states
        return self._backend.scatter(self.left.final, self.left.rows, states)
