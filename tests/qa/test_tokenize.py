"""Tokenizers from files, texts that cannot be tokenized, and offsets that are right for every Unicode text."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import regex
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import BertPreTokenizer

from dtbert.qa import check_pair, load_tokenizer
from dtbert.qa.tokenize import BEGINS, ENDS, Tokens, plain, special_ids, tokenize
from dtbert.weights import resolve_source

UNKNOWN = 100
# Surrogates cannot be tokenized; what Python knows no properties of cannot be checked against it.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
# Characters whose case, decomposition or cleaning has another length, beside such as have tokens of their own.
ODD = st.sampled_from(
    "aZ9 .,\t\n\0\u00ad\u200b\u200d\u202e\ufeff\ufffdéßİ\u0131ŉǅΣ\u017f\ufb01½Å\u212b한국漢字日本"
    "\u0301\u0323\u093f\U0001d400😀👩🏽❤\ufe0fمر"
)
TEXTS = st.text(st.one_of(ODD, CHARACTERS, st.sampled_from("the quick brown fox 1843")), max_size=60)


def normalize(text: str) -> str:
    """BERT's normalization of uncased text, by Python's own tables."""
    stripped = (c for c in unicodedata.normalize("NFD", text) if unicodedata.category(c) != "Mn")
    return "".join(c.lower() for c in stripped)


def is_subsequence(part: str, whole: str) -> bool:
    rest = iter(whole)
    return all(character in rest for character in part)


@given(text=TEXTS)
@example("ŉ İstanbul straße ﬁne 한국어")
@example("e\u0301\u0323a\u200db")
def test_offsets_are_the_characters_that_became_the_token(tokenizer: Tokenizer, text: str) -> None:
    (tokens,) = tokenize(tokenizer, [text])
    starts, ends = tokens.offsets.T
    assert (starts >= 0).all()
    assert (starts < ends).all()
    assert (ends <= len(text)).all()
    assert (np.diff(starts) >= 0).all()
    assert (np.diff(ends) >= 0).all()
    for token_id, start, end in zip(tokens.ids, starts, ends, strict=True):
        if token_id == UNKNOWN:
            continue
        token = tokenizer.id_to_token(int(token_id)).removeprefix("##")
        assert token[0] in normalize(text[start])
        assert token[-1] in normalize(text[end - 1])
        assert is_subsequence(token, normalize(text[start:end]))
    covered = {place for start, end in tokens.offsets for place in range(start, end)}
    assert {place for place, c in enumerate(text) if c.isascii() and c.isalnum()} <= covered


@given(text=TEXTS, piece=st.integers(1, 20))
@example("a \u0301b. \u0301c", 1)
def test_pieces_of_a_long_text_have_the_tokens_of_the_whole(tokenizer: Tokenizer, text: str, piece: int) -> None:
    whole, cut = tokenize(tokenizer, [text])[0], tokenize(tokenizer, [text], piece)[0]
    np.testing.assert_array_equal(cut.ids, whole.ids)
    np.testing.assert_array_equal(cut.offsets, whole.offsets)


def test_text_is_not_cut_where_a_token_may_hold_a_break(tokenizer: Tokenizer) -> None:
    other = Tokenizer.from_str(tokenizer.to_str())
    other.add_tokens(["u. s. army"])
    (tokens,) = tokenize(plain(other), ["the u. s. army came"], piece=1)
    assert [other.id_to_token(int(i)) for i in tokens.ids] == ["the", "u. s. army", "came"]


def test_long_text_is_tokenized_in_bounded_groups(tokenizer: Tokenizer) -> None:
    text = "Ada Lovelace, 1843. " * 60_000
    (tokens,) = tokenize(tokenizer, [text])
    one = tokenize(tokenizer, ["Ada Lovelace, 1843. "])[0]
    np.testing.assert_array_equal(tokens.ids, np.tile(one.ids, 60_000))
    start, end = tokens.characters(len(tokens.ids) - 2, len(tokens.ids) - 1)
    assert (start, text[start:end]) == (len(text) - 6, "1843.")


@pytest.mark.parametrize(
    ("text", "first", "last", "expected"),
    [
        ("cafe\u0301 au lait", 0, 0, "cafe\u0301"),
        ("caf\u00e9 au lait", 0, 0, "caf\u00e9"),
        ("un cafe\u0301", 1, 1, "cafe\u0301"),
        ("I \u2764\ufe0f you", 1, 1, "\u2764\ufe0f"),
        ("\u0301abc", 0, 0, "abc"),
        ("İstanbul or Ankara", 2, 2, "Ankara"),
        ("ﬁne print", 2, 2, "print"),
        ("zero\u200bwidth end", 0, 3, "zero\u200bwidth"),
        ("tab\tnul\0 \U0001f600 end", 4, 4, "end"),
        ("\u202e\u0645\u0631\u062d\u0628\u0627\u202c is hello", 6, 6, "hello"),
        ("東京は日本の首都", 3, 4, "日本"),
        ("\U00020000\U00020001x end", 3, 3, "end"),
    ],
)
def test_characters_of_a_token_are_python_indices(
    tokenizer: Tokenizer, text: str, first: int, last: int, expected: str
) -> None:
    (tokens,) = tokenize(tokenizer, [text])
    start, end = tokens.characters(first, last)
    assert text[start:end] == expected


def test_equal_texts_are_tokenized_once_and_given_back_in_order(tokenizer: Tokenizer) -> None:
    first, second, third = tokenize(tokenizer, ["one two", "three", "one two"])
    assert first is third
    assert (first.text, second.text) == ("one two", "three")


def test_special_tokens_in_a_text_are_read_as_text(tokenizer: Tokenizer) -> None:
    (tokens,) = tokenize(tokenizer, ["[CLS] a [SEP]"])
    assert [tokenizer.id_to_token(int(i)) for i in tokens.ids] == ["[", "cl", "##s", "]", "a", "[", "sep", "]"]


def test_tokenizer_json_loses_its_truncation_and_padding(tokenizer: Tokenizer) -> None:
    carried = json.loads((resolve_source(None) / "tokenizer.json").read_text("utf-8"))
    assert carried["truncation"]
    assert carried["padding"]
    short, long = tokenize(tokenizer, ["word", "word " * 300])
    assert (len(short.ids), len(long.ids)) == (1, 300)


def test_plain_leaves_the_callers_tokenizer_as_it_is() -> None:
    theirs = Tokenizer.from_file(str(resolve_source(None) / "tokenizer.json"))
    ours = plain(theirs)
    assert theirs.truncation is not None
    assert ours.truncation is None
    assert plain(ours) is ours


def write_vocabulary(tokenizer: Tokenizer, folder: Path) -> None:
    vocabulary = tokenizer.get_vocab()
    (folder / "vocab.txt").write_text("\n".join(sorted(vocabulary, key=vocabulary.__getitem__)) + "\n", "utf-8")


@pytest.fixture(scope="module")
def from_vocabulary(tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("vocabulary")
    write_vocabulary(tokenizer, folder)
    return load_tokenizer(folder)


@given(text=TEXTS)
def test_vocab_txt_gives_the_tokens_of_tokenizer_json(
    tokenizer: Tokenizer, from_vocabulary: Tokenizer, text: str
) -> None:
    one, other = tokenize(tokenizer, [text])[0], tokenize(from_vocabulary, [text])[0]
    np.testing.assert_array_equal(one.ids, other.ids)
    np.testing.assert_array_equal(one.offsets, other.offsets)


def test_vocabulary_keeps_the_number_of_every_line(tmp_path: Path) -> None:
    # U+2028 and U+0085 end a line for str.splitlines, but are tokens of some vocabularies.
    (tmp_path / "vocab.txt").write_text("[CLS]\n\u2028\n\x85\n[UNK]\n\nlast\n", "utf-8")
    vocabulary = load_tokenizer(tmp_path).get_vocab()
    assert (vocabulary["[UNK]"], vocabulary["last"]) == (3, 5)


def test_tokenizer_config_says_whether_words_are_lower_case(tmp_path: Path) -> None:
    (tmp_path / "vocab.txt").write_text("[UNK]\nParis\nparis\npâris\n", "utf-8")
    for config, expected in (
        (None, [2, 2]),
        ({"do_lower_case": True, "strip_accents": None}, [2, 2]),
        ({"do_lower_case": False}, [1, 0]),
        ({"strip_accents": False}, [2, 3]),
    ):
        if config is not None:
            (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), "utf-8")
        assert tokenize(load_tokenizer(tmp_path), ["Paris Pâris"])[0].ids.tolist() == expected


def test_tokenizer_json_comes_before_vocab_txt(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(tokenizer.to_str(), "utf-8")
    (tmp_path / "vocab.txt").write_text("[UNK]\n", "utf-8")
    assert load_tokenizer(tmp_path).get_vocab_size() == tokenizer.get_vocab_size()


def test_folder_without_tokenizer_is_an_error_that_names_the_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"tokenizer\.json nor vocab\.txt"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"tokenizer.json": b"{"}, r"tokenizer\.json"),
        ({"tokenizer.json": b"{}"}, r"tokenizer\.json"),
        ({"tokenizer.json": b"\xff\xfe"}, r"tokenizer\.json"),
        ({"vocab.txt": b"\xff\xfe"}, r"vocab\.txt"),
        ({"vocab.txt": b"one\ntwo\n"}, r"vocab\.txt: .*\[UNK\]"),
        ({"vocab.txt": b"[UNK]\n", "tokenizer_config.json": b"{"}, r"tokenizer_config\.json"),
        (
            {"vocab.txt": b"[UNK]\n", "tokenizer_config.json": b"[]"},
            r"tokenizer_config\.json: .* found a list",
        ),
        (
            {"vocab.txt": b"[UNK]\n", "tokenizer_config.json": b'{"do_lower_case": "no"}'},
            r'do_lower_case: .* found "no"',
        ),
    ],
)
def test_broken_tokenizer_files_are_errors_that_name_the_file(
    tmp_path: Path, files: dict[str, bytes], message: str
) -> None:
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_something_else_than_a_tokenizer_is_a_type_error() -> None:
    with pytest.raises(TypeError, match=r"tokenizers\.Tokenizer, not dict"):
        plain({})


def test_special_ids_are_checked_against_the_vocabulary(tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert special_ids(tokenizer, 30522) == (101, 102)
    with pytest.raises(ValueError, match=r"id 30521, .* 30520"):
        special_ids(tokenizer, 30521)
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n", "utf-8")
    with pytest.raises(ValueError, match=r"\[SEP\]"):
        special_ids(load_tokenizer(tmp_path), 10)


@pytest.mark.parametrize(
    ("question", "context", "error", "message"),
    [
        ("", "text", ValueError, "the question is empty"),
        ("who?", "", ValueError, "the context is empty"),
        (" \t\n\u00a0\u3000", "text", ValueError, "the question is blank"),
        ("who?", "\n\n", ValueError, "the context is blank"),
        (None, "text", TypeError, "the question .* not NoneType"),
        ("who?", b"text", TypeError, "the context .* not bytes"),
        ("who?", "ab\ud83dcd", ValueError, r"the context .* '\\ud83d', at character 2"),
        ("\udc00", "text", ValueError, r"the question .* '\\udc00', at character 0"),
    ],
)
def test_check_pair_refuses_what_has_no_answer(
    question: str, context: str, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        check_pair(question, context)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Ada's unhappily xqzt.", ["Ada", "'", "s", "unhappily", "xqzt", "."]),
        ("naïve 3.14", ["naïve", "3", ".", "14"]),
        ("東京は日本", ["東", "京", "は", "日", "本"]),
        # Kana end where kanji and other kana begin; Thai and Hangul may end anywhere.
        ("アダが書いた", ["アダ", "が", "書", "い", "た"]),
    ],
)
def test_words_begin_and_end_where_the_script_has_it(tokenizer: Tokenizer, text: str, expected: list[str]) -> None:
    (tokens,) = tokenize(tokenizer, [text])
    begins = tokens.offsets[tokens.edges & BEGINS > 0, 0]
    ends = tokens.offsets[tokens.edges & ENDS > 0, 1]
    words = dict.fromkeys(text[start : min(end for end in ends if end > start)] for start in begins)
    assert list(words) == expected


@pytest.mark.parametrize("text", ["가나다라", "สวัสดี"])
def test_words_of_scripts_with_particles_or_without_spaces_may_be_cut(text: str) -> None:
    pieces = dict.fromkeys(["[UNK]", text[0], *(f"##{character}" for character in text[1:])])
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    letters = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]"))
    letters.pre_tokenizer = BertPreTokenizer()
    (tokens,) = tokenize(letters, [text])
    graphemes = [match.start() for match in regex.finditer(r"\X", text)]
    assert len(graphemes) > 3
    assert tokens.offsets[tokens.edges & BEGINS > 0, 0].tolist() == graphemes


GRAPHEMES = [
    "🇩🇪",
    "🇩🇪\u0301",
    "🇩",
    "🇫🇷",
    "👩‍👩‍👧",
    "क्षि",
    "e\u0301\u0323",
    "👍🏽",
    "한",
    "a",
    " ",
    "ﷺ",
    "\u0600\u0661",
    "#️⃣",
    "z",
]


@given(st.lists(st.sampled_from(GRAPHEMES), min_size=1, max_size=12), st.data())
def test_characters_of_tokens_cut_no_grapheme(parts: list[str], data: st.DataObject) -> None:
    text = "".join(parts)
    # A token for each code point: the worst that a vocabulary can do.
    places = np.stack([np.arange(len(text)), np.arange(len(text)) + 1], 1)
    tokens = Tokens(text, np.zeros(len(text), np.int64), places, np.full(len(text), BEGINS + ENDS))
    edges = [match.start() for match in regex.finditer(r"\X", text)] + [len(text)]
    first = data.draw(st.integers(0, len(text) - 1))
    last = data.draw(st.integers(first, len(text) - 1))
    start, end = tokens.characters(first, last)
    assert start == max(edge for edge in edges if edge <= first)
    assert end == min(edge for edge in edges if edge >= last + 1)


def test_graphemes_of_a_long_text_without_words_are_found_in_linear_time() -> None:
    text = "🇩🇪" * 100_000
    places = np.array([[0, 1], [1, len(text) - 1]])
    tokens = Tokens(text, np.zeros(2, np.int64), places, np.full(2, BEGINS + ENDS))
    # Looked for from the beginning, each flag would count all before it: minutes.
    assert tokens.characters(1, 1) == (0, len(text))
