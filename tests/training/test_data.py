"""Windows, labels and batches of training data."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dtbert.evaluation import GoldAnswer, SquadQuestion
from dtbert.model import BertConfig
from dtbert.qa import load_tokenizer
from dtbert.training.data import TrainingSet
from dtbert.weights import resolve_source

CONFIG = BertConfig(max_position_embeddings=64)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(resolve_source(None))


def question(context: str, answer: str, *, start: int | None = None, identifier: str = "q") -> SquadQuestion:
    place = context.find(answer) if start is None else start
    return SquadQuestion(identifier, "", "who was it?", context, (GoldAnswer(answer, None if place < 0 else place),))


@given(
    words=st.lists(
        st.sampled_from(["Zürich,", "naïve", "日本語", "(1843).", "unbelievably", "a-b", "$5.00", "x's"]),
        min_size=1,
        max_size=60,
    ),
    span=st.tuples(st.integers(0, 59), st.integers(1, 4)),
    window=st.integers(14, 40),
    stride=st.integers(0, 5),
)
def test_labelled_tokens_of_each_window_decode_to_the_answer(
    tokenizer: Tokenizer, words: list[str], span: tuple[int, int], window: int, stride: int
) -> None:
    first = span[0] % len(words)
    start = len(" ".join([*words[:first], ""])) if first else 0
    answer = " ".join(words[first : first + span[1]])
    one = question(" ".join(words), answer, start=start)
    data = TrainingSet.from_questions([one], tokenizer, CONFIG, window=window, stride=stride)
    wanted = tokenizer.encode(answer, add_special_tokens=False).ids
    whole = tokenizer.encode(one.context, add_special_tokens=False)
    held = 0
    for index, part in enumerate(data.parts):
        labelled = data.collate([index], torch.device("cpu"))
        assert labelled.batch.packing.num_tokens == part.num_tokens <= window
        begin, end = labelled.starts.item(), labelled.ends.item()
        # The window holds the answer if it holds all its tokens.
        inside = [
            token
            for token, (left, right) in enumerate(whole.offsets)
            if right > start and left < start + len(answer) and part.begin <= token < part.end
        ]
        if len(inside) == len(wanted):
            held += 1
            assert labelled.batch.input_ids[begin : end + 1].tolist() == wanted
            assert (labelled.batch.token_type_ids[begin : end + 1] == 1).all()
        else:
            assert (begin, end) == (0, 0)
    assert held or len(data.parts) > 1


def test_answer_inside_a_token_is_that_token(tokenizer: Tokenizer) -> None:
    data = TrainingSet.from_questions([question("it was anna.", "ann")], tokenizer, CONFIG, window=40, stride=0)
    labelled = data.collate([0], torch.device("cpu"))
    begin, end = labelled.starts.item(), labelled.ends.item()
    assert tokenizer.decode(labelled.batch.input_ids[begin : end + 1].tolist()) == "anna"


@pytest.mark.parametrize(
    ("context", "answer", "reason"),
    [
        ("ada wrote it", "", "the answer is empty"),
        ("ada \u200b wrote it", "\u200b", "only characters that the tokenizer skips"),
        ("ada wrote it", "grace", "does not have 'grace' at its answer_start"),
    ],
)
def test_question_without_a_trainable_answer_is_listed(
    tokenizer: Tokenizer, context: str, answer: str, reason: str
) -> None:
    good, bad = question("ada wrote it", "ada", identifier="good"), question(context, answer, identifier="bad")
    data = TrainingSet.from_questions([bad, good], tokenizer, CONFIG, window=40, stride=0)
    assert data.ids == ["good"]
    assert len(data.unusable) == 1
    assert data.unusable[0].startswith("bad: ")
    assert reason in data.unusable[0]
    with pytest.raises(ValueError, match=r"none of 1 questions .* bad: "):
        TrainingSet.from_questions([bad], tokenizer, CONFIG, window=40, stride=0)


def test_windows_of_a_question_without_an_answer_are_labelled_with_cls(tokenizer: Tokenizer) -> None:
    none = SquadQuestion("none", "", "who was it?", "ada wrote it " * 20, ())
    data = TrainingSet.from_questions([none, question("ada wrote it", "ada")], tokenizer, CONFIG, window=40, stride=0)
    assert data.unusable == []
    assert len(data.parts) > 2
    assert data.labels.tolist() == [[0, 0]] * (len(data.parts) - 1) + [[6, 6]]


def test_batches_hold_every_window_once_within_the_tokens(tokenizer: Tokenizer) -> None:
    contexts = ["ada wrote it " * (1 + index % 7) for index in range(40)]
    questions = [question(context, "ada", identifier=str(index)) for index, context in enumerate(contexts)]
    data = TrainingSet.from_questions(questions, tokenizer, CONFIG, window=20, stride=2)
    first = data.batches(64, seed=1, epoch=0)
    assert Counter(index for batch in first for index in batch) == Counter(range(len(data.parts)))
    assert max(sum(data.parts[index].num_tokens for index in batch) for batch in first) <= 64
    # As full as the order allows: no batch had room for the next one's first window.
    for batch, after in zip(first, first[1:], strict=False):
        assert sum(data.parts[index].num_tokens for index in [*batch, after[0]]) > 64
    assert first == data.batches(64, seed=1, epoch=0)
    assert first != data.batches(64, seed=1, epoch=1)
    assert first != data.batches(64, seed=2, epoch=0)
