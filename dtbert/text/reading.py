"""Texts to tokens: one text or a pair, with the special tokens around them that the model was trained with."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from dtbert.model import BertConfig
from dtbert.qa.tokenize import check_text, plain, special_ids, tokenize
from dtbert.qa.windows import PairError

TextOrPair = str | tuple[str, str]

# At most so many texts, of so many characters, are read at a time.
BUFFER_TEXTS, _BUFFER_CHARACTERS = 4096, 2**20


class TextTokens(NamedTuple):
    """What the model reads of a text: ``[CLS] text [SEP]``, or ``[CLS] text [SEP] pair [SEP]``.

    ``ids`` are int64 ``[n]``; the first ``num_first`` of them are of segment 0.
    """

    ids: NDArray[np.int64]
    num_first: int


class TextReader:
    """Tokenizes texts for a model.

    Args:
        tokenizer: the model's own; its truncation and padding are left out.
        config: of the model.

    Raises:
        TypeError, ValueError: not a tokenizer, or not the model's.
    """

    def __init__(self, tokenizer: Tokenizer, config: BertConfig) -> None:
        self.tokenizer, self._config = plain(tokenizer), config
        self._cls, self._sep = special_ids(self.tokenizer, config.vocab_size)

    def read(self, texts: Sequence[TextOrPair]) -> list[TextTokens | PairError]:
        """The tokens of each text, or, in its place, what is wrong with it.

        That is a TypeError for what is neither a string nor two of them, and a ValueError for a text that is empty,
        blank, without tokens, with lone surrogates, or longer than the model's positions.
        """
        checked = [_checked(text) for text in texts]
        tokens = iter(tokenize(self.tokenizer, [one for parts in checked if isinstance(parts, tuple) for one in parts]))
        return [
            self._joined([next(tokens).ids for _ in parts]) if isinstance(parts, tuple) else parts for parts in checked
        ]

    def read_many(self, texts: Iterable[TextOrPair]) -> Iterator[list[TextTokens | PairError]]:
        """`read`, of any number of texts, a bounded number at a time."""
        buffer: list[TextOrPair] = []
        characters = 0
        for text in texts:
            buffer.append(text)
            characters += sum(len(one) for one in _parts(text) if isinstance(one, str))
            if len(buffer) == BUFFER_TEXTS or characters >= _BUFFER_CHARACTERS:
                yield self.read(buffer)
                buffer, characters = [], 0
        if buffer:
            yield self.read(buffer)

    def _joined(self, parts: list[NDArray[np.int64]]) -> TextTokens | PairError:
        for name, ids in zip(("text", "pair"), parts, strict=False):
            if not len(ids):
                return ValueError(f"the {name} has only characters that the tokenizer skips: give it at least one word")
        if len(parts) > self._config.type_vocab_size:
            return ValueError("the model has 1 segment: it was not trained for pairs of texts")
        pieces = [np.array([self._cls], np.int64)]
        for ids in parts:
            pieces += [ids, np.array([self._sep], np.int64)]
        joined, most = np.concatenate(pieces), self._config.max_position_embeddings
        if len(joined) > most:
            what = "text" if len(parts) == 1 else "pair"
            return ValueError(
                f"the {what} has {len(joined)} tokens with its special ones, the model reads {most} at most: shorten "
                "or split it; nothing is cut off in silence"
            )
        return TextTokens(joined, len(parts[0]) + 2)


def _parts(text: Any) -> tuple[Any, ...]:
    return tuple(text) if isinstance(text, tuple | list) else (text,)


def _checked(text: TextOrPair) -> tuple[str, ...] | PairError:
    parts = _parts(text)
    if isinstance(text, tuple | list) and len(parts) != 2:
        return TypeError(f"expected a text or a pair of two, got {len(parts)} in a {type(text).__name__}")
    try:
        for name, part in zip(("text", "pair"), parts, strict=False):
            check_text(name, part)
    except (TypeError, ValueError) as error:
        return type(error)(str(error))  # made anew, for the one that was caught holds on to the texts
    return parts
