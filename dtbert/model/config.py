"""The sizes of a BERT and where they come from: a hub ``config.json``."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from dtbert.files import Json, naming
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
# Each with a bound that no BERT comes near, and below which no product of two overflows.
_SIZES = {
    "vocab_size": 2**30,
    "hidden_size": 2**24,
    "num_hidden_layers": 2**14,
    "num_attention_heads": 2**24,
    "intermediate_size": 2**24,
    "max_position_embeddings": 2**30,
    "type_vocab_size": 2**30,
}


class OwnScorer(NamedTuple):
    """What a model's tokens are dropped by where a schedule names no scorer: its fields of these names."""

    scorer: str | tuple[str, ...] = "received"
    keep_question: bool = False


@dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; the defaults are Dynamic-TinyBERT's.

    ``scorer`` and ``keep_question`` say what the model learnt to drop by: see `own_scorer`.

    Raises:
        ValueError: a size is not a positive whole number, the heads do not divide the hidden size, the
            activation is unknown, a rate is outside its range, or the scorer is no name.
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
    scorer: str | tuple[str, ...] | None = None
    keep_question: bool = False

    def __post_init__(self) -> None:
        for name, most in _SIZES.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                expected = "at least 1" if not isinstance(value, int) or value < 1 else f"at most {most}"
                raise ValueError(f"{name} must be a whole number of {expected}, not {value!r:.40}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if not isinstance(self.hidden_act, str) or self.hidden_act not in _ACTIVATIONS:
            raise ValueError(f"unknown hidden_act {self.hidden_act!r}: dtbert computes {', '.join(_ACTIVATIONS)}")
        for name, upper in (
            ("layer_norm_eps", 1.0),
            ("hidden_dropout_prob", 1.0),
            ("attention_probs_dropout_prob", 1.0),
            ("initializer_range", sys.float_info.max),
        ):
            value = getattr(self, name)
            if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < upper:
                raise ValueError(f"{name} must be a number of at least 0 and below {upper}, not {value!r:.40}")
        if isinstance(self.scorer, list):
            object.__setattr__(self, "scorer", tuple(self.scorer))
        names = self.scorer if isinstance(self.scorer, tuple) else () if self.scorer is None else (self.scorer,)
        # Whether there is such a scorer is seen where one is needed: it may be registered later.
        if not all(isinstance(name, str) for name in names) or not isinstance(self.keep_question, bool):
            raise ValueError(
                f"scorer must be a name or a list of one per layer, and keep_question true or false, not "
                f"{self.scorer!r:.40} and {self.keep_question!r:.40}"
            )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def activation(self) -> Activation:
        """The kernels' name of ``hidden_act``."""
        return _ACTIVATIONS[self.hidden_act]

    @property
    def own_scorer(self) -> OwnScorer:
        """What schedules drop by that name no scorer; the published one where the config does not say."""
        return OwnScorer() if self.scorer is None else OwnScorer(self.scorer, self.keep_question)

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
        with naming(path):
            return cls.from_dict(Json.parse(Path(path).read_bytes()).of(dict))

    def to_dict(self) -> dict[str, Any]:
        """The fields of a hub ``config.json``."""
        fields = asdict(self)
        if self.scorer is None:
            del fields["scorer"], fields["keep_question"]
        return {"model_type": "bert", "position_embedding_type": "absolute", **fields}
