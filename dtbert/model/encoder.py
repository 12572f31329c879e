"""The network: embeddings, layers that may drop tokens, and the encoder that restores them."""

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtbert.kernels import Backend, BackendName, choose_backend, cpu, get_backend, reference
from dtbert.model.config import BertConfig
from dtbert.model.overlap import question_overlap
from dtbert.model.packing import PackedBatch, Packing, pack_padded, unpack
from dtbert.model.schedule import LengthSchedule
from dtbert.model.scorers import SCORES_BY_OVERLAP, SCORES_WITH_CONTEXT, LayerView, score_tokens

SpanHead = Callable[[Tensor], Tensor]


class Linear(nn.Module):
    """A weight ``[out, in]`` and a bias ``[out]``; the products are the backend's."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features))


class LayerNorm(nn.Module):
    """A weight and a bias ``[H]``; the normalisation is part of the backend's fused steps."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(hidden_size))
        self.bias = nn.Parameter(torch.empty(hidden_size))


class Embeddings(nn.Module):
    """Word, position and segment tables, and the LayerNorm over their sum."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.word = nn.Parameter(torch.empty(config.vocab_size, config.hidden_size))
        self.position = nn.Parameter(torch.empty(config.max_position_embeddings, config.hidden_size))
        self.token_type = nn.Parameter(torch.empty(config.type_vocab_size, config.hidden_size))
        self.norm = LayerNorm(config.hidden_size)

    def forward(self, batch: PackedBatch, backend: Backend) -> Tensor:
        # A traced graph has no values to look at: there, ids are the caller's promise.
        if not torch.compiler.is_compiling():
            self._check(batch)
        ids = (batch.input_ids, batch.position_ids, batch.token_type_ids)
        tables = (self.word, self.position, self.token_type)
        return backend.embed_layer_norm(*ids, *tables, self.norm.weight, self.norm.bias, self.config.layer_norm_eps)

    def _check(self, batch: PackedBatch) -> None:
        if batch.id_ranges is None:
            ids = torch.stack([batch.input_ids, batch.token_type_ids, batch.position_ids])
            lowest, highest = torch.stack(ids.aminmax(dim=1)).tolist()
        else:
            lowest, highest = batch.id_ranges
        limits = (
            ("input_ids", self.config.vocab_size, "the vocabulary", "use the tokenizer of this model"),
            ("token_type_ids", self.config.type_vocab_size, "type_vocab_size", "segments count from 0"),
            (
                "positions",
                self.config.max_position_embeddings,
                "the position table",
                "split longer texts into windows",
            ),
        )
        for (name, size, table, advice), low, high in zip(limits, lowest, highest, strict=True):
            if low < 0 or high >= size:
                raise ValueError(f"{name} run from {low} to {high}, {table} holds 0 to {size - 1}: {advice}")


class Layer(nn.Module):
    """Attention and feed-forward over packed tokens; where a layer drops, both outputs are of the kept tokens."""

    def __init__(self, config: BertConfig, index: int) -> None:
        super().__init__()
        self.config, self.index = config, index
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.attention_output = Linear(config.hidden_size, config.hidden_size)
        self.attention_norm = LayerNorm(config.hidden_size)
        self.intermediate = Linear(config.hidden_size, config.intermediate_size)
        self.output = Linear(config.intermediate_size, config.hidden_size)
        self.output_norm = LayerNorm(config.hidden_size)

    def forward(
        self,
        states: Tensor,
        batch: PackedBatch,
        backend: Backend,
        target: Packing,
        schedule: LengthSchedule | None,
        span_head: SpanHead | None,
    ) -> tuple[Tensor, PackedBatch, Tensor | None]:
        """States ``[T, H]`` in; kept states ``[K, H]``, their batch, and ``keep_indices`` (None: all) out."""
        qkv = backend.linear(states, self.qkv.weight, self.qkv.bias)
        if schedule is None or target.seqlens == batch.packing.seqlens:
            now = batch.packing
            context, _ = backend.attention(qkv, now.cu_seqlens, now.max_seqlen, self.config.num_attention_heads)
            keep_indices = None
        else:
            view = LayerView(self.index, states, qkv, batch, self.config.num_attention_heads, backend, span_head)
            context, keep_indices = self._drop(view, target, schedule)
            batch = batch.keep(keep_indices, target)
        eps = self.config.layer_norm_eps
        states = backend.linear_add_layer_norm(
            context,
            *parameters_of(self.attention_output),
            states,
            *parameters_of(self.attention_norm),
            eps,
            keep_indices,
        )
        wide = backend.linear_gelu(states, *parameters_of(self.intermediate), self.config.activation)
        states = backend.linear_add_layer_norm(
            wide, *parameters_of(self.output), states, *parameters_of(self.output_norm), eps
        )
        return states, batch, keep_indices

    def _drop(self, view: LayerView, target: Packing, schedule: LengthSchedule) -> tuple[Tensor, Tensor]:
        """Context of the kept tokens, and which these are."""
        scorer, now = schedule.scorers[self.index], view.batch.packing
        attention = view.backend.attention
        if scorer in SCORES_WITH_CONTEXT:
            context, significance = attention(
                view.qkv,
                now.cu_seqlens,
                now.max_seqlen,
                view.num_heads,
                significance=scorer,
            )
            assert significance is not None
        else:
            context, significance = None, score_tokens(scorer, view)
        significance = _protect(significance, view.batch, schedule)
        keep_indices = view.backend.select_tokens(
            significance, now.cu_seqlens, target.cu_seqlens, target.num_tokens, now.max_seqlen
        )
        if context is not None:
            return context.index_select(0, keep_indices), keep_indices
        # The choice did not need every query's attention: compute the kept ones alone.
        context, _ = attention(
            view.qkv,
            now.cu_seqlens,
            now.max_seqlen,
            view.num_heads,
            query_indices=keep_indices,
            cu_seqlens_q=target.cu_seqlens,
        )
        return context, keep_indices


def parameters_of(module: Linear | LayerNorm) -> tuple[Tensor, Tensor]:
    return module.weight, module.bias


def _protect(significance: Tensor, batch: PackedBatch, schedule: LengthSchedule) -> Tensor:
    if schedule.keep_question:
        significance = significance.masked_fill(batch.token_type_ids == 0, torch.inf)
    if schedule.keep_cls:
        firsts = batch.packing.cu_seqlens[:-1].long()
        significance = significance.index_fill(0, firsts, torch.inf)
    return significance


class PackedEncoding(NamedTuple):
    """What the encoder makes of a packed batch.

    ``states`` are ``[T, H]`` with dropped tokens restored, or ``[K, H]`` of the tokens that were left; ``batch`` is
    the batch they belong to; ``kept`` holds, per layer, int64 rows of the packed batch that left that layer, or None
    where nothing had been dropped so far; ``hidden_states`` the input of the first layer and the output of each.
    """

    states: Tensor
    batch: PackedBatch
    kept: tuple[Tensor | None, ...]
    hidden_states: tuple[Tensor, ...]


class Encoder(nn.Module):
    """Embeddings and layers over packed batches, with drop-and-restore; ``skip_layers`` are passed by."""

    def __init__(self, config: BertConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))

    def forward(
        self,
        batch: PackedBatch,
        schedule: LengthSchedule | None = None,
        *,
        backend: Backend,
        restore: bool = True,
        keep_hidden_states: bool = False,
        span_head: SpanHead | None = None,
        skip_layers: Collection[int] = (),
    ) -> PackedEncoding:
        original, targets = batch, self._targets(batch.packing, schedule)
        if schedule is not None and not SCORES_BY_OVERLAP.isdisjoint(schedule.scorers):
            batch = replace(batch, overlap=question_overlap(batch))
        states = self.embeddings(batch, backend)
        inputs: list[tuple[Tensor, Tensor]] = []  # what entered each dropping layer, and the rows that left it
        rows, kept = None, []
        hidden_states = [states]
        for index, (layer, target) in enumerate(zip(self.layers, targets, strict=True)):
            entered, keep_indices = states, None
            if index not in skip_layers:
                states, batch, keep_indices = layer(states, batch, backend, target, schedule, span_head)
            if keep_indices is not None:
                inputs.append((entered, keep_indices))
                rows = keep_indices if rows is None else rows[keep_indices]
            kept.append(rows)
            if keep_hidden_states:
                hidden_states.append(states)
        if restore and inputs:
            # A backend may restore in place, into states that the caller wants to see.
            step = reference.restore if keep_hidden_states else backend.restore
            for entered, keep_indices in reversed(inputs):
                states = step(entered, keep_indices, states)
            batch = original
        return PackedEncoding(states, batch, tuple(kept), tuple(hidden_states) if keep_hidden_states else ())

    def _targets(self, packing: Packing, schedule: LengthSchedule | None) -> list[Packing]:
        if schedule is None:
            return [packing] * len(self.layers)
        schedule.check_layers(len(self.layers))
        per_sequence = [schedule.lengths(length) for length in packing.seqlens]
        return Packing.stack(list(zip(*per_sequence, strict=True)), packing.cu_seqlens.device)


class EncoderOutput(NamedTuple):
    """What `BertEncoder` returns for a padded batch.

    Attributes:
        last_hidden_state: ``[B, S, H]``, 0 at padding; dropped tokens restored.
        pooler_output: ``[B, H]``, or None where the model has no pooler.
        hidden_states: on request, the embeddings' output and each layer's, ``[B, S, H]``, 0 at padding and at
            tokens that had been dropped.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...]


