"""The span-answering model: an encoder and a head that scores each token as start and end of the answer."""

from typing import NamedTuple

from torch import Tensor

from dtbert.kernels import Backend, BackendName
from dtbert.model.config import BertConfig
from dtbert.model.encoder import Bert, Linear, SpanHead, parameters_of
from dtbert.model.packing import PackedBatch, unpack
from dtbert.model.schedule import LengthSchedule


class SpanLogits(NamedTuple):
    """Scores of each token as start and as end of the answer: both ``[B, S]``, or ``[T]`` for a packed batch."""

    start_logits: Tensor
    end_logits: Tensor


class BertForQuestionAnswering(Bert):
    """Dynamic-TinyBERT: token scores for the start and the end of an answer, at any schedule."""

    def __init__(self, config: BertConfig, *, backend: BackendName | None = None) -> None:
        super().__init__(config, backend)
        self.span = Linear(config.hidden_size, 2)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        schedule: LengthSchedule | None = None,
    ) -> SpanLogits:
        """Score a padded batch.

        Args:
            input_ids: integers ``[B, S]``, S at most ``max_position_embeddings``.
            attention_mask: ``[B, S]``, 1 at real tokens, 0 at padding; all real by default.
            token_type_ids: integers ``[B, S]``: 0 for the question, 1 for the context; 0 by default.
            schedule: tokens that each layer keeps; all by default.

        Returns:
            Start and end logits ``[B, S]`` in the model's dtype, -inf at padding.

        Raises:
            ValueError, TypeError: shapes, devices or dtypes that do not fit, ids outside their table, or a schedule
                with another number of layers.
        """
        batch, rows = self._pack(input_ids, attention_mask, token_type_ids)
        start, end = self.forward_packed(batch, schedule)
        fill = -float("inf")
        return SpanLogits(unpack(start, rows, input_ids.shape, fill), unpack(end, rows, input_ids.shape, fill))

    def forward_packed(self, batch: PackedBatch, schedule: LengthSchedule | None = None) -> SpanLogits:
        """Score a packed batch of T tokens: start and end logits ``[T]``; no padding is computed or returned."""
        backend = self.backend
        span_head = self.span_head(backend)
        encoding = self.encoder(batch, schedule, backend=backend, span_head=span_head)
        start, end = span_head(encoding.states).unbind(1)
        return SpanLogits(start, end)

    def span_head(self, backend: Backend) -> SpanHead:
        """The last step by ``backend``: of states ``[T, H]``, start and end logits side by side, ``[T, 2]``."""
        return lambda states: backend.linear(states, *parameters_of(self.span))
