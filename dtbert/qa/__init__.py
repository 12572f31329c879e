"""Text in, answer out: tokens, windows over long contexts, the best spans, and the answerer that joins them."""

from dtbert.qa.answerer import QuestionAnswerer
from dtbert.qa.budgets import Latency, MeasuredSchedule, ScheduleFront, read_schedules, write_schedules
from dtbert.qa.cascade import CalibratedCascade, Cascade, Cascaded, CascadeStage, read_cascade, write_cascade
from dtbert.qa.documents import DocumentAnswer
from dtbert.qa.spans import Answer
from dtbert.qa.thresholds import ChosenThreshold, read_threshold, write_threshold
from dtbert.qa.tokenize import check_pair, load_tokenizer
from dtbert.qa.trace import Trace, TracedLayer, TracedToken, TracedWindow
from dtbert.qa.windows import PairError, Prepared, Window

__all__ = [
    "Answer",
    "CalibratedCascade",
    "Cascade",
    "CascadeStage",
    "Cascaded",
    "ChosenThreshold",
    "DocumentAnswer",
    "Latency",
    "MeasuredSchedule",
    "PairError",
    "Prepared",
    "QuestionAnswerer",
    "ScheduleFront",
    "Trace",
    "TracedLayer",
    "TracedToken",
    "TracedWindow",
    "Window",
    "check_pair",
    "load_tokenizer",
    "read_cascade",
    "read_schedules",
    "read_threshold",
    "write_cascade",
    "write_schedules",
    "write_threshold",
]
