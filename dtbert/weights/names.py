"""The hub's names of BERT's tensors and dtbert's parameters: one flat table."""

import re
from collections.abc import Sequence

# {i} is a layer, {p} weight or bias. One parameter for several tensors holds their rows end to end.
_TABLE: dict[str, tuple[str, ...]] = {
    "encoder.embeddings.word": ("bert.embeddings.word_embeddings.weight",),
    "encoder.embeddings.position": ("bert.embeddings.position_embeddings.weight",),
    "encoder.embeddings.token_type": ("bert.embeddings.token_type_embeddings.weight",),
    "encoder.embeddings.norm.{p}": ("bert.embeddings.LayerNorm.{p}",),
    "encoder.layers.{i}.qkv.{p}": (
        "bert.encoder.layer.{i}.attention.self.query.{p}",
        "bert.encoder.layer.{i}.attention.self.key.{p}",
        "bert.encoder.layer.{i}.attention.self.value.{p}",
    ),
    "encoder.layers.{i}.attention_output.{p}": ("bert.encoder.layer.{i}.attention.output.dense.{p}",),
    "encoder.layers.{i}.attention_norm.{p}": ("bert.encoder.layer.{i}.attention.output.LayerNorm.{p}",),
    "encoder.layers.{i}.intermediate.{p}": ("bert.encoder.layer.{i}.intermediate.dense.{p}",),
    "encoder.layers.{i}.output.{p}": ("bert.encoder.layer.{i}.output.dense.{p}",),
    "encoder.layers.{i}.output_norm.{p}": ("bert.encoder.layer.{i}.output.LayerNorm.{p}",),
    "span.{p}": ("qa_outputs.{p}",),
    "pooler.{p}": ("bert.pooler.dense.{p}",),
    "classifier.{p}": ("classifier.{p}",),
}

SPAN_HEAD = ("qa_outputs.weight", "qa_outputs.bias")
POOLER = ("bert.pooler.dense.weight", "bert.pooler.dense.bias")
CLASSIFIER = ("classifier.weight", "classifier.bias")

# What published checkpoints carry beside the network, and what one kind of model has and the other has not.
_EXTRAS = frozenset(("bert.embeddings.position_ids", *SPAN_HEAD, *POOLER))
# TinyBERT's projections to its teacher: one for all layers, or one for each.
_PROJECTION = re.compile(r"fit_dense(s\.\d+)?\.(weight|bias)")


def hub_names(parameter: str) -> tuple[str, ...]:
    """The hub's names of the tensors that make up a parameter of dtbert's models, in the order of their rows."""
    layer = re.search(r"\.(\d+)\.", parameter)
    index = layer[1] if layer else ""
    kind = parameter.rpartition(".")[2]
    pattern = re.sub(r"\.\d+\.", ".{i}.", parameter)
    names = _TABLE.get(pattern) or _TABLE[re.sub(r"(weight|bias)$", "{p}", pattern)]
    return tuple(name.format(i=index, p=kind) for name in names)


def common_prefix(names: Sequence[str]) -> str:
    """What stands before every name where a model was saved inside another: ``module.``, ``_orig_mod.`` and so on."""
    prefix = ""
    while True:
        firsts = {name.removeprefix(prefix).partition(".")[0] for name in names}
        if len(firsts) != 1 or firsts & {"bert", "embeddings", "encoder", "pooler"}:
            return prefix
        (first,) = firsts
        if any(name == prefix + first for name in names):
            return prefix
        prefix += f"{first}."


def encoder_prefix(names: Sequence[str]) -> str:
    """What stands before the encoder's names, where it is neither nothing nor ``bert.``: ``bert_model.`` and so on.

    Empty where there are several encoders.
    """
    table = "embeddings.word_embeddings.weight"
    prefixes = [name.removesuffix(table) for name in names if name == table or name.endswith(f".{table}")]
    return prefixes[0] if len(prefixes) == 1 and prefixes[0] != "bert." else ""


def canonical_name(name: str) -> str:
    """A stored name as the table spells it: with the prefix ``bert.``, and weight and bias for gamma and beta."""
    if name.startswith(("embeddings.", "encoder.", "pooler.")):
        name = f"bert.{name}"
    return name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias")


def is_known_extra(name: str) -> bool:
    """Whether a tensor that the model does not have may be left out: distillation's, pretraining's, another head's."""
    return name in _EXTRAS or name.startswith("cls.") or _PROJECTION.fullmatch(name) is not None
