"""Text to tokens: the tokenizer that belongs to a model, and what a text must be to have an answer."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import regex
from numpy.typing import NDArray
from tokenizers import Tokenizer
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from dtbert.qa.vocabulary import documented_errors, read_tokenizer

# A BERT tokenizer takes some 150 bytes a character while it works, so long texts go through it in pieces (characters).
PIECE = 1 << 16
_GROUP = 1 << 20
# BERT's tokenizer starts a new word at each of these: cut before one, a text keeps its tokens.
_WORD_BREAK = re.compile("[ \n.,;、。]")
_BREAKS_IN_TOKENS = re.compile(r"[\s.,;、。]")
# Scripts that write words without spaces, or, as Korean, particles at their end.
_UNSPACED = regex.compile(r"[\p{Line_Break=SA}\p{Hiragana}\p{Katakana}\p{Hangul}]")
# Where words begin and end in these: Unicode's word boundaries (UAX 29), and between syllables of Hangul.
_WORD_EDGE = regex.compile(r"\b|(?<=\p{Hangul})(?=\p{Hangul})", regex.WORD)
_GRAPHEME = regex.compile(r"\X")
# A character before which a grapheme begins, whatever stands there; found backwards.
_BEGINS_GRAPHEME = regex.compile(
    r"(?<!\p{GCB=Prepend})[\p{GCB=Other}--\p{Extended_Pictographic}--\p{InCB=Consonant}]", regex.V1 | regex.REVERSE
)
# Regional indicators, of which two make a flag; found backwards.
_FLAGS = regex.compile(r"\p{GCB=Regional_Indicator}+", regex.REVERSE)

# Marks in `Tokens.edges`.
BEGINS, ENDS = 1, 2


class Tokens(NamedTuple):
    """A text as tokens.

    Attributes:
        text: the text.
        ids: int64 ``[n]``.
        offsets: the characters of the text that each covers, int64 ``[n, 2]``.
        edges: whether a word begins with the token, `BEGINS`, and whether one ends, `ENDS`; their sum, int64 ``[n]``.
    """

    text: str
    ids: NDArray[np.int64]
    offsets: NDArray[np.int64]
    edges: NDArray[np.int64]

    def within(self, start: int, end: int) -> NDArray[np.int64]:
        """The tokens that share a character with a span of the text, ascending."""
        return np.flatnonzero((self.offsets[:, 0] < end) & (self.offsets[:, 1] > start))

    def characters(self, first: int, last: int) -> tuple[int, int]:
        """Where the tokens ``first`` to ``last`` begin and end in the text, in characters; no grapheme is cut.

        So what belongs to no token, such as an accent that the tokenizer strips, stays with the letter before it.
        """
        start, end = int(self.offsets[first, 0]), int(self.offsets[last, 1])
        if self.text.isascii():
            return start, end
        return _grapheme_around(self.text, start)[0], _grapheme_around(self.text, end)[1]


def _grapheme_around(text: str, place: int) -> tuple[int, int]:
    """The grapheme that a place between two characters cuts; the place twice where it cuts none (UAX 29)."""
    flags = _FLAGS.match(text, 0, place)
    if flags:
        # Two characters each: the pattern of graphemes would count all of them again at every one.
        begin = place - (1 if (place - flags.start()) % 2 else 2)
    else:
        before = _BEGINS_GRAPHEME.search(text, 0, place)
        begin = 0 if before is None else before.start()
    for grapheme in _GRAPHEME.finditer(text, begin):
        if grapheme.end() >= place:
            return (grapheme.start(), grapheme.end()) if grapheme.start() < place < grapheme.end() else (place, place)
    return place, place


def check_pair(question: str, context: str) -> None:
    """Check that a question and a context are texts that can be tokenized; needs no model.

    Control characters, NUL among them, are allowed: BERT's tokenizer skips them, and offsets count them.

    Raises:
        TypeError: one of them is not a string.
        ValueError: one is empty, blank, or holds a lone surrogate.
    """
    check_text("question", question)
    check_text("context", context)


def check_text(name: str, text: str) -> None:
    """Check that something is a text that can be tokenized, as `check_pair`, under a name for the message."""
    if not isinstance(text, str):
        raise TypeError(f"the {name} must be a string, not {type(text).__name__}")
    if not text.strip():
        raise ValueError(f"the {name} is {'blank' if text else 'empty'}: give it at least one word")
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the {name} holds a lone surrogate, {text[error.start]!a}, at character {error.start}: it is half of "
            "a character; decode the text with the right encoding, or with errors='replace'"
        ) from None


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a model's folder, from ``tokenizer.json``, else from ``vocab.txt``, as transformers reads it.

    Words, lower case and accents, special and added tokens are those that transformers would use; what it would read
    in another way is refused. Only ``[SEP]`` and the like are text where they stand in a text.

    Raises:
        FileNotFoundError: the folder has neither file.
        OSError: a file cannot be read.
        ValueError: a file is not what its name says, or asks for what dtbert does not do; the message names it.
    """
    return read_tokenizer(folder)


