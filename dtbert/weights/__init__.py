"""Where parameters come from: folders, files, the hub, the shipped model; and how they are written."""

from dtbert.weights.checkpoint import CheckpointError, has_classifier, model_folder, weights_sha256
from dtbert.weights.hub import resolve_source
from dtbert.weights.labels import places_of
from dtbert.weights.load import (
    load_classifier,
    load_encoder,
    load_model,
    load_sentence_encoder,
    load_trainable,
    load_trainable_classifier,
)
from dtbert.weights.save import convert, save_model, to_hub_tensors

__all__ = [
    "CheckpointError",
    "convert",
    "has_classifier",
    "load_classifier",
    "load_encoder",
    "load_model",
    "load_sentence_encoder",
    "load_trainable",
    "load_trainable_classifier",
    "model_folder",
    "places_of",
    "resolve_source",
    "save_model",
    "to_hub_tensors",
    "weights_sha256",
]
