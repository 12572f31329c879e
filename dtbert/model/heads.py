"""Models with one output a sequence: labels from [CLS], and sentence embeddings."""

from abc import abstractmethod
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, get_args, overload

import torch
from torch import Tensor

from dtbert.kernels import Backend, BackendName
from dtbert.kernels.parameters import Linear
from dtbert.model.batch import PackedBatch
from dtbert.model.bert import Bert
from dtbert.model.config import BertConfig
from dtbert.model.encoder import PackedEncoding
from dtbert.model.kept import LayerKept, layers_kept
from dtbert.model.policy import Policy
from dtbert.model.schedule import LengthSchedule
from dtbert.model.work import Macs, macs_of

Pooling = Literal["mean", "cls"]


class RowsAndKept(NamedTuple):
    """A row of each sequence, and which tokens each layer kept, by the policy that `SequenceModel.executed` says."""

    rows: Tensor
    kept: tuple[LayerKept, ...]


class SequenceModel(Bert):
    """A BERT whose head makes one row of each sequence."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        schedule: Policy | None = None,
        *,
        output_kept: bool = False,
    ) -> Tensor | RowsAndKept:
        """One row for each sequence of a padded batch, in the model's dtype.

        Args:
            input_ids: integers ``[B, S]``, S at most ``max_position_embeddings``.
            attention_mask: ``[B, S]``, 1 at real tokens, 0 at padding; all real by default.
            token_type_ids: integers ``[B, S]``, 0 by default; 1 for the second text of a pair.
            schedule: tokens that each layer keeps; all by default. One without a scorer takes the config's own; a head
                that reads [CLS] always keeps it.
            output_kept: return which tokens every layer kept, too, and what they scored.

        Raises:
            ValueError, TypeError: shapes, devices or dtypes that do not fit, ids outside their table, a schedule with
                another number of layers, or a scorer that reads a span head.
        """
        batch, rows = self._pack(input_ids, attention_mask, token_type_ids)
        found = self._rows(batch, schedule, self.backend, output_kept)
        if isinstance(found, Tensor):
            return found
        return found._replace(kept=tuple(one.unpack(rows, input_ids.shape) for one in found.kept))

    @overload
    def forward_packed(
        self,
        batch: PackedBatch,
        schedule: Policy | None = None,
        *,
        backend: Backend | None = None,
        output_kept: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def forward_packed(
        self,
        batch: PackedBatch,
        schedule: Policy | None = None,
        *,
        backend: Backend | None = None,
        output_kept: Literal[True],
    ) -> RowsAndKept: ...

    def forward_packed(
        self,
        batch: PackedBatch,
        schedule: Policy | None = None,
        *,
        backend: Backend | None = None,
        output_kept: bool = False,
    ) -> Tensor | RowsAndKept:
        """One row for each of the B sequences of a packed batch.

        ``backend`` computes the steps in place of the model's own. ``output_kept`` as `forward`.
        """
        if not torch.compiler.is_compiling():
            batch.check(self.config)
        return self._rows(batch, schedule, backend or self.backend, output_kept)

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
        given = schedule or LengthSchedule.ratios([1] * self.config.num_hidden_layers, scorer="random")
        run = self.executed(given)
        if not isinstance(run, LengthSchedule):
            raise TypeError(
                f"what a {type(given).__name__} takes is known when a text was read: count it by macs_of_kept"
            )
        published, executed = (
            self._count(one, sequence_length, one.lengths(sequence_length), question_length, backend)
            for one in (given.resolve(self.config.own_scorer), run)
        )
        return Macs(published.published, executed.executed)

    def macs_of_kept(
        self,
        policy: Policy,
        sequence_length: int,
        kept: Sequence[int],
        *,
        question_length: int | None = None,
        backend: BackendName = "cpu",
    ) -> Macs:
        """`macs`, of a sequence of which the layers kept so many tokens when the model ran by the policy.

        Raises:
            ValueError: the policy does not fit the model.
        """
        run = self.executed(policy)
        assert run is not None
        return self._count(run, sequence_length, kept, question_length, backend)

    def executed(self, schedule: Policy | None) -> Policy | None:
        """The policy by which the model runs where it is asked for another.

        A head that reads [CLS] alone keeps it in every layer, and of the last layer nothing else: the result is the
        same, for nobody reads the other tokens. A schedule without a scorer takes the config's own.

        Raises:
            TypeError: not a `Policy`.
            ValueError: a schedule with another number of layers.
        """
        layers = self.config.num_hidden_layers
        if schedule is not None:
            if not isinstance(schedule, Policy):
                raise TypeError(f"schedule must be a LengthSchedule, Threshold or TopP, not {type(schedule).__name__}")
            schedule.check_layers(layers)
            schedule = schedule.resolve(self.config.own_scorer)
        if not self.reads_cls:
            return schedule
        return _cls_alone(schedule, layers, self.config.max_position_embeddings)

    def cls_states(
        self,
        batch: PackedBatch,
        schedule: Policy | None,
        backend: Backend,
        skip_layers: Collection[int] = (),
    ) -> Tensor:
        """The final state of each sequence's first token, ``[B, H]``; no other is computed in the last layer."""
        return first_states(self._encode(batch, schedule, backend, skip_layers=skip_layers))

    def _encode(
        self,
        batch: PackedBatch,
        schedule: Policy | None,
        backend: Backend,
        *,
        output_kept: bool = False,
        skip_layers: Collection[int] = (),
    ) -> PackedEncoding:
        return self.encoder(
            batch,
            self.executed(schedule),
            backend=backend,
            output_kept=output_kept,
            skip_layers=skip_layers,
            restores=False,
        )

    def _rows(
        self, batch: PackedBatch, schedule: Policy | None, backend: Backend, output_kept: bool
    ) -> Tensor | RowsAndKept:
        encoding = self._encode(batch, schedule, backend, output_kept=output_kept)
        rows = self._head(encoding, backend)
        return RowsAndKept(rows, layers_kept(encoding, batch.packing.num_tokens)) if output_kept else rows

    @abstractmethod
    def _head(self, encoding: PackedEncoding, backend: Backend) -> Tensor:
        """A row of each sequence, of the tokens that left the last layer."""

    def _count(
        self, run: Policy, length: int, kept: Sequence[int], question_length: int | None, backend: BackendName
    ) -> Macs:
        lengths = (length, *kept)
        return macs_of(run, self.config, lengths, run.scores(lengths), question_length, backend, self.head_macs)


@lru_cache(maxsize=64)  # a schedule is checked where it is made, which takes longer than a launch
def _cls_alone(schedule: Policy | None, num_layers: int, positions: int) -> Policy:
    if schedule is None:
        schedule = LengthSchedule.ratios([1] * num_layers, scorer="random")
    return schedule.first_alone(positions)


def first_states(encoding: PackedEncoding) -> Tensor:
    """The final state of each sequence's first token, ``[B, H]``."""
    firsts = encoding.packing.cu_seqlens[:-1].long()
    return encoding.states if len(encoding.states) == len(firsts) else encoding.states.index_select(0, firsts)


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

    def _head(self, encoding: PackedEncoding, backend: Backend) -> Tensor:
        return backend.linear(self.pooled(first_states(encoding), backend), self.classifier)


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

    def _head(self, encoding: PackedEncoding, backend: Backend) -> Tensor:
        if self.reads_cls:
            return first_states(encoding)
        wide = encoding.states.to(torch.promote_types(self.dtype, torch.float32))
        offsets = encoding.packing.cu_seqlens.long()
        return torch.segment_reduce(wide, "mean", offsets=offsets, axis=0).to(self.dtype)