def plain(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer without truncation and padding, reading ``[SEP]`` in a text as text; a copy where that differs.

    Raises:
        TypeError: not a ``tokenizers.Tokenizer``.
    """
    if not isinstance(tokenizer, Tokenizer):
        raise TypeError(
            f"the tokenizer must be a tokenizers.Tokenizer, not {type(tokenizer).__name__}: "
            "make it with dtbert.qa.load_tokenizer"
        )
    if tokenizer.truncation is None and tokenizer.padding is None and tokenizer.encode_special_tokens:
        return tokenizer
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def special_ids(tokenizer: Tokenizer, vocab_size: int) -> tuple[int, int]:
    """The ids of what stands before and behind a text, ``[CLS]`` and ``[SEP]`` by whatever name.

    Raises:
        ValueError: the tokenizer lacks one of them, joins two texts in another way than BERT, or has tokens outside the
            model's vocabulary.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    if tokenizer.post_processor is None:
        missing = [token for token in ("[CLS]", "[SEP]") if token not in vocabulary]
        if missing:
            raise ValueError(f"the tokenizer has no token {' and no '.join(missing)}: it is not a BERT's")
        cls, sep = vocabulary["[CLS]"], vocabulary["[SEP]"]
    else:
        cls, sep = _special_ids_of_a_pair(tokenizer)
    added = tokenizer.get_added_tokens_decoder()
    # What is special and has no place in a pair is never read.
    never = {index for index, token in added.items() if token.special} - {cls, sep}
    token, highest = max(((token, index) for token, index in vocabulary.items() if index not in never), key=_by_id)
    if highest >= vocab_size:
        raise ValueError(
            f"the tokenizer's token {token!r} has id {highest}, the model's vocabulary ends at {vocab_size - 1}: "
            "they are not of the same model"
        )
    return cls, sep


def _by_id(item: tuple[str, int]) -> int:
    return item[1]


def _special_ids_of_a_pair(tokenizer: Tokenizer) -> tuple[int, int]:
    """The two ids that ``[CLS] question [SEP] context [SEP]`` has beside the texts; ValueError for any other form."""
    with documented_errors("the tokenizer"):
        pair = tokenizer.encode("a", "b")
    # Neighbours of one text count as one: which text, by the id where it is none, and the segment.
    form: list[tuple[int | None, int, int]] = []
    for index, text, segment in zip(pair.ids, pair.sequence_ids, pair.type_ids, strict=True):
        place = (text, index if text is None else 0, segment)
        if text is None or not form or form[-1] != place:
            form.append(place)
    if [(text, segment) for text, _, segment in form] == [(None, 0), (0, 0), (None, 0), (1, 1), (None, 1)]:
        cls, _, sep, _, last = (index for _, index, _ in form)
        if sep == last:
            return cls, sep
    raise ValueError(
        "the tokenizer joins two texts in another way than BERT does, [CLS] a [SEP] b [SEP] with segments 0 and 1: "
        f"it gives {' '.join(pair.tokens)} with segments {pair.type_ids}"
    )


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], piece: int = PIECE) -> list[Tokens]:
    """Tokens of each text, without ``[CLS]`` and ``[SEP]``; a text that occurs twice is tokenized once.

    Args:
        tokenizer: made `plain`.
        texts: each has passed `check_pair`.
        piece: longer texts are cut into pieces of about this many characters where that changes no token.
    """
    unique: dict[str, list[list[NDArray[np.int64]]]] = {text: [[], [], []] for text in texts}
    cut = any(len(text) > piece for text in unique) and _starts_words_at_breaks(tokenizer)
    for group in _groups(list(unique), piece if cut else None):
        with documented_errors("the tokenizer"):
            encodings = tokenizer.encode_batch(
                [text[begin:end] for text, begin, end in group], add_special_tokens=False
            )
        for (text, begin, _), encoding in zip(group, encodings, strict=True):
            unique[text][0].append(np.array(encoding.ids, np.int64))
            unique[text][1].append(np.array(encoding.offsets, np.int64).reshape(-1, 2) + begin)
            # Words are counted anew in each piece: from where it begins they are other ones.
            unique[text][2].append(np.array(encoding.word_ids, np.int64) + begin)
    tokens = {}
    for text, pieces in unique.items():
        ids, offsets, words = (np.concatenate(one) if one else np.empty(0, np.int64) for one in pieces)
        places = offsets.reshape(-1, 2)
        tokens[text] = Tokens(text, ids, places, _edges(text, places, words))
    return [tokens[text] for text in texts]


def _edges(text: str, offsets: NDArray[np.int64], words: NDArray[np.int64]) -> NDArray[np.int64]:
    begins = np.ones(len(words) + 1, np.bool_)
    begins[1:-1] = words[1:] != words[:-1]
    if not text.isascii() and _UNSPACED.search(text):
        edges = np.zeros(len(text) + 1, np.bool_)
        edges[[edge.start() for edge in _WORD_EDGE.finditer(text)]] = True
        begins[:-1] |= edges[offsets[:, 0]]
    return BEGINS * begins[:-1] + ENDS * begins[1:]


def _starts_words_at_breaks(tokenizer: Tokenizer) -> bool:
    if not isinstance(tokenizer.normalizer, BertNormalizer) or not isinstance(
        tokenizer.pre_tokenizer, BertPreTokenizer
    ):
        return False
    return not any(
        token.lstrip or token.rstrip or _BREAKS_IN_TOKENS.search(token.content + normalize(token.content))
        for normalize in [tokenizer.normalizer.normalize_str]
        for token in tokenizer.get_added_tokens_decoder().values()
    )


def _groups(texts: Sequence[str], piece: int | None) -> Iterator[list[tuple[str, int, int]]]:
    # Pieces (text, begin, end), about _GROUP characters at a time.
    group: list[tuple[str, int, int]] = []
    characters = 0
    for text in texts:
        begin = 0
        while begin < len(text):
            cut = None if piece is None else _WORD_BREAK.search(text, begin + piece)
            end = len(text) if cut is None else cut.start()
            group.append((text, begin, end))
            characters += end - begin
            begin = end
            if characters >= _GROUP:
                yield group
                group, characters = [], 0
    if group:
        yield group
