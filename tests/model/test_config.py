"""BertConfig: what it takes from a hub config.json and what it refuses."""

import json
from pathlib import Path

import pytest
import transformers

from dtbert.model import BertConfig

FIELDS = BertConfig().to_dict()


def test_config_of_transformers_gives_the_same_sizes() -> None:
    theirs = transformers.BertConfig(num_hidden_layers=4, hidden_size=312, intermediate_size=1200, hidden_act="relu")
    config = BertConfig.from_dict(theirs.to_dict())
    assert (config.num_hidden_layers, config.hidden_size, config.intermediate_size) == (4, 312, 1200)
    assert config.activation == "relu"
    assert config.head_size == 26


def test_config_ignores_a_leftover_head_size_and_round_trips() -> None:
    config = BertConfig.from_dict({**FIELDS, "attention_head_size": 26, "torch_dtype": "float32"})
    assert config == BertConfig()
    assert BertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "mish"}, "hidden_act 'mish'"),
        ({"hidden_size": 770}, "hidden_size 770 .* num_attention_heads 12"),
        ({"num_hidden_layers": 0}, "num_hidden_layers .* 1, not 0"),
        ({"vocab_size": "30522"}, "^vocab_size .* not '30522'"),
        ({"type_vocab_size": True}, "^type_vocab_size .* not True"),
        ({"layer_norm_eps": float("nan")}, "layer_norm_eps .* not nan"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob .* not 1.0"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
    ],
)
def test_config_refuses_what_it_cannot_compute(change: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict({**FIELDS, **change})


def test_config_names_the_missing_sizes() -> None:
    with pytest.raises(ValueError, match="lacks vocab_size, hidden_size"):
        BertConfig.from_dict({name: FIELDS[name] for name in FIELDS if name not in ("vocab_size", "hidden_size")})


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", '{"vocab_size": 3}'])
def test_config_file_that_is_not_a_config_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"config\.json"):
        BertConfig.from_file(path)


def test_config_file_that_is_not_there_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"config\.json"):
        BertConfig.from_file(tmp_path / "config.json")
