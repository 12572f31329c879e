"""The sentence encoder: texts in, one vector of each out."""

from collections.abc import Iterable, Iterator, Sequence
from os import PathLike
from typing import Literal, overload

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor

from dtbert.model import BertForSentenceEmbedding, Policy, Pooling
from dtbert.qa.calls import check_choice
from dtbert.qa.reading import without_errors
from dtbert.qa.tokenize import load_tokenizer
from dtbert.qa.windows import PairError
from dtbert.text.reading import TextTokens
from dtbert.text.running import TextModel, rows_of
from dtbert.weights import load_sentence_encoder, model_folder, resolve_source
from dtbert.weights.pooling import read_pooling


class SentenceEncoder(TextModel):
    """Makes embeddings of texts with a model and its tokenizer.

    Calls share no state that changes, so several threads may use one encoder.

    Args:
        model: `dtbert.load_sentence_encoder` gives one.
        tokenizer: the model's own; its truncation and padding are left out.
        batch_tokens: tokens that go through the model together; by default 2,048 on a CPU and 32,768 elsewhere.
        normalize: whether `encode` brings embeddings to length 1 where it is not told.

    Attributes:
        model, tokenizer, batch_tokens, normalize: as given.
        config: the model's sizes.

    Raises:
        TypeError, ValueError: not such a model, not its tokenizer, or a number of tokens below the model's positions.
    """

    def __init__(
        self,
        model: BertForSentenceEmbedding,
        tokenizer: Tokenizer,
        *,
        batch_tokens: int | None = None,
        normalize: bool = False,
    ) -> None:
        if not isinstance(model, BertForSentenceEmbedding):
            raise TypeError(f"the model must be a BertForSentenceEmbedding, not {type(model).__name__}")
        super().__init__(model, tokenizer, batch_tokens)
        self.model, self.normalize = model, normalize

    @classmethod
    def load(
        cls,
        source: str | PathLike[str],
        *,
        revision: str | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        batch_tokens: int | None = None,
        pooling: Pooling | None = None,
    ) -> "SentenceEncoder":
        """Load a model and its tokenizer.

        Args:
            source: a local folder, or a hub id.
            revision: of the hub id.
            device, dtype: as `dtbert.load_sentence_encoder`.
            batch_tokens: as the class.
            pooling: ``"mean"`` or ``"cls"``; by default this and ``normalize`` are what the model's ``modules.json``
                says, which sentence-transformers writes, and the mean as it is where there is none.

        Raises:
            OSError: a file is missing or cannot be read, or cannot be fetched.
            ValueError, TypeError: a file's content is wrong, or as the class.
        """
        path = resolve_source(source, revision)
        asked = read_pooling(model_folder(path))
        model = load_sentence_encoder(path, device=device, dtype=dtype, pooling=pooling or asked.pooling)
        tokenizer = load_tokenizer(model_folder(path))
        return cls(model, tokenizer, batch_tokens=batch_tokens, normalize=asked.normalize)

    def encode(self, texts: Iterable[str], *, normalize: bool | None = None, schedule: Policy | None = None) -> Tensor:
        """The embedding of each of any number of texts, in order: float32 ``[B, H]`` on the CPU.

        Args:
            texts: strings, each of at most as many tokens as the model has positions: nothing is cut off in silence.
            normalize: bring them to length 1, so that a dot product is the cosine; by default as the attribute.
            schedule: tokens that each layer keeps; all by default. The mean is over those that leave the last layer.

        Raises:
            TypeError: not strings, or not a `Policy`.
            ValueError: a text is empty, blank, without tokens, with lone surrogates, or longer than the model's
                positions, with its number from 0; a schedule with another number of layers than the model.
        """
        if isinstance(texts, str):
            raise TypeError("expected texts, a list of them, and got a single string: write encode([text])")
        rows = list(self.encode_many(texts, normalize=normalize, schedule=schedule))
        return torch.stack(rows) if rows else torch.empty(0, self.model.row_size)

    @overload
    def encode_many(
        self,
        texts: Iterable[str],
        *,
        errors: Literal["raise"] = "raise",
        normalize: bool | None = None,
        schedule: Policy | None = None,
    ) -> Iterator[Tensor]: ...

    @overload
    def encode_many(
        self,
        texts: Iterable[str],
        *,
        errors: Literal["yield"],
        normalize: bool | None = None,
        schedule: Policy | None = None,
    ) -> Iterator[Tensor | PairError]: ...

    def encode_many(
        self,
        texts: Iterable[str],
        *,
        errors: Literal["raise", "yield"] = "raise",
        normalize: bool | None = None,
        schedule: Policy | None = None,
    ) -> Iterator[Tensor | PairError]:
        """The embeddings, float32 ``[H]`` on the CPU, of any number of texts, in order, in bounded memory.

        Args:
            texts: as `encode`; may be endless. Up to 4,096 are read together.
            errors: ``"raise"``, or ``"yield"``, by which a text that cannot be read gives its `TypeError` or
                `ValueError` in place of its embedding.
            normalize, schedule: as `encode`.

        Raises:
            TypeError, ValueError: at once for all but the texts; for a text with its number, from 0.
        """
        check_choice("errors", errors, "raise", "yield")
        chosen = self.resolve(schedule)
        normalize = self.normalize if normalize is None else normalize
        parts = self.reader.read_many(texts)
        found = (one for part in parts for one in self._embedded(part, chosen, normalize))
        return found if errors == "yield" else without_errors(found, "text")

    def _embedded(
        self, read: Sequence[TextTokens | PairError], schedule: Policy | None, normalize: bool
    ) -> list[Tensor | PairError]:
        tokens = [one for one in read if isinstance(one, TextTokens)]
        found = rows_of(self.model, tokens, schedule, self.batch_tokens)
        rows = iter(F.normalize(found) if normalize else found)
        return [next(rows) if isinstance(one, TextTokens) else one for one in read]
