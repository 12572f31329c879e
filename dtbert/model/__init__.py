"""The network: its sizes, packed batches, length schedules and scorers, the encoder and the span-answering model."""

from dtbert.kernels import Packing
from dtbert.model.batch import PackedBatch, pack_padded, unpack
from dtbert.model.bert import BertEncoder, BertForQuestionAnswering, EncoderOutput, SpanLogits, SpanLogitsAndKept
from dtbert.model.config import BertConfig, OwnScorer
from dtbert.model.kept import LayerKept
from dtbert.model.overlap import question_overlap
from dtbert.model.schedule import LengthSchedule
from dtbert.model.scorers import LayerView, available_scorers, register_scorer
from dtbert.model.work import Macs

__all__ = [
    "BertConfig",
    "BertEncoder",
    "BertForQuestionAnswering",
    "EncoderOutput",
    "LayerKept",
    "LayerView",
    "LengthSchedule",
    "Macs",
    "OwnScorer",
    "PackedBatch",
    "Packing",
    "SpanLogits",
    "SpanLogitsAndKept",
    "available_scorers",
    "pack_padded",
    "question_overlap",
    "register_scorer",
    "unpack",
]
