"""One question, many documents: the best answers of them all."""

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dtbert.qa.spans import NOTHING, Answer, BestAnswers, Found, ranked, with_nothing

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
