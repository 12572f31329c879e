"""The network over a padded batch as `torch.export` takes it: no shape depends on what a mask holds.

With a mask, dropped tokens are masked out and keep the states they had. Without one all sequences are of one length,
and dropped tokens go, as in a packed batch. Both give the numbers of the packed network.
"""

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from dtbert.kernels import Backend, Left, Packing, TokenIds
from dtbert.kernels.rectangle import Rectangle
from dtbert.kernels.reference import highest
from dtbert.model.batch import PackedBatch, PaddedInputs, padded_ids
from dtbert.model.encoder import Encoder
from dtbert.model.layer import Layer
from dtbert.model.policy import Policy
from dtbert.model.schedule import LengthSchedule
from dtbert.model.scorers import BUILT_IN_SCORERS, LayerView, SpanHead, Text, scorer_named


class PaddedEncoding(NamedTuple):
    """States ``[B, S, H]``, dropped tokens restored; those of each sequence's first token, ``[B, H]``; hidden states.

    ``hidden_states``, on request, are what enters the first layer and what leaves each, 0 where a token had been
    dropped.
    """

    states: Tensor
    firsts: Tensor
    hidden_states: tuple[Tensor, ...]


def encode_padded(
    encoder: Encoder,
    padded: PaddedInputs,
    policy: Policy | None = None,
    *,
    span_head: SpanHead | None = None,
    keep_hidden_states: bool = False,
    output_kept: bool = False,
) -> PaddedEncoding:
    """What `Encoder` makes of the sequences of a padded batch, in plain torch.

    A graph has no values to look at: what ids and mask hold is the caller's promise.

    Args:
        encoder: its weights as torch lays them out.
        padded: with a mask or without.
        policy, span_head, keep_hidden_states: as `Encoder` takes them.
        output_kept: refused.

    Raises:
        ValueError, TypeError: as `pack_padded`, but for what the tensors hold; as `schedule_of_lengths`; the schedule
            is for another number of layers, or a scorer of it is a registered one, or reads a span head that is not
            there.
    """
    if output_kept:
        raise ValueError("torch.export does not take output_kept: export the model without it")
    schedule = schedule_of_lengths("torch.export of a padded batch", policy)
    ids, mask = padded_ids(*padded)
    if schedule is not None:
        schedule.check_layers(len(encoder.layers))
    batch_size, length = shape = ids.input_ids.shape
    kind = _Gathered if mask is None else _Masked
    tokens = kind(_Text(ids, mask), schedule, span_head, Rectangle(batch_size, length, mask))
    first = tokens.backend.first_tokens(ids.input_ids)
    states = tokens.backend.embed(tokens.text.batch.ids, encoder.embeddings)
    hidden_states = [tokens.spread(states)] if keep_hidden_states else []
    skipped = () if schedule is None else schedule.skip_layers
    for index, layer in enumerate(encoder.layers):
        if index not in skipped:
            states = tokens.merge(states, layer(states, tokens, tokens.backend))
        if keep_hidden_states:
            hidden_states.append(tokens.spread(states))
    restored = tokens.restore(states).view(*shape, -1)
    firsts = restored.gather(1, first[..., None].expand(-1, 1, restored.shape[2])).squeeze(1)
    return PaddedEncoding(restored, firsts, tuple(one.view(*shape, -1) for one in hidden_states))


class _Text(Text):
    """A padded batch as it entered the network."""

    def __init__(self, ids: TokenIds, mask: Tensor | None) -> None:
        self.shape = ids.input_ids.shape
        self.mask = torch.ones_like(ids.input_ids, dtype=torch.bool) if mask is None else mask
        self.lengths = self.mask.sum(1)
        # What a mask holds no host knows while a graph is made of it: the packing has its lengths on the device alone.
        batch_size, length = self.shape
        cu_seqlens = F.pad(self.lengths.cumsum(0), (1, 0)).int()
        packing = Packing.on_device(cu_seqlens, batch_size * length, length)
        input_ids, token_type_ids, position_ids = (one.flatten() for one in ids)
        super().__init__(PackedBatch(input_ids, token_type_ids, position_ids, packing))

    def overlap(self, backend: Backend) -> Tensor:
        if self._overlap is None:
            # As if packed: padding goes behind all sequences, where it is in none.
            rows = (~self.mask.flatten()).sort(stable=True).indices
            ids = TokenIds(*(one.index_select(0, rows) for one in self.batch.ids))
            packed = backend.question_overlap(ids, self.batch.packing)
            self._overlap = torch.zeros_like(packed).index_copy(0, rows, packed)
        return self._overlap


class _TokensLeft:
    """`dtbert.model.layer.TokensLeft` for a padded batch: states are of B rows of n tokens, ``[B * n, H]``.

    Attributes:
        left: as a layer reads it.
        backend: attention among the tokens that are left.
    """

    def __init__(
        self, text: _Text, schedule: LengthSchedule | None, span_head: SpanHead | None, backend: Rectangle
    ) -> None:
        self.text, self.backend, self.left = text, backend, Left(text.batch.packing)
        self._schedule, self._span_head = schedule, span_head
        # Of the layer before: tokens, or a part of them.
        self._entry = 1.0 if schedule is not None and schedule.kind == "ratios" else math.inf
        scorers = () if schedule is None else schedule.scorers
        registered = [name for name in scorers if name not in BUILT_IN_SCORERS]
        if registered:
            raise ValueError(
                f"the scorer {registered[0]!r} reads packed tokens: torch.export of a padded batch takes the scorers "
                f"that are built in, {', '.join(BUILT_IN_SCORERS)}; export forward_packed"
            )
        self._scorers = [scorer_named(name) for name in scorers]
        if span_head is None and any(scorer.needs_span_head for scorer in self._scorers):
            raise ValueError(f"a scorer of {scorers} reads the span head: a bare encoder has none")

    def scores_at(self, layer: int) -> bool:
        """Whether the schedule has fewer tokens leave a layer than enter it."""
        if self._schedule is None:
            return False
        entered, self._entry = self._entry, self._schedule.length_config[layer]
        return self._entry < entered

    def _significance(self, layer: Layer, states: Tensor, qkv: Tensor) -> Tensor:
        """``[B, n]``; infinite at tokens that stay whatever their score."""
        assert self._schedule is not None
        text, left, backend = self.text, self.left, self.backend
        view = LayerView(
            layer.index, states, qkv, left.packing, layer.num_heads, text, left.rows, backend, self._span_head
        )
        significance = self._scorers[layer.index].function(view)
        if self._schedule.keeps_question[layer.index]:
            significance = significance.masked_fill(view.token_type_ids == 0, torch.inf)
        significance = significance.view(backend.shape)
        if self._schedule.keep_cls:
            significance = significance.scatter(1, backend.first_tokens(significance), torch.inf)
        return significance