class Bert(nn.Module):
    """What the models share: the encoder, the choice of backend, and weights packed for a CPU."""

    def __init__(self, config: BertConfig, backend: BackendName | None = None) -> None:
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self._backend_name = backend

    @property
    def device(self) -> torch.device:
        return self.encoder.embeddings.word.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.embeddings.word.dtype

    @property
    def backend(self) -> Backend:
        """The module of kernels that the next call uses: `dtbert.kernels.get_backend`."""
        return get_backend(self.device, self.backend_name)

    @property
    def backend_name(self) -> BackendName:
        """Which kernels the next call uses: those asked for, else by device, dtype and head size.

        Where gradients are needed that is ``"reference"``, unless another was asked for.

        Raises:
            ValueError: the backend that was asked for does not run there.
        """
        if self._backend_name is None and self._needs_gradients():
            return "reference"
        return choose_backend(self.device, self._backend_name, dtype=self.dtype, head_size=self.config.head_size)

    def _needs_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Fresh weights as BERT's: normal with ``initializer_range``, biases 0, LayerNorm 1 and 0."""
        with torch.no_grad():
            for module in self.modules():
                if isinstance(module, LayerNorm):
                    module.weight.fill_(1)
                    module.bias.zero_()
                elif isinstance(module, Linear):
                    module.weight.normal_(0, self.config.initializer_range, generator=generator)
                    module.bias.zero_()
                elif isinstance(module, Embeddings):
                    for table in (module.word, module.position, module.token_type):
                        table.normal_(0, self.config.initializer_range, generator=generator)

    def pack_weights(self) -> None:
        """Make the model ready for inference: no gradients, and weights packed, one at a time, where that pays.

        `dtbert.kernels.cpu.packing_pays` tells where.
        """
        self.requires_grad_(False)
        if self.device.type != "cpu" or get_backend("cpu", self._backend_name) is not cpu:
            return
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight = nn.Parameter(cpu.pack_weight(module.weight), requires_grad=False)

    def _pack(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[PackedBatch, Tensor]:
        batch, rows = pack_padded(input_ids, attention_mask, token_type_ids)
        if input_ids.device != self.device:
            raise ValueError(f"input_ids are on {input_ids.device}, the model on {self.device}: move one of them")
        return batch, rows


class BertEncoder(Bert):
    """A bare BERT: hidden states, and the pooler's output where the checkpoint has one."""

    def __init__(self, config: BertConfig, *, pooler: bool = False, backend: BackendName | None = None) -> None:
        super().__init__(config, backend)
        self.pooler = Linear(config.hidden_size, config.hidden_size) if pooler else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        schedule: LengthSchedule | None = None,
        *,
        output_hidden_states: bool = False,
    ) -> EncoderOutput:
        """Encode a padded batch.

        Args:
            input_ids: integers ``[B, S]``.
            attention_mask: ``[B, S]``, 1 at real tokens, 0 at padding; all real by default.
            token_type_ids: integers ``[B, S]``, 0 by default.
            schedule: tokens that each layer keeps; all by default. The published encoder drops with ``keep_cls=True``.
            output_hidden_states: return every layer's output too.

        Raises:
            ValueError, TypeError: shapes, devices or dtypes that do not fit, ids outside their table, or a schedule
                with another number of layers.
        """
        batch, rows = self._pack(input_ids, attention_mask, token_type_ids)
        encoding = self.encoder(batch, schedule, backend=self.backend, keep_hidden_states=output_hidden_states)
        pooled = None
        if self.pooler is not None:
            firsts = encoding.states[batch.packing.cu_seqlens[:-1].long()]
            pooled = torch.tanh(self.backend.linear(firsts, *parameters_of(self.pooler)))
        hidden_states = []
        for states, kept in zip(encoding.hidden_states, (None, *encoding.kept), strict=False):
            hidden_states.append(unpack(states, rows if kept is None else rows[kept], input_ids.shape, 0.0))
        return EncoderOutput(unpack(encoding.states, rows, input_ids.shape, 0.0), pooled, tuple(hidden_states))
