"""One question, many documents: the best answers of them all."""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dtbert.qa.reading import Pair
from dtbert.qa.spans import NOTHING, Answer, BestAnswers, Found, ranked, with_nothing
from dtbert.qa.windows import Example, PairError, Prepared

Documents = Mapping[Any, str] | Iterable[str | tuple[Any, str]]


@dataclass(frozen=True, slots=True)
class DocumentAnswer:
    """An answer, and the name of the document that has it: None of the answer that none of them has.

    It unpacks, ``document, answer = found``.
    """

    document: Any
    answer: Answer

    def __iter__(self) -> Iterator[Any]:
        return iter((self.document, self.answer))


def named_texts(documents: Documents) -> Iterator[tuple[Any, str]]:
    """Names and texts: of a mapping, of pairs, or of texts alone, which are numbered from 0.

    Raises:
        TypeError: one is neither a text nor a pair; or the documents are one text.
    """
    if isinstance(documents, str):
        raise TypeError("documents is one text: give a list of texts, or call the answerer with this one")
    if isinstance(documents, Mapping):
        yield from documents.items()
        return
    for number, document in enumerate(documents):
        if isinstance(document, str):
            yield number, document
        elif isinstance(document, tuple | list) and len(document) == 2:
            yield document[0], document[1]
        else:
            raise TypeError(f"document {number} must be a text or (name, text), not {type(document).__name__}")


class BestOfDocuments:
    """The ``k`` best answers of all documents, as these come in."""

    def __init__(self, k: int) -> None:
        self._k = k
        self._log_totals: list[float] = []
        self._best: list[tuple[Any, Found]] = []

    def add(self, names: Iterable[Any], found: Iterable[BestAnswers]) -> None:
        """Take some documents in."""
        for name, best in zip(names, found, strict=True):
            self._log_totals.append(best.log_total)
            self._best += [(name, one) for one in best.found()]
        # Of equals the earlier document.
        self._best = heapq.nsmallest(self._k, self._best, key=lambda one: -one[1].margin)

    def answers(self, threshold: float | None) -> list[DocumentAnswer]:
        """Best first; their probabilities are among all spans of all documents and that none has an answer."""
        total = with_nothing(self._log_totals)
        places = ranked([one for _, one in self._best], threshold)[: self._k]
        names = iter(name for name, _ in self._best)
        return [DocumentAnswer(None if one is NOTHING else next(names), one.answer(total)) for one in places]


def best_of_documents(
    question: str,
    documents: Documents,
    k: int,
    errors: Literal["raise", "skip"],
    prepare_many: Callable[[Iterator[Pair]], Iterator[Prepared]],
    answer: Callable[[Sequence[Example]], list[BestAnswers]],
) -> BestOfDocuments:
    """The best answers to a question, as `QuestionAnswerer.answer_documents` says; read and answered by its methods."""
    best, names = BestOfDocuments(k), deque[Any]()

    def pairs() -> Iterator[Pair]:
        for name, text in named_texts(documents):
            names.append(name)
            yield question, text

    for part in prepare_many(pairs()):
        read = [(names.popleft(), example) for example in part.examples]
        for name, example in read:
            if isinstance(example, PairError) and errors == "raise":
                raise type(example)(f"document {name!r}: {example}")
        usable = [(name, example) for name, example in read if isinstance(example, Example)]
        best.add([name for name, _ in usable], answer([example for _, example in usable]))
    return best
