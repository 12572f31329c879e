"""The network: its sizes, packed batches, length schedules and scorers, the encoder and the models around it."""

from dtbert.kernels import Packing
from dtbert.model.adaptive import AdaptivePolicy, Threshold, TopP
from dtbert.model.batch import PackedBatch, pack_padded, unpack
from dtbert.model.bert import BertEncoder, BertForQuestionAnswering, EncoderOutput, SpanLogits, SpanLogitsAndKept
from dtbert.model.config import BertConfig, OwnScorer
from dtbert.model.heads import (
    BertForSentenceEmbedding,
    BertForSequenceClassification,
    Pooling,
    RowsAndKept,
    SequenceModel,
)
from dtbert.model.kept import LayerKept
from dtbert.model.overlap import question_overlap
from dtbert.model.policy import Policy
from dtbert.model.schedule import LengthSchedule
from dtbert.model.scorers import LayerView, available_scorers, is_logarithmic, register_scorer
from dtbert.model.work import Macs

__all__ = [
    "AdaptivePolicy",
    "BertConfig",
    "BertEncoder",
    "BertForQuestionAnswering",
    "BertForSentenceEmbedding",
    "BertForSequenceClassification",
    "EncoderOutput",
    "LayerKept",
    "LayerView",
    "LengthSchedule",
    "Macs",
    "OwnScorer",
    "PackedBatch",
    "Packing",
    "Policy",
    "Pooling",
    "RowsAndKept",
    "SequenceModel",
    "SpanLogits",
    "SpanLogitsAndKept",
    "Threshold",
    "TopP",
    "available_scorers",
    "is_logarithmic",
    "pack_padded",
    "question_overlap",
    "register_scorer",
    "unpack",
]
