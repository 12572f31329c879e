"""Answers of the shipped model on real questions, against transformers and a decoder of plain loops."""

import gzip
import json
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import load_file
from tokenizers import Encoding, Tokenizer

from dtbert.qa import Answer, QuestionAnswerer
from dtbert.weights import resolve_source

LONGEST = 30


class Question(NamedTuple):
    question: str
    context: str


@pytest.fixture(scope="module")
def questions(shared_data: Path) -> list[Question]:
    """All questions, article by article."""
    with gzip.open(shared_data / "squad" / "squad-dev-v1.1.json.gz") as file:
        articles = json.load(file)["data"]
    return [
        Question(question["question"], paragraph["context"])
        for article in articles
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]


@pytest.fixture(scope="module")
def peer() -> transformers.BertForQuestionAnswering:
    """transformers' model with the shipped weights, expanded by the rule of their model card."""
    folder = resolve_source(None)
    stored = load_file(folder / "model.int8.safetensors")
    tensors = {}
    for name, value in stored.items():
        if not name.endswith(".scale"):
            scale = stored.get(f"{name}.scale")
            wide = value.astype(np.float32)
            tensors[name] = torch.from_numpy(wide if scale is None else wide * scale.astype(np.float32)[:, None])
    config = transformers.BertConfig.from_json_file(folder / "config.json")
    model = transformers.BertForQuestionAnswering._from_config(config, attn_implementation="sdpa")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (set(missing) <= {"bert.embeddings.position_ids"}, unexpected) == (True, [])
    return model.eval().requires_grad_(False)


def encode(questions: list[Question], window: int, stride: int) -> list[list[Encoding]]:
    """Each question's windows, by the tokenizer's own truncation."""
    tokenizer = Tokenizer.from_file(str(resolve_source(None) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(window, stride=stride, strategy="only_second")
    encodings = tokenizer.encode_batch([tuple(question) for question in questions])
    return [[encoding, *encoding.overflowing] for encoding in encodings]


def run_padded(peer: transformers.BertForQuestionAnswering, windows: list[Encoding]) -> dict[int, list[list[float]]]:
    """Start and end logits of each window, by its identity; in padded batches."""
    logits = {}
    windows = sorted(windows, key=len)
    for begin in range(0, len(windows), 8):
        batch = windows[begin : begin + 8]
        shape = (len(batch), max(map(len, batch)))
        ids, mask, segments = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
        for row, window in enumerate(batch):
            ids[row, : len(window)] = torch.tensor(window.ids)
            mask[row, : len(window)] = 1
            segments[row, : len(window)] = torch.tensor(window.type_ids)
        out = peer(ids, mask, segments)
        for row, window in enumerate(batch):
            logits[id(window)] = [out.start_logits[row].tolist(), out.end_logits[row].tolist()]
    return logits


def edges_of_words(context: str) -> tuple[set[int], set[int]]:
    """The characters at which words begin, and at which they end."""
    tokenizer = Tokenizer.from_file(str(resolve_source(None) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.no_truncation()
    encoding = tokenizer.encode(context, add_special_tokens=False)
    words, offsets = [None, *encoding.word_ids, None], encoding.offsets
    begins = {start for token, (start, _) in enumerate(offsets) if words[token + 1] != words[token]}
    return begins, {end for token, (_, end) in enumerate(offsets) if words[token + 1] != words[token + 2]}


def decode(context: str, windows: list[Encoding], logits: dict[int, list[list[float]]]) -> Answer:
    """The best span of all windows by plain loops."""
    begins, ends = edges_of_words(context)
    margins: dict[tuple[int, int], float] = {}
    for window in windows:
        start, end = logits[id(window)]
        inside = [i for i, sequence in enumerate(window.sequence_ids) if sequence == 1]
        for first in inside:
            for last in range(first, min(first + LONGEST, inside[-1] + 1)):
                place = window.offsets[first][0], window.offsets[last][1]
                if place[0] in begins and place[1] in ends:
                    margin = start[first] + end[last] - start[0] - end[0]
                    margins[place] = max(margin, margins.get(place, -math.inf))
    total = 1 + sum(map(math.exp, margins.values()))
    place, margin = max(margins.items(), key=lambda one: one[1])
    sharing = [one for (start, end), one in margins.items() if start < place[1] and place[0] < end]
    return Answer(context[slice(*place)], *place, sum(map(math.exp, sharing)) / total, margin)


# Short paragraphs, for the time they take; and a few of any length, in many windows.
@pytest.mark.parametrize(
    ("window", "stride", "count", "longest_context"),
    [(384, 128, 96, 500), (80, 24, 8, 10_000)],
    ids=["wide", "narrow"],
)
def test_answers_are_those_decoded_from_transformers_logits(
    questions: list[Question],
    peer: transformers.BertForQuestionAnswering,
    window: int,
    stride: int,
    count: int,
    longest_context: int,
) -> None:
    found = [question for question in questions if len(question.context) <= longest_context]
    chosen = found[:: len(found) // count][:count]  # spread over all articles
    encoded = encode(chosen, window, stride)
    assert len(encoded) == count
    assert window == 384 or sum(map(len, encoded)) > 3 * count
    logits = run_padded(peer, [one for windows in encoded for one in windows])
    qa = QuestionAnswerer.load(window=window, stride=stride, max_answer_tokens=LONGEST)
    for question, windows, answer in zip(chosen, encoded, qa.answer_many(chosen), strict=True):
        expected = decode(question.context, windows, logits)
        assert tuple(answer)[:3] == tuple(expected)[:3], question
        assert answer.score == pytest.approx(expected.score, rel=1e-3)
        assert answer.margin == pytest.approx(expected.margin, abs=1e-3)
