"""What `dtbert answer` does with a file's questions, and what its answers depend on."""

import argparse
from functools import partial
from typing import TYPE_CHECKING, Any

from dtbert.cli.batch import Work
from dtbert.cli.options import MAX_ANSWER_TOKENS, load_for_answers, other_windows
from dtbert.jobs.lines import answered

if TYPE_CHECKING:
    from dtbert.model import Policy
    from dtbert.qa import Cascade
    from dtbert.qa.calls import Asking


def work_of(arguments: argparse.Namespace) -> Work:
    """Answering with the model that the options name; errors as `load_for_answers`."""
    answerer, schedule = load_for_answers(arguments)
    fields_of = partial(answered, answerer, top=arguments.top, asking=asking(arguments, schedule))
    return Work(answerer, fields_of, settings_of(arguments, schedule, answerer.threshold))


def asking(arguments: argparse.Namespace, schedule: "Policy | Cascade | None") -> "Asking":
    """What the options say of each question."""
    if arguments.budget == "auto":
        return {"budget": "auto", "agreement": arguments.agreement}
    of_all: Any = schedule  # of a cascade, auto alone
    return {"schedule": of_all, "overlap": arguments.overlap, "no_answer": arguments.no_answer}


def settings_of(arguments: argparse.Namespace, schedule: "Policy | Cascade | None", threshold: float) -> dict[str, Any]:
    """What answers depend on beside the questions and the model; options that came later where they say something."""
    longest = arguments.max_answer_tokens
    return {
        **_chosen(schedule),
        "top": arguments.top,
        **other_windows(arguments),
        **({} if longest == MAX_ANSWER_TOKENS else {"max_answer_tokens": longest}),
        **({"overlap": True} if arguments.overlap else {}),
        **({"threshold": threshold} if arguments.no_answer else {}),
    }


def _chosen(schedule: "Policy | Cascade | None") -> dict[str, Any]:
    if not isinstance(schedule, tuple):
        return {"schedule": None if schedule is None else schedule.to_dict()}
    # A cascade without a schedule answers as the full model does.
    first = None if schedule.schedule is None else schedule.schedule.to_dict()
    return {"schedule": first, **({"unsure_to": schedule.unsure_to} if first else {})}
