"""Pairs in, examples out: any number of questions, tokenized a bounded number at a time."""

from collections.abc import Iterator
from typing import Literal

from tokenizers import Tokenizer

from dtbert.qa.tokenize import check_pair, tokenize
from dtbert.qa.windows import Example, PairError, WindowSize

# Pairs are read this many at a time, or fewer: until they have this many characters per token of a batch.
BUFFER_PAIRS = 4096
BUFFER_CHARACTERS_PER_TOKEN = 32

Pair = tuple[str, str]
Errors = Literal["raise", "yield"]


def read_examples(
    pairs: Iterator[Pair], tokenizer: Tokenizer, size: WindowSize, batch_tokens: int, errors: Errors
) -> Iterator[list[Example | PairError]]:
    """Tokenize pairs, a buffer at a time.

    Args:
        pairs: ``(question, context)``.
        tokenizer: made `plain`.
        size: of the windows.
        batch_tokens: a buffer holds at most 32 characters for each, and the rest of its last pair.
        errors: ``"yield"`` puts the error of a pair that cannot be read in its place; ``"raise"`` raises it, with the
            pair's number, from 0, after the examples before it.

    Raises:
        TypeError, ValueError: as ``errors`` has it; whatever ``pairs`` raises, after the examples before it.
    """
    number = 0
    failure: Exception | None = None
    more = True
    while more:
        buffer: list[Pair | PairError] = []
        characters = 0
        more = False
        try:
            for pair in pairs:
                checked = _checked(pair)
                buffer.append(checked)
                if not isinstance(checked, PairError):
                    characters += len(checked[0]) + len(checked[1])
                if len(buffer) == BUFFER_PAIRS or characters >= BUFFER_CHARACTERS_PER_TOKEN * batch_tokens:
                    more = True
                    break
        except Exception as error:
            failure = error
        examples = _examples(buffer, tokenizer, size)
        if errors == "raise":
            for index, wrong in enumerate(examples):
                if isinstance(wrong, PairError):
                    yield examples[:index]
                    raise type(wrong)(f"pair {number + index}: {wrong}") from wrong
        yield examples
        number += len(examples)
    if failure is not None:
        raise failure


def _checked(pair: Pair) -> Pair | PairError:
    if not isinstance(pair, tuple | list) or len(pair) != 2:
        return TypeError(f"expected (question, context), got {type(pair).__name__} {pair!r:.60}")
    try:
        check_pair(*pair)
    except (TypeError, ValueError) as error:
        return type(error)(str(error))  # what was caught holds the texts, by its traceback
    return pair


def _examples(buffer: list[Pair | PairError], tokenizer: Tokenizer, size: WindowSize) -> list[Example | PairError]:
    tokens = iter(tokenize(tokenizer, [text for pair in buffer if not isinstance(pair, PairError) for text in pair]))
    examples: list[Example | PairError] = []
    for pair in buffer:
        if isinstance(pair, PairError):
            examples.append(pair)
            continue
        try:
            examples.append(size.example(next(tokens), next(tokens)))
        except ValueError as error:
            examples.append(ValueError(str(error)))
    return examples