class _Masked(_TokensLeft):
    """Dropped tokens are masked out: n stays S."""

    def drop(self, layer: Layer, states: Tensor) -> tuple[Tensor, None]:
        """The context of all tokens, and all rows; from here on the mask has those that the layer keeps."""
        assert self._schedule is not None
        backend, mask, lengths = self.backend, self.backend.mask, self.text.lengths
        assert mask is not None
        qkv = backend.linear(states, layer.qkv)
        significance = self._significance(layer, states, qkv)
        order = significance.sort(dim=1, descending=True, stable=True).indices
        candidates = mask.gather(1, order)
        kept = candidates & (candidates.cumsum(1) <= lengths_of(self._schedule, layer.index, lengths)[:, None])
        self.backend = Rectangle(*backend.shape, torch.zeros_like(mask).scatter(1, order, kept))
        return backend.context(qkv, layer.num_heads), None

    def merge(self, before: Tensor, after: Tensor) -> Tensor:
        """The states that leave a layer: those that entered it, of tokens that it or one before has dropped."""
        assert self.backend.mask is not None
        return after if self._schedule is None else torch.where(self.backend.mask.view(-1, 1), after, before)

    def spread(self, states: Tensor) -> Tensor:
        """The states of all tokens, 0 at those that are not left."""
        assert self.backend.mask is not None
        return states.masked_fill(~self.backend.mask.view(-1, 1), 0)

    def restore(self, states: Tensor) -> Tensor:
        """The final states of all tokens; 0 at padding."""
        return states.masked_fill(~self.text.mask.view(-1, 1), 0)


class _Gathered(_TokensLeft):
    """All sequences are of one length, and dropped tokens go: n falls."""

    def drop(self, layer: Layer, states: Tensor) -> tuple[Tensor, Tensor]:
        """The context of the tokens that a layer keeps, and their rows among those that entered it."""
        left, backend = self.left, self.backend
        batch_size, entering = backend.shape
        qkv = backend.linear(states, layer.qkv)
        significance = self._significance(layer, states, qkv)
        count = self._count(layer.index, entering)
        columns = highest(significance, count)
        rows = (columns + torch.arange(batch_size, device=columns.device)[:, None] * entering).flatten()
        of_all = rows if left.rows is None else left.rows.index_select(0, rows)
        self.left = left._replace(rows=of_all, final=self.restore(states))
        self.backend = Rectangle(batch_size, count, None)
        return backend.context(qkv, layer.num_heads, columns), rows

    def _count(self, layer: int, entering: int) -> int:
        assert self._schedule is not None
        length = self.text.shape[1]
        # A strict export calls a length that stays open an int too.
        if isinstance(length, int) and not torch.compiler.is_dynamo_compiling():
            return self._schedule.lengths(length)[layer]
        lengths = torch.scalar_tensor(length, dtype=torch.int64)
        # A number that is only there when the graph runs, as are these promises.
        count = cast(int, lengths_of(self._schedule, layer, lengths).item())
        torch._check(count >= 1)
        torch._check(count <= entering)
        return count

    def merge(self, before: Tensor, after: Tensor) -> Tensor:
        return after

    def spread(self, states: Tensor) -> Tensor:
        if self.left.rows is None:
            return states
        batch_size, length = self.text.shape
        everything = states.new_zeros(batch_size * length, states.shape[1])
        return everything.index_copy(0, self.left.rows, states)

    def restore(self, states: Tensor) -> Tensor:
        if self.left.rows is None or self.left.final is None:
            return states
        return self.left.final.index_copy(0, self.left.rows, states)


def lengths_of(schedule: LengthSchedule, layer: int, lengths: Tensor) -> Tensor:
    """`LengthSchedule.lengths` of sequences whose lengths are a tensor: what a layer keeps of each, int64."""
    entry = schedule.length_config[layer]
    if schedule.kind == "absolute":
        return lengths.clamp(max=int(entry))
    parts = lengths.double() * entry
    whole = parts.floor()
    # Up from where the sixth decimal is not 0; the difference of two so close is exact.
    return (whole + (parts - whole > 5e-7)).long().clamp(min=1)


def schedule_of_lengths(place: str, policy: Policy | None) -> LengthSchedule | None:
    """The policy, if it is one by which a text's length alone says how many tokens stay, by each layer's own scores.

    Raises:
        ValueError: it is another; the message begins with the place that does not take it.
    """
    if policy is None or (isinstance(policy, LengthSchedule) and not policy.accumulate):
        return policy
    other = "accumulated scores" if isinstance(policy, LengthSchedule) else f"a policy of the kind {policy.kind!r}"
    raise ValueError(f"{place} does not take {other}: give a schedule of ratios or of absolute lengths")
