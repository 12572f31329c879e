"""Schedule search: which schedules are worth their cost, on which questions; the Pareto front, and its picture."""

try:
    import optuna  # noqa: F401
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"the search needs {error.name}, which is not installed: pip install 'dtbert[search]'", name=error.name
    ) from error

from dtbert.evaluation import ids_sha256
from dtbert.search import plot
from dtbert.search.evaluation import Evaluator, QuestionEvaluator, TextEvaluator, in_search_order
from dtbert.search.front import bootstrap_intervals, front_of
from dtbert.search.records import Record, is_beaten, pareto, records_of
from dtbert.search.space import (
    AdaptiveSpace,
    KeepQuestion,
    MixedSpace,
    PolicyName,
    SearchSpace,
    Space,
    ThresholdSpace,
    TopPSpace,
    constant_ratio,
    drops_by,
    space_of,
)
from dtbert.search.storage import naming_storage, open_study, sqlite_url
from dtbert.search.study import Effort, Search

__all__ = [
    "AdaptiveSpace",
    "Effort",
    "Evaluator",
    "KeepQuestion",
    "MixedSpace",
    "PolicyName",
    "QuestionEvaluator",
    "Record",
    "Search",
    "SearchSpace",
    "Space",
    "TextEvaluator",
    "ThresholdSpace",
    "TopPSpace",
    "bootstrap_intervals",
    "constant_ratio",
    "drops_by",
    "front_of",
    "ids_sha256",
    "in_search_order",
    "is_beaten",
    "naming_storage",
    "open_study",
    "pareto",
    "plot",
    "records_of",
    "space_of",
    "sqlite_url",
]
