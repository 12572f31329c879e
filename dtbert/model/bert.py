"""The models: an encoder with what stands on top of it, and the choice of who computes its steps."""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, Self, overload

import torch
from torch import Tensor, nn

from dtbert.kernels import Backend, BackendName, Packing, Sizes, get_backend
from dtbert.kernels.parameters import Embeddings, LayerNorm, Linear
from dtbert.model.batch import PackedBatch, PaddedInputs, pack_padded, unpack
from dtbert.model.config import BertConfig
from dtbert.model.encoder import Encoder
from dtbert.model.forks import survive_forks
from dtbert.model.graphs import LARGE, SMALL, CudaRecorder, Graphs
from dtbert.model.kept import LayerKept, layers_kept
from dtbert.model.padded import PaddedEncoding, encode_padded
from dtbert.model.policy import Policy
from dtbert.model.scorers import SpanHead


class Bert(nn.Module):
    """What the models share: the encoder, and the backend, which is chosen once for a device and dtype."""

    def __init__(self, config: BertConfig, backend: BackendName | None = None) -> None:
        super().__init__()
        survive_forks()
        self.config = config
        self.encoder = Encoder(config)
        self._asked = backend
        self._chosen: Backend | None = None
        self._prepared = False
        self._graphs: Graphs | None = None

    @property
    def device(self) -> torch.device:
        return self.encoder.embeddings.word.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.embeddings.word.dtype

    @property
    def product_dtype(self) -> torch.dtype:
        """In which the layers' matrices are held and multiplied: ``torch.int8``, ``torch.float8_e4m3fn`` or `dtype`."""
        held = (module.scaled_dtype for module in self.modules() if isinstance(module, Linear))
        return next((dtype for dtype in held if dtype is not None), self.dtype)

    @property
    def backend(self) -> Backend:
        """Who computes the steps of the next call: the backend asked for, else by device, dtype and sizes.

        Where gradients are needed that is the differentiable one, unless another was asked for.

        Raises:
            ValueError: the backend that was asked for does not run there, or gives no gradients where they are needed;
                or the model is exported with weights laid out for a CPU.
        """
        if self._chosen is None:
            config = self.config
            sizes = Sizes(self.product_dtype, config.head_size, config.hidden_size, config.max_position_embeddings)
            self._chosen = get_backend(self.device, self._asked, sizes)
        if self._prepared and self._chosen.name == "cpu" and torch.compiler.is_exporting():
            raise ValueError(
                "torch.export needs weights as torch lays them out, the backend 'cpu' has its own layout: load the "
                "model with backend='reference'"
            )
        if not self._chosen.differentiable and self._needs_gradients():
            if self._asked is not None:
                raise ValueError(
                    f"gradients are needed, the backend {self._asked!r} is forward only: call the model under "
                    "torch.no_grad(), or leave backend out"
                )
            if self._prepared:
                self._to_plain()
            return get_backend(self.device, "reference")
        return self._chosen

    @property
    def backend_name(self) -> BackendName:
        """The name of `backend`; errors are the same."""
        return self.backend.name

    def prepare(self) -> None:
        """Make the model ready for inference: no gradients, weights laid out as the backend likes them.

        It stays so where it moves, is copied or loads other weights; `requires_grad_`, of the model or of a part,
        makes it ready to be trained. The parameters stay the same objects.
        """
        self.requires_grad_(False)
        self.backend.prepare(self)
        self._prepared = True
        self._graphs = self._make_graphs()

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

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        if requires_grad:
            if (held := self.product_dtype) != self.dtype:
                raise ValueError(f"weights in {held} cannot be trained: load the model in another dtype")
            self._to_plain()
        super().requires_grad_(requires_grad)
        return self

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        result = super().load_state_dict(*args, **kwargs)
        self._prepare_again()
        return result

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Self:
        # The model moves, or changes its dtype: the choice may be another one there.
        self._chosen = self._graphs = None
        super()._apply(fn, *args, **kwargs)  # type: ignore[no-untyped-call]
        self._prepare_again()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_graphs": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        survive_forks()
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._prepare_again()

    def _to_plain(self) -> None:
        self._prepared, self._graphs = False, None
        for module in self.modules():
            if isinstance(module, Linear):
                module.to_plain()

    def _prepare_again(self) -> None:
        # Layouts are given up where weights move, are copied or change.
        if self._prepared:
            self.prepare()

    def _make_graphs(self) -> Graphs | None:
        return None

    def _needs_gradients(self) -> bool:
        return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters())

    def _resolved(self, schedule: Policy | None) -> Policy | None:
        return None if schedule is None else schedule.resolve(self.config.own_scorer)

    def _pack(
        self, input_ids: Tensor, attention_mask: Tensor | None, token_type_ids: Tensor | None
    ) -> tuple[PackedBatch, Tensor | None]:
        if attention_mask is not None and torch.jit.is_tracing():  # type: ignore[attr-defined,no-untyped-call]
            raise ValueError(
                "torch.jit.trace would keep the lengths of this attention_mask for every other: use torch.export, call "
                "the model itself, or leave the mask out for texts of one length"
            )
        batch, rows = pack_padded(input_ids, attention_mask, token_type_ids)
        if input_ids.device != self.device:
            raise ValueError(f"input_ids are on {input_ids.device}, the model on {self.device}: move one of them")
        batch.check(self.config)
        return batch, rows

    def _encode_exported(self, padded: PaddedInputs, schedule: Policy | None, **asked: Any) -> PaddedEncoding:
        """The encoder as `torch.export` takes it, which the backend refuses for weights in a layout of its own."""
        _ = self.backend
        return encode_padded(self.encoder, padded, self._resolved(schedule), **asked)


