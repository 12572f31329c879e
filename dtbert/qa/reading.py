"""Pairs in, examples out: any number of questions, tokenized a bounded number at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from tokenizers import Tokenizer

from dtbert.qa.tokenize import check_pair, tokenize
from dtbert.qa.windows import Example, PairError, WindowSize

P = TypeVar("P")
T = TypeVar("T")

# At most so many pairs are read at a time.
BUFFER_PAIRS = 4096

Pair = tuple[str, str] | Mapping[str, str]


def read_examples(
    pairs: Iterator[Pair], tokenizer: Tokenizer, size: WindowSize, characters: int
) -> Iterator[list[Example | PairError]]:
    """The examples of pairs, 4,096 at a time, or fewer that have so many characters; of a wrong pair its error.

    What the iterator raises comes after the examples before it.
    """
    failure: Exception | None = None
    while failure is None:
        buffer, failure = _take(pairs, characters)
        if not buffer:
            break
        tokens = iter(tokenize(tokenizer, [text for one in buffer if not isinstance(one, PairError) for text in one]))
        yield [
            one if isinstance(one, PairError) else _or_error(size.example, next(tokens), next(tokens)) for one in buffer
        ]
    if failure is not None:
        raise failure


def without_errors(found: Iterable[T | PairError], what: str = "pair") -> Iterator[T]:
    """What was found for each pair, up to the first error, which is raised with the pair's number, from 0."""
    for number, one in enumerate(found):
        if isinstance(one, PairError):
            raise type(one)(f"{what} {number}: {one}")
        yield one


def _take(pairs: Iterator[Pair], characters: int) -> tuple[list[tuple[str, str] | PairError], Exception | None]:
    """Pairs, or what is wrong with them, and the iterator's own error."""
    buffer: list[tuple[str, str] | PairError] = []
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


def _checked(pair: Pair) -> tuple[str, str] | PairError:
    if isinstance(pair, Mapping):
        missing = [name for name in ("question", "context") if name not in pair]
        if missing:
            return ValueError(f"the dictionary has no {missing[0]!r}; it has {', '.join(map(repr, pair)) or 'nothing'}")
        question, context = pair["question"], pair["context"]
    elif isinstance(pair, tuple | list) and len(pair) == 2:
        question, context = pair
    else:
        return TypeError(f"expected (question, context), got {type(pair).__name__} {pair!r:.60}")
    return _or_error(check_pair, question, context) or (question, context)


def _or_error(call: Callable[[P, P], T], question: P, context: P) -> T | PairError:
    try:
        return call(question, context)
    except (TypeError, ValueError) as error:
        return type(error)(str(error))  # made anew, for the one that was caught holds on to the texts
