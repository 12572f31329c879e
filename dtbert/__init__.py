"""Dynamic-TinyBERT: question answering that drops tokens between layers to fit any compute budget.

import dtbert

qa = dtbert.QuestionAnswerer.load()
answer = qa("Who wrote it?", "The letter was written by Ada Lovelace in 1843.")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtbert.model import (
        BertConfig,
        BertEncoder,
        BertForQuestionAnswering,
        BertForSentenceEmbedding,
        BertForSequenceClassification,
        LayerView,
        LengthSchedule,
        PackedBatch,
        Policy,
        Threshold,
        TopP,
        available_scorers,
        register_scorer,
    )
    from dtbert.qa import Answer, DocumentAnswer, QuestionAnswerer, Trace
    from dtbert.text import Label, SentenceEncoder, TextClassifier
    from dtbert.weights import (
        CheckpointError,
        convert,
        load_classifier,
        load_encoder,
        load_model,
        load_sentence_encoder,
        save_model,
    )

__version__ = "0.1.0"

__all__ = [
    "Answer",
    "BertConfig",
    "BertEncoder",
    "BertForQuestionAnswering",
    "BertForSentenceEmbedding",
    "BertForSequenceClassification",
    "CheckpointError",
    "DocumentAnswer",
    "Label",
    "LayerView",
    "LengthSchedule",
    "PackedBatch",
    "Policy",
    "QuestionAnswerer",
    "SentenceEncoder",
    "TextClassifier",
    "Threshold",
    "TopP",
    "Trace",
    "available_scorers",
    "convert",
    "load_classifier",
    "load_encoder",
    "load_model",
    "load_sentence_encoder",
    "register_scorer",
    "save_model",
]

_MODULES = {
    "dtbert.qa": ("Answer", "DocumentAnswer", "QuestionAnswerer", "Trace"),
    "dtbert.text": ("Label", "SentenceEncoder", "TextClassifier"),
    "dtbert.weights": (
        "CheckpointError",
        "convert",
        "load_classifier",
        "load_encoder",
        "load_model",
        "load_sentence_encoder",
        "save_model",
    ),
}


def __getattr__(name: str) -> Any:
    # Names are loaded on first use, so that `dtbert --help` need not wait for torch.
    if name not in __all__:
        raise AttributeError(f"module 'dtbert' has no attribute {name!r}")
    module = next((module for module, names in _MODULES.items() if name in names), "dtbert.model")
    value = globals()[name] = getattr(import_module(module), name)
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
