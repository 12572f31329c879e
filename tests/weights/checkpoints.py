"""Small checkpoints on the disk for the tests of this folder."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 20,
    "type_vocab_size": 2,
}


def make_tensors(
    *, pooler: bool = False, span_head: bool = True, config: Mapping[str, Any] = CONFIG
) -> dict[str, Tensor]:
    """Random weights of the config by their hub names, written out by hand: the oracle of the table of names."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (config["vocab_size"], hidden),
        "bert.embeddings.position_embeddings.weight": (config["max_position_embeddings"], hidden),
        "bert.embeddings.token_type_embeddings.weight": (config["type_vocab_size"], hidden),
        "bert.embeddings.LayerNorm.weight": (hidden,),
        "bert.embeddings.LayerNorm.bias": (hidden,),
    }
    for layer in range(config["num_hidden_layers"]):
        linears = {f"attention.self.{part}": (hidden, hidden) for part in ("query", "key", "value")}
        linears |= {"attention.output.dense": (hidden, hidden)}
        linears |= {"intermediate.dense": (wide, hidden), "output.dense": (hidden, wide)}
        for name, shape in linears.items():
            shapes[f"bert.encoder.layer.{layer}.{name}.weight"] = shape
            shapes[f"bert.encoder.layer.{layer}.{name}.bias"] = shape[:1]
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            shapes[f"bert.encoder.layer.{layer}.{name}.weight"] = (hidden,)
            shapes[f"bert.encoder.layer.{layer}.{name}.bias"] = (hidden,)
    if pooler:
        shapes |= {"bert.pooler.dense.weight": (hidden, hidden), "bert.pooler.dense.bias": (hidden,)}
    if span_head:
        shapes |= {"qa_outputs.weight": (2, hidden), "qa_outputs.bias": (2,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def write(folder: Path, tensors: Mapping[str, Tensor], name: str = "model.safetensors", **config: object) -> Path:
    """A checkpoint folder; ``name`` says in which form its weights are written."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **config}))
    if name.endswith(".bin"):
        torch.save(dict(tensors), folder / name)
    else:
        save_file(dict(tensors), folder / name)
    return folder


def hub_tensors(model: torch.nn.Module) -> dict[str, Tensor]:
    """The model's weights by hub name, read off its modules one by one."""
    plain = {
        name: value.detach().to_dense() if value.is_mkldnn else value.detach()
        for name, value in model.named_parameters()
    }
    named = {
        "bert.embeddings.word_embeddings.weight": plain.pop("encoder.embeddings.word"),
        "bert.embeddings.position_embeddings.weight": plain.pop("encoder.embeddings.position"),
        "bert.embeddings.token_type_embeddings.weight": plain.pop("encoder.embeddings.token_type"),
    }
    for name, value in plain.items():
        *path, kind = name.split(".")
        if path[0] == "span":
            named[f"qa_outputs.{kind}"] = value
        elif path[0] == "pooler":
            named[f"bert.pooler.dense.{kind}"] = value
        elif path[1] == "embeddings":
            named[f"bert.embeddings.LayerNorm.{kind}"] = value
        elif path[3] == "qkv":
            for part, rows in zip(("query", "key", "value"), value.split(len(value) // 3), strict=True):
                named[f"bert.encoder.layer.{path[2]}.attention.self.{part}.{kind}"] = rows
        else:
            theirs = {
                "attention_output": "attention.output.dense",
                "attention_norm": "attention.output.LayerNorm",
                "intermediate": "intermediate.dense",
                "output": "output.dense",
                "output_norm": "output.LayerNorm",
            }[path[3]]
            named[f"bert.encoder.layer.{path[2]}.{theirs}.{kind}"] = value
    return named


def assert_same(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Same names, and the same values bit for bit."""
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if got[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if not torch.equal(got[name], wanted[name])] == []
