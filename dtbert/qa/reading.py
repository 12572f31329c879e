"""Pairs in, examples out: any number of questions, tokenized a bounded number at a time."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

from tokenizers import Tokenizer

from dtbert.model import BertConfig
from dtbert.qa.calls import check_count
from dtbert.qa.tokenize import check_pair, plain, special_ids, tokenize
from dtbert.qa.windows import Example, PairError, Prepared, Window, WindowSize, windows

P = TypeVar("P")
T = TypeVar("T")

# At most so many pairs are read at a time.
BUFFER_PAIRS = 4096
# Fewer, once they have this many characters per token of a batch.
BUFFER_CHARACTERS_PER_TOKEN = 32

Pair = tuple[str, str] | Mapping[str, str]


class Reader:
    """Reads questions and contexts as a model's tokens, in windows; the arguments are `QuestionAnswerer`'s."""

    def __init__(self, tokenizer: Tokenizer, config: BertConfig, window: int, stride: int, batch_tokens: int) -> None:
        self.window, self.stride = window, stride
        self._size = WindowSize(window, stride, config)
        check_count("batch_tokens", batch_tokens, window)
        self.tokenizer, self.config, self.batch_tokens = plain(tokenizer), config, batch_tokens
        self._cls, self._sep = special_ids(self.tokenizer, config.vocab_size)

    def prepare(self, pairs: Iterable[Pair]) -> Prepared:
        """Tokenize questions once, to answer them with many schedules by `answer_prepared`; all are held in memory.

        Raises:
            TypeError, ValueError: as `answer_many`, at once.
        """
        return Prepared(tuple(without_errors(one for part in self.prepare_many(pairs) for one in part.examples)))

    def prepare_many(self, pairs: Iterable[Pair]) -> Iterator[Prepared]:
        """Tokenize any number of questions, a part at a time in bounded memory; wrong pairs leave their errors."""
        characters = BUFFER_CHARACTERS_PER_TOKEN * self.batch_tokens
        buffers = read_examples(iter(pairs), self.tokenizer, self._size, characters)
        return (Prepared(tuple(examples)) for examples in buffers)

    def windows(self, question: str, context: str) -> list[Window]:
        """What the model reads to answer: at least one window, in order of the text.

        Raises:
            TypeError, ValueError: as calling the answerer.
        """
        return windows(self._example(question, context), self._cls, self._sep)

    def _example(self, question: str, context: str) -> Example:
        check_pair(question, context)
        return self._size.example(*tokenize(self.tokenizer, [question, context]))


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
