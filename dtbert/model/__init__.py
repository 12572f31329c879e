"""The network: its sizes, packed batches, length schedules and scorers, the encoder and the span-answering model."""

from dtbert.model.config import BertConfig
from dtbert.model.encoder import BertEncoder, EncoderOutput
from dtbert.model.overlap import question_overlap
from dtbert.model.packing import PackedBatch, Packing, pack_padded, unpack
from dtbert.model.question_answering import BertForQuestionAnswering, SpanLogits
from dtbert.model.schedule import LengthSchedule, Macs
from dtbert.model.scorers import LayerView, Scorer, available_scorers, register_scorer

__all__ = [
    "BertConfig",
    "BertEncoder",
    "BertForQuestionAnswering",
    "EncoderOutput",
    "LayerView",
    "LengthSchedule",
    "Macs",
    "PackedBatch",
    "Packing",
    "Scorer",
    "SpanLogits",
    "available_scorers",
    "pack_padded",
    "question_overlap",
    "register_scorer",
    "unpack",
]