class EncoderOutput(NamedTuple):
    """What `BertEncoder` returns for a padded batch.

    Attributes:
        last_hidden_state: ``[B, S, H]``, 0 at padding; dropped tokens restored.
        pooler_output: ``[B, H]``, or None where the model has no pooler.
        hidden_states: on request, the embeddings' output and each layer's, ``[B, S, H]``, 0 at padding and at
            tokens that had been dropped.
        kept: on request, which tokens each layer kept.
    """

    last_hidden_state: Tensor
    pooler_output: Tensor | None
    hidden_states: tuple[Tensor, ...]
    kept: tuple[LayerKept, ...] = ()


class BertEncoder(Bert):
    """A bare BERT: hidden states, and the pooler's output where the checkpoint has one."""

    def __init__(self, config: BertConfig, *, pooler: bool = False, backend: BackendName | None = None) -> None:
        super().__init__(config, backend)
        self.pooler = Linear(config.hidden_size, config.hidden_size, "pooler") if pooler else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        schedule: Policy | None = None,
        *,
        output_hidden_states: bool = False,
        output_kept: bool = False,
    ) -> EncoderOutput:
        """Encode a padded batch.

        Args:
            input_ids: integers ``[B, S]``.
            attention_mask: ``[B, S]``, 1 at real tokens, 0 at padding; all real by default.
            token_type_ids: integers ``[B, S]``, 0 by default.
            schedule: tokens that each layer keeps; all by default. The published encoder drops with ``keep_cls=True``.
                One without a scorer takes the config's own.
            output_hidden_states: return every layer's output too.
            output_kept: return what every layer kept, too, and what the tokens scored.

        Raises:
            ValueError, TypeError: shapes, devices or dtypes that do not fit, ids outside their table, or a schedule
                with another number of layers.
        """
        asked = {"keep_hidden_states": output_hidden_states, "output_kept": output_kept}
        if torch.compiler.is_exporting():
            return self._exported(PaddedInputs(input_ids, attention_mask, token_type_ids), schedule, **asked)
        batch, rows = self._pack(input_ids, attention_mask, token_type_ids)
        backend, schedule = self.backend, self._resolved(schedule)
        encoding = self.encoder(batch, schedule, backend=backend, **asked)
        pooled = None
        if self.pooler is not None:
            firsts = encoding.states[batch.packing.cu_seqlens[:-1].long()]
            pooled = torch.tanh(backend.linear(firsts, self.pooler))
        hidden_states = []
        for states, kept in zip(encoding.hidden_states, (None, *encoding.kept), strict=False):
            left = rows if kept is None else kept if rows is None else rows[kept]
            hidden_states.append(unpack(states, left, input_ids.shape, 0.0))
        of_layers = layers_kept(encoding, batch.packing.num_tokens) if output_kept else ()
        last = unpack(encoding.states, rows, input_ids.shape, 0.0)
        return EncoderOutput(
            last, pooled, tuple(hidden_states), tuple(one.unpack(rows, input_ids.shape) for one in of_layers)
        )

    def _exported(self, padded: PaddedInputs, schedule: Policy | None, **asked: Any) -> EncoderOutput:
        encoding = self._encode_exported(padded, schedule, **asked)
        pooled = None if self.pooler is None else torch.tanh(Backend().linear(encoding.firsts, self.pooler))
        return EncoderOutput(encoding.states, pooled, encoding.hidden_states)


