"""Which tokens stayed, for people: marked in the text, on a page, and over a data set."""

from dtbert.tracing.page import page
from dtbert.tracing.summary import ClassLeft, Summary, summarize
from dtbert.tracing.text import Marks, marked

__all__ = ["ClassLeft", "Marks", "Summary", "marked", "page", "summarize"]
