"""The peer that dtbert must agree with: transformers' BERT with random weights, and dtbert with the same ones."""

import torch
import transformers
from torch import Tensor

from dtbert.kernels import BackendName
from dtbert.kernels.cpu import Cpu
from dtbert.model import BertConfig, BertForQuestionAnswering

HEADS = ("query", "key", "value")
MODULES = {
    "attention_output": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "intermediate": "intermediate.dense",
    "output": "output.dense",
    "output_norm": "output.LayerNorm",
}
TABLES = {"word": "word_embeddings", "position": "position_embeddings", "token_type": "token_type_embeddings"}


def make_config(
    layers: int = 3, heads: int = 4, head_size: int = 8, feed_forward: int = 48, **overrides: object
) -> transformers.BertConfig:
    sizes = {
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "hidden_size": heads * head_size,
        "intermediate_size": feed_forward,
        "vocab_size": 120,
        # Wide enough that attention is far from uniform, as in a trained model.
        "initializer_range": 0.4 / head_size**0.5,
    }
    return transformers.BertConfig(**{**sizes, **overrides})


def make_peer(config: transformers.BertConfig, seed: int = 0) -> transformers.BertForQuestionAnswering:
    torch.manual_seed(seed)
    peer = transformers.BertForQuestionAnswering._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in peer.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
            elif "LayerNorm" in name:
                parameter.normal_(1, 0.1)
    return peer.requires_grad_(False)


def make_dtbert(
    peer: transformers.BertForQuestionAnswering, *, backend: BackendName | None = None, blocked: bool = True
) -> BertForQuestionAnswering:
    """The same network in dtbert; on a CPU its weights are in blocked layout or not, whatever pays on this machine."""
    model = BertForQuestionAnswering(BertConfig.from_dict(peer.config.to_dict()), backend=backend).eval()
    model.load_state_dict(translate(peer.state_dict(), peer.config.num_hidden_layers))
    model.to(peer.dtype).requires_grad_(False)
    if model.backend_name == "cpu":
        Cpu(blocked).prepare(model)
    return model


def translate(theirs: dict[str, Tensor], layers: int) -> dict[str, Tensor]:
    ours = {f"encoder.embeddings.{k}": theirs[f"bert.embeddings.{v}.weight"] for k, v in TABLES.items()}
    for part in ("weight", "bias"):
        ours[f"encoder.embeddings.norm.{part}"] = theirs[f"bert.embeddings.LayerNorm.{part}"]
        ours[f"span.{part}"] = theirs[f"qa_outputs.{part}"]
        for i in range(layers):
            mine, other = f"encoder.layers.{i}", f"bert.encoder.layer.{i}"
            ours[f"{mine}.qkv.{part}"] = torch.cat([theirs[f"{other}.attention.self.{h}.{part}"] for h in HEADS])
            for k, v in MODULES.items():
                ours[f"{mine}.{k}.{part}"] = theirs[f"{other}.{v}.{part}"]
    return ours
