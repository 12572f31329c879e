"""Whole texts in, a label or a vector of each out: one text or a pair at a time, any number of them."""

from dtbert.text.classifier import Label, TextClassifier
from dtbert.text.reading import TextOrPair, TextReader, TextTokens
from dtbert.text.sentences import SentenceEncoder

__all__ = ["Label", "SentenceEncoder", "TextClassifier", "TextOrPair", "TextReader", "TextTokens"]
