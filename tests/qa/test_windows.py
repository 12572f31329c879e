"""Windows: the whole context, in parts that overlap, none longer than it may be."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from dtbert.model import BertConfig, PackedBatch
from dtbert.qa import QuestionAnswerer
from dtbert.qa.tokenize import Tokens
from dtbert.qa.windows import Example, WindowSize, batches, pack, span_places, windows

CLS, SEP = 101, 102


def make_tokens(count: int, first_id: int = 1000) -> Tokens:
    ids = np.arange(first_id, first_id + count)
    edges = np.arange(count) % 4
    return Tokens("x" * count, ids, np.stack([np.arange(count), np.arange(count) + 1], 1), edges)


@st.composite
def examples(draw: st.DrawFn) -> tuple[WindowSize, Example]:
    stride, question, step = draw(st.integers(0, 20)), draw(st.integers(1, 12)), draw(st.integers(1, 20))
    size = WindowSize(3 + question + stride + step, stride, BertConfig())
    return size, size.example(make_tokens(question), make_tokens(draw(st.integers(1, 200)), 2000))


@given(made=examples())
def test_windows_cover_the_context_and_overlap_by_the_stride(made: tuple[WindowSize, Example]) -> None:
    size, example = made
    parts = example.parts
    assert parts[0][0] == 0
    assert parts[-1][1] == len(example.context.ids)
    assert all(end < len(example.context.ids) for _, end in parts[:-1])
    for (_, end), (begin, _) in zip(parts, parts[1:], strict=False):
        assert end - begin == size.stride
    lengths = [len(window.input_ids) for window in windows(example, CLS, SEP)]
    assert all(length == size.window for length in lengths[:-1])
    assert lengths[-1] <= size.window


@pytest.mark.parametrize(("window", "stride"), [(384, 128), (60, 0), (37, 20), (12, 3)])
def test_windows_are_those_of_the_tokenizers_own_truncation(
    make_answerer: Callable[..., QuestionAnswerer], tokenizer: Tokenizer, window: int, stride: int
) -> None:
    peer = Tokenizer.from_str(tokenizer.to_str())
    peer.enable_truncation(window, stride=stride, strategy="only_second")
    answerer = make_answerer(window=window, stride=stride)
    for words in (1, 5, 30, 31, 32, 33, 34, 400):
        question, context = "Who wrote it?", " ".join(f"w{word}" for word in range(words))
        encoding = peer.encode(question, context)
        expected = [(part.ids, part.type_ids) for part in (encoding, *encoding.overflowing)]
        got = answerer.windows(question, context)
        assert [(part.input_ids, part.token_type_ids) for part in got] == expected
        assert [part.context_start for part in got] == sorted({part.context_start for part in got})


@given(made=st.lists(examples(), min_size=1, max_size=6), batch_tokens=st.integers(60, 400))
def test_batches_hold_every_window_once_within_the_budget(
    made: list[tuple[WindowSize, Example]], batch_tokens: int
) -> None:
    found = [example for _, example in made]
    seen = []
    longest = 10**9
    for parts in batches(found, batch_tokens):
        lengths = [part.num_tokens for part in parts]
        assert len(lengths) * max(lengths) <= batch_tokens
        assert lengths == sorted(lengths, reverse=True)
        assert lengths[0] <= longest
        longest = lengths[-1]
        seen += [(part.row, part.begin, part.end) for part in parts]
    assert sorted(seen) == [(row, *part) for row, example in enumerate(found) for part in example.parts]


@given(made=st.lists(examples(), min_size=1, max_size=4))
def test_packed_windows_are_the_windows_as_lists(made: list[tuple[WindowSize, Example]]) -> None:
    found = [example for _, example in made]
    (parts,) = batches(found, 10**6)
    batch = pack(found, parts, CLS, SEP, torch.device("cpu"))
    listed = {}
    for row, example in enumerate(found):
        for window in windows(example, CLS, SEP):
            listed[row, window.context_start] = window
    chosen = [listed[part.row, part.begin] for part in parts]
    expected = PackedBatch.from_lists([w.input_ids for w in chosen], [w.token_type_ids for w in chosen])
    for name in ("input_ids", "token_type_ids", "position_ids"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    assert batch.packing.seqlens == expected.packing.seqlens
    assert torch.equal(batch.packing.cu_seqlens, expected.packing.cu_seqlens)
    places = span_places(found, parts, torch.device("cpu"))
    assert batch.input_ids[places.cls].tolist() == [CLS] * len(parts)
    assert places.length == int(places.counts.max())
    edges = torch.zeros_like(batch.input_ids)
    for part, first, count in zip(parts, places.firsts, places.counts, strict=True):
        context = found[part.row].context
        assert batch.input_ids[first : first + count].tolist() == context.ids[part.begin : part.end].tolist()
        edges[first : first + count] = torch.from_numpy(context.edges[part.begin : part.end])
    assert torch.equal(places.edges, edges)


def test_question_without_room_says_how_long_it_is_and_may_be() -> None:
    size = WindowSize(50, 20, BertConfig())
    assert len(size.example(make_tokens(26), make_tokens(22)).parts) == 2
    with pytest.raises(ValueError, match=r"27 tokens: .* leaves 20 .* stride of 20; .* 26 tokens"):
        size.example(make_tokens(27), make_tokens(22))
    with pytest.raises(ValueError, match=r"90 tokens: .* leaves 0 "):
        size.example(make_tokens(90), make_tokens(1))


@pytest.mark.parametrize("which", ["question", "context"])
def test_text_without_tokens_is_an_error(which: str) -> None:
    size = WindowSize(50, 20, BertConfig())
    with pytest.raises(ValueError, match=f"the {which} has only"):
        size.example(make_tokens(which != "question"), make_tokens(which != "context"))


@pytest.mark.parametrize(
    ("window", "stride", "error", "message"),
    [
        (513, 128, ValueError, "513 tokens .* 512"),
        (384, 380, ValueError, "stride is 380, .* 379"),
        (384, -1, ValueError, "stride is -1"),
        (5, 0, None, ""),
        (4, 0, ValueError, "window .* 5 tokens, not 4"),
        (-3, 0, ValueError, "window .* 5 tokens, not -3"),
        (384.0, 128, TypeError, "window .* not 384.0"),
        (384, True, TypeError, "stride .* not True"),
    ],
)
def test_window_and_stride_are_checked(window: int, stride: int, error: type[Exception] | None, message: str) -> None:
    if error is None:
        assert WindowSize(window, stride, BertConfig()).window == window
    else:
        with pytest.raises(error, match=message):
            WindowSize(window, stride, BertConfig())


def test_model_with_one_segment_is_refused() -> None:
    with pytest.raises(ValueError, match="1 segment"):
        WindowSize(384, 128, BertConfig(type_vocab_size=1))
