"""A small model and a batch to profile."""

import pytest
import torch

from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule, PackedBatch
from dtbert.profiling import Ceilings, Profile, describe, profile_forwards, random_batch

CONFIG = BertConfig(
    vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=64,
)  # fmt: skip


@pytest.fixture(scope="session")
def model() -> BertForQuestionAnswering:
    model = BertForQuestionAnswering(CONFIG)
    model.reset_parameters(torch.Generator().manual_seed(0))
    model.prepare()
    return model.eval()


@pytest.fixture(scope="session")
def batch() -> PackedBatch:
    return random_batch(CONFIG, [20, 32, 15], torch.device("cpu"))


@pytest.fixture(scope="session")
def profile(model: BertForQuestionAnswering, batch: PackedBatch) -> Profile:
    """With a schedule and without, on made-up ceilings."""
    schedule = LengthSchedule.absolute([18, 16, 5], scorer="cls")
    dropping, everything = profile_forwards(model, batch, [schedule, None], repeats=3)
    return Profile(describe("a model", model, batch), Ceilings(1e11, 1e10), everything, dropping)
