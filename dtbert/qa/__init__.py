"""Text in, answer out: tokens, windows over long contexts, the best spans, and the answerer that joins them."""

from dtbert.qa.answerer import QuestionAnswerer
from dtbert.qa.spans import Answer
from dtbert.qa.tokenize import check_pair, load_tokenizer
from dtbert.qa.windows import Window

__all__ = ["Answer", "QuestionAnswerer", "Window", "check_pair", "load_tokenizer"]
