"""Pairs in, examples out: any number of questions, tokenized a bounded number at a time."""

from collections.abc import Iterator
from typing import Literal

from tokenizers import Tokenizer

from dtbert.qa.tokenize import Tokens, check_pair, tokenize
from dtbert.qa.windows import Example, PairError, WindowSize

# So many pairs are read at a time, or fewer: until they have so many characters per token of a batch.
BUFFER_PAIRS = 4096
BUFFER_CHARACTERS_PER_TOKEN = 32

Pair = tuple[str, str]
Errors = Literal["raise", "yield"]


def read_examples(
    pairs: Iterator[Pair], tokenizer: Tokenizer, size: WindowSize, batch_tokens: int, errors: Errors
) -> Iterator[list[Example | PairError]]:
    """The examples of pairs, a buffer at a time.

    Raises:
        TypeError, ValueError: for a pair that cannot be read, with its number, from 0, after the examples before it;
            with ``errors="yield"`` such an error stands in its place instead.
        Exception: the iterator's own, after the examples before it.
    """
    number = 0
    while True:
        buffer, failure = _take(pairs, BUFFER_CHARACTERS_PER_TOKEN * batch_tokens)
        if not buffer and failure is None:
            return
        texts = [text for pair in buffer if not isinstance(pair, PairError) for text in pair]
        tokens = iter(tokenize(tokenizer, texts))
        examples = [
            pair if isinstance(pair, PairError) else _example(size, next(tokens), next(tokens)) for pair in buffer
        ]
        for index, wrong in enumerate(examples if errors == "raise" else ()):
            if isinstance(wrong, PairError):
                examples, failure = examples[:index], type(wrong)(f"pair {number + index}: {wrong}")
                break
        yield examples
        if failure is not None:
            raise failure
        number += len(buffer)


def _take(pairs: Iterator[Pair], characters: int) -> tuple[list[Pair | PairError], Exception | None]:
    """Pairs, or what is wrong with them, and the iterator's own error."""
    buffer: list[Pair | PairError] = []
    try:
        for pair in pairs:
            checked = _checked(pair)
            buffer.append(checked)
            characters -= 0 if isinstance(checked, PairError) else len(checked[0]) + len(checked[1])
            if len(buffer) == BUFFER_PAIRS or characters <= 0:
                break
    except Exception as error:
        return buffer, error
    return buffer, None


def _checked(pair: Pair) -> Pair | PairError:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return TypeError(f"expected (question, context), got {type(pair).__name__} {pair!r:.60}")
    try:
        check_pair(*pair)
    except (TypeError, ValueError) as error:
        return type(error)(str(error))  # made anew, for the one that was caught holds on to the texts
    return pair


def _example(size: WindowSize, question: Tokens, context: Tokens) -> Example | PairError:
    try:
        return size.example(question, context)
    except ValueError as error:
        return ValueError(str(error))
