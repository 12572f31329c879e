"""Models with one output a sequence: labels from [CLS], and sentence embeddings."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Literal, get_args

import torch
from torch import Tensor

from dtbert.kernels import Backend, BackendName
from dtbert.kernels.parameters import Linear
from dtbert.model.batch import PackedBatch
from dtbert.model.bert import Bert
from dtbert.model.config import BertConfig
from dtbert.model.schedule import LengthSchedule
from dtbert.model.work import Macs, macs_of

Pooling = Literal["mean", "cls"]


class SequenceModel(Bert):
    """A BERT whose head makes one row of each sequence."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        schedule: LengthSchedule | None = None,
    ) -> Tensor:
        """One row for each sequence of a padded batch, in the model's dtype.

        Args:
            input_ids: integers ``[B, S]``, S at most ``max_position_embeddings``.
            attention_mask: ``[B, S]``, 1 at real tokens, 0 at padding; all real by default.
            token_type_ids: integers ``[B, S]``, 0 by default; 1 for the second text of a pair.
            schedule: tokens that each layer keeps; all by default. One without a scorer takes the config's own; a head
                that reads [CLS] always keeps it.

        Raises:
            ValueError, TypeError: shapes, devices or dtypes that do not fit, ids outside their table, a schedule with
                another number of layers, or a scorer that reads a span head.
        """
        batch, _ = self._pack(input_ids, attention_mask, token_type_ids)
        return self._rows(batch, schedule, self.backend)

    def forward_packed(
        self, batch: PackedBatch, schedule: LengthSchedule | None = None, *, backend: Backend | None = None
    ) -> Tensor:
        """One row for each of the B sequences of a packed batch; ``backend`` in place of the model's own."""
        if not torch.compiler.is_compiling():
            batch.check(self.config)
        return self._rows(batch, schedule, backend or self.backend)

    @property
    @abstractmethod
    def reads_cls(self) -> bool:
        """Whether the head reads [CLS] alone."""

    @property
    @abstractmethod
    def row_size(self) -> int:
        """Values in a row."""

    @property
    @abstractmethod
    def head_macs(self) -> int:
        """Multiply-accumulates of the head for one sequence."""

    def macs(
        self,
        schedule: LengthSchedule | None,
        sequence_length: int,
        *,
        question_length: int | None = None,
        backend: BackendName = "cpu",
    ) -> Macs:
        """Multiply-accumulates for one sequence of at least one token, this head included, as `LengthSchedule.macs`.

        What a head of [CLS] does without in the last layer is not in ``executed``, for nothing computes it;
        ``published`` counts the schedule as it was given.

        Raises:
            ValueError: as `LengthSchedule.macs`.
        """
        layers = self.config.num_hidden_layers
        given = self._given(schedule) or LengthSchedule.ratios([1] * layers, scorer="random")
        given.check_layers(layers)
        published, executed = (
            macs_of(one, self.config, lengths, one.scores(lengths), question_length, backend, self.head_macs)
            for one in (given, self.executed(given) or given)
            for lengths in [(sequence_length, *one.lengths(sequence_length))]
        )
        return Macs(published.published, executed.executed)

    def executed(self, schedule: LengthSchedule | None) -> LengthSchedule | None:
        """The schedule by which the model runs where it is asked for another.

        A head that reads [CLS] alone keeps it in every layer, and of the last layer nothing else: the result is the
        same, for nobody reads the other tokens. A schedule without a scorer takes the config's own.

        Raises:
            TypeError: another policy than a `LengthSchedule`.
            ValueError: a schedule with another number of layers.
        """
        schedule = self._given(schedule)
        if not self.reads_cls:
            return schedule
        return _cls_alone(schedule, self.config.num_hidden_layers, self.config.max_position_embeddings)

    def _given(self, schedule: LengthSchedule | None) -> LengthSchedule | None:
        if schedule is not None and not isinstance(schedule, LengthSchedule):
            raise TypeError(
                f"models of whole texts drop tokens by a LengthSchedule, not by a {type(schedule).__name__}"
            )
        return None if schedule is None else schedule.resolve(self.config.own_scorer)

    def cls_states(
        self,
        batch: PackedBatch,
        schedule: LengthSchedule | None,
        backend: Backend,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """The final state of each sequence's first token, ``[B, H]``; no other is computed in the last layer."""
        encoding = self.encoder(
            batch, self.executed(schedule), backend=backend, skip_layers=skip_layers, restores=False
        )
        firsts = encoding.packing.cu_seqlens[:-1].long()
        return encoding.states if len(encoding.states) == len(firsts) else encoding.states.index_select(0, firsts)

    @abstractmethod
    def _rows(self, batch: PackedBatch, schedule: LengthSchedule | None, backend: Backend) -> Tensor: ...


@lru_cache(maxsize=64)  # a schedule is checked where it is made, which takes longer than a launch
def _cls_alone(schedule: LengthSchedule | None, num_layers: int, positions: int) -> LengthSchedule:
    if schedule is None:
        schedule = LengthSchedule.ratios([1] * num_layers, scorer="random")
    schedule.check_layers(num_layers)
    one = 1 if schedule.kind == "absolute" else 1 / positions
    lengths = (*schedule.length_config[:-1], min(one, schedule.length_config[-1]))
    # Of one token there is no choice: a score would be work for nothing, and this one is none.
    return replace(schedule, length_config=lengths, scorer=(*schedule.scorers[:-1], "random"), keep_cls=True)


class BertForSequenceClassification(SequenceModel):
    """Labels of a text, or of two: logits ``[B, num_labels]`` of [CLS]'s final state by pooler and classifier.

    Args:
        config: sizes.
        labels: their names, in the order of the logits; one alone is a number, of which the logit is the value.
        backend: as `dtbert.load_classifier`.

    Attributes:
        labels, num_labels: the names, and how many.

    Raises:
        ValueError: no label, or one twice.
    """

    reads_cls = True

    def __init__(self, config: BertConfig, labels: Sequence[str], *, backend: BackendName | None = None) -> None:
        super().__init__(config, backend)
        self.labels = tuple(labels)
        if not self.labels or len(set(self.labels)) < len(self.labels):
            raise ValueError(f"expected at least one label, each once, not {list(self.labels)!r:.200}")
        self.pooler = Linear(config.hidden_size, config.hidden_size, "pooler")
        self.classifier = Linear(config.hidden_size, len(self.labels), "classifier")

    @property
    def num_labels(self) -> int:
        return len(self.labels)

    @property
    def is_regression(self) -> bool:
        """Whether the model gives a number."""
        return len(self.labels) == 1

    @property
    def row_size(self) -> int:
        return self.num_labels

    @property
    def head_macs(self) -> int:
        return self.config.hidden_size * (self.config.hidden_size + self.num_labels)

    def pooled(self, states: Tensor, backend: Backend) -> Tensor:
        """What the classifier reads: `cls_states` ``[B, H]`` by the pooler and tanh."""
        return torch.tanh(backend.linear(states, self.pooler))

    def _rows(self, batch: PackedBatch, schedule: LengthSchedule | None, backend: Backend) -> Tensor:
        states = self.cls_states(batch, schedule, backend)
        return backend.linear(self.pooled(states, backend), self.classifier)


class BertForSentenceEmbedding(SequenceModel):
    """Sentence embeddings ``[B, H]``: the mean of the final states of all tokens, special ones included, or [CLS]'s.

    With a schedule the mean is over the tokens that leave the last layer. The states of dropped tokens are not
    restored: they are of earlier layers, another space, and with them the mean is far from the full model's
    (docs/guide.md#sentence-embeddings).

    Args:
        config: sizes.
        pooling: ``"mean"`` or ``"cls"``, as the model was trained.
        backend: as `dtbert.load_sentence_encoder`.

    Raises:
        ValueError: another pooling.
    """

    def __init__(self, config: BertConfig, pooling: Pooling = "mean", *, backend: BackendName | None = None) -> None:
        super().__init__(config, backend)
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling must be {' or '.join(map(repr, get_args(Pooling)))}, not {pooling!r}")
        self.pooling = pooling

    @property
    def reads_cls(self) -> bool:
        return self.pooling == "cls"

    @property
    def row_size(self) -> int:
        return self.config.hidden_size

    @property
    def head_macs(self) -> int:
        return 0

    def _rows(self, batch: PackedBatch, schedule: LengthSchedule | None, backend: Backend) -> Tensor:
        if self.reads_cls:
            return self.cls_states(batch, schedule, backend)
        encoding = self.encoder(batch, self.executed(schedule), backend=backend, restores=False)
        wide = encoding.states.to(torch.promote_types(self.dtype, torch.float32))
        offsets = encoding.packing.cu_seqlens.long()
        return torch.segment_reduce(wide, "mean", offsets=offsets, axis=0).to(self.dtype)
