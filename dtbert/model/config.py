"""The sizes of a BERT and where they come from: a hub ``config.json``."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from dtbert.kernels import Activation

# The hub's names of the activations.
_ACTIVATIONS: dict[str, Activation] = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_python": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
_SIZES = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "intermediate_size",
    "max_position_embeddings",
    "type_vocab_size",
)


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; the defaults are Dynamic-TinyBERT's.

    Raises:
        ValueError: a size is not a positive whole number, the heads do not divide the hidden size, the
            activation is unknown, or a rate is outside its range.
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        for name in _SIZES:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"unknown hidden_act {self.hidden_act!r}: dtbert computes {', '.join(_ACTIVATIONS)}")
        for name, upper in (
            ("layer_norm_eps", 1.0),
            ("hidden_dropout_prob", 1.0),
            ("attention_probs_dropout_prob", 1.0),
            ("initializer_range", float("inf")),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < upper:
                raise ValueError(f"{name} must be a number of at least 0 and below {upper}, not {value!r}")

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def activation(self) -> Activation:
        """The kernels' name of ``hidden_act``."""
        return _ACTIVATIONS[self.hidden_act]

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "BertConfig":
        """From the fields of a hub ``config.json``; fields that do not shape the network are ignored.

        Raises:
            ValueError: it is not a BERT encoder's, a size is missing, or as the class.
        """
        expected: dict[str, Any] = {
            "model_type": "bert",
            "position_embedding_type": "absolute",
            "is_decoder": False,
            "add_cross_attention": False,
        }
        for name, value in expected.items():
            if fields.get(name, value) != value:
                raise ValueError(f"{name} is {fields[name]!r}: dtbert loads BERT encoders, where it is {value!r}")
        missing = [name for name in _SIZES if name not in fields]
        if missing:
            raise ValueError(f"the config lacks {', '.join(missing)}")
        return cls(**{name: fields[name] for name in cls.__dataclass_fields__ if name in fields})

    @classmethod
    def from_file(cls, path: str | PathLike[str]) -> "BertConfig":
        """From a ``config.json``.

        Raises:
            OSError: the file cannot be read.
            ValueError: it is not a JSON object, or as `from_dict`; the message names the file.
        """
        try:
            fields = json.loads(Path(path).read_text("utf-8"))
            if not isinstance(fields, dict):
                raise ValueError(f"expected a JSON object, found {type(fields).__name__}")
            return cls.from_dict(fields)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The fields of a hub ``config.json``."""
        return {"model_type": "bert", "position_embedding_type": "absolute", **asdict(self)}