class SpanLogits(NamedTuple):
    """Scores of each token as start and as end of the answer: both ``[B, S]``, or ``[T]`` for a packed batch."""

    start_logits: Tensor
    end_logits: Tensor


class SpanLogitsAndKept(NamedTuple):
    """`SpanLogits`, and which tokens each layer kept."""

    start_logits: Tensor
    end_logits: Tensor
    kept: tuple[LayerKept, ...]


class BertForQuestionAnswering(Bert):
    """Dynamic-TinyBERT: token scores for the start and the end of an answer, at any schedule.

    With the backend ``triton`` on a GPU, once prepared, it replays CUDA graphs: of batches of at most 16,384 tokens, of
    32,768 with ``graphs=True``, of none with ``graphs=False``. A batch then runs with rows of padding, so that its
    products may be rounded otherwise than without graphs, as in a batch of another size.
    """

    def __init__(self, config: BertConfig, *, backend: BackendName | None = None, graphs: bool | None = None) -> None:
        super().__init__(config, backend)
        self._wants_graphs = graphs
        self.span = Linear(config.hidden_size, 2, "span_head")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        schedule: Policy | None = None,
        *,
        output_kept: bool = False,
    ) -> SpanLogits | SpanLogitsAndKept:
        """Score a padded batch.

        Args:
            input_ids: integers ``[B, S]``, S at most ``max_position_embeddings``.
            attention_mask: ``[B, S]``, 1 at real tokens, 0 at padding; all real by default.
            token_type_ids: integers ``[B, S]``: 0 for the question, 1 for the context; 0 by default.
            schedule: tokens that each layer keeps; all by default. One without a scorer takes the config's own.
            output_kept: return which tokens every layer kept, too, and what they scored; no CUDA graph is replayed.

        Returns:
            Start and end logits ``[B, S]`` in the model's dtype, -inf at padding; `SpanLogitsAndKept` on request.

        Raises:
            ValueError, TypeError: shapes, devices or dtypes that do not fit, ids outside their table, or a schedule
                with another number of layers.
        """
        if torch.compiler.is_exporting():
            padded = PaddedInputs(input_ids, attention_mask, token_type_ids)
            return self._exported(padded, schedule, output_kept=output_kept)
        batch, rows = self._pack(input_ids, attention_mask, token_type_ids)
        shape, fill = input_ids.shape, -float("inf")
        if output_kept:
            start, end, kept = self._logits_and_kept(batch, schedule, self.backend)
            logits = unpack(start, rows, shape, fill), unpack(end, rows, shape, fill)
            return SpanLogitsAndKept(*logits, tuple(one.unpack(rows, shape) for one in kept))
        start, end = self._logits(batch, schedule, self.backend)
        return SpanLogits(unpack(start, rows, shape, fill), unpack(end, rows, shape, fill))

    @overload
    def forward_packed(
        self,
        batch: PackedBatch,
        schedule: Policy | None = None,
        *,
        backend: Backend | None = None,
        output_kept: Literal[False] = False,
    ) -> SpanLogits: ...

    @overload
    def forward_packed(
        self,
        batch: PackedBatch,
        schedule: Policy | None = None,
        *,
        backend: Backend | None = None,
        output_kept: Literal[True],
    ) -> SpanLogitsAndKept: ...

    def forward_packed(
        self,
        batch: PackedBatch,
        schedule: Policy | None = None,
        *,
        backend: Backend | None = None,
        output_kept: bool = False,
    ) -> SpanLogits | SpanLogitsAndKept:
        """Score a packed batch of T tokens: start and end logits ``[T]``; no padding is computed or returned.

        ``backend`` computes the steps in place of the model's own: a profiler's, say. ``output_kept`` as `forward`.
        """
        # A traced graph has no values to look at: there, ids are the caller's promise.
        if not torch.compiler.is_compiling():
            batch.check(self.config)
        logits = self._logits_and_kept if output_kept else self._logits
        return logits(batch, schedule, backend or self.backend)

    def _exported(self, padded: PaddedInputs, schedule: Policy | None, **asked: Any) -> SpanLogits:
        span_head = self.span_head(Backend())
        logits = span_head(self._encode_exported(padded, schedule, span_head=span_head, **asked).states)
        if padded.attention_mask is not None:
            logits = logits.masked_fill(~padded.attention_mask.bool()[..., None], -torch.inf)
        return SpanLogits(*logits.unbind(2))

    def _logits(self, batch: PackedBatch, schedule: Policy | None, backend: Backend) -> SpanLogits:
        logits, schedule = None, self._resolved(schedule)
        # Another backend than the model's own gives gradients, or watches.
        if self._graphs is not None and not torch.compiler.is_compiling() and backend is self._chosen:
            logits = self._graphs(self._forward, batch, schedule, backend)
        if logits is None:
            logits = self._forward(batch, schedule, backend)
        start, end = logits.unbind(1)
        return SpanLogits(start, end)

    def _logits_and_kept(self, batch: PackedBatch, schedule: Policy | None, backend: Backend) -> SpanLogitsAndKept:
        span_head, schedule = self.span_head(backend), self._resolved(schedule)
        encoding = self.encoder(batch, schedule, backend=backend, span_head=span_head, output_kept=True)
        start, end = span_head(encoding.states).unbind(1)
        return SpanLogitsAndKept(start, end, layers_kept(encoding, len(start)))

    def _forward(
        self,
        batch: PackedBatch,
        schedule: Policy | None,
        backend: Backend,
        targets: Sequence[Packing] | None = None,
    ) -> Tensor:
        """Start and end logits side by side, ``[T, 2]``; ``targets`` as `TokensLeft` takes them."""
        span_head = self.span_head(backend)
        encoding = self.encoder(batch, schedule, backend=backend, span_head=span_head, targets=targets)
        return span_head(encoding.states)

    def _make_graphs(self) -> Graphs | None:
        if self._wants_graphs is False or self.device.type != "cuda" or self.backend_name != "triton":
            return None
        tokens = LARGE if self._wants_graphs else SMALL
        return Graphs(self.encoder, self.span, tokens, CudaRecorder(self.device))

    def span_head(self, backend: Backend) -> SpanHead:
        """The last step by ``backend``: of states ``[T, H]``, start and end logits side by side, ``[T, 2]``."""
        return lambda states: backend.linear(states, self.span)
