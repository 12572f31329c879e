"""`dtbert evaluate --calibrate-cascade`: what a small budget answers as the full model does, and how sure it is."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert import __version__
from dtbert.cli.options import describe_cascade, load_answerer
from dtbert.cli.output import print_json

if TYPE_CHECKING:
    from dtbert.evaluation import SquadQuestion
    from dtbert.qa import QuestionAnswerer

# The first answers are at the best schedule within each. Few: each has its share of the 5% in which a promise may fail.
_BUDGETS = (0.32, 0.38, 0.5, 0.7, 0.8, 0.85)
_SHOWN = (0.9, 0.95, 0.98, 0.99)


def check_folder(option: str, model: str | None) -> None:
    """Raise ValueError unless the model is a folder of this disk, in which the option writes."""
    if model is None or not Path(model).exists():
        raise ValueError(
            f"{option} writes into the model's folder: give it with --model; `dtbert convert` makes one of a hub id"
        )


def calibrate(arguments: argparse.Namespace, questions: "Sequence[SquadQuestion]") -> int:
    """Write a cascade.json into the model's folder, and say what it promises for which work."""
    from tqdm import tqdm

    from dtbert.evaluation import PreparedQuestions, ids_sha256
    from dtbert.evaluation import calibrate as stages_of
    from dtbert.qa import CalibratedCascade, write_cascade
    from dtbert.qa.budgets import schedules_of
    from dtbert.qa.cascade import CASCADE_FILE
    from dtbert.weights import model_folder, resolve_source, weights_sha256

    check_folder("--calibrate-cascade", arguments.model)
    taken = ("budget", "agreement", "schedule", "scorer", "predictions", "choose_threshold", "no_answer", "threshold")
    if given := [name for name in taken if getattr(arguments, name) not in (None, False)]:
        raise ValueError(
            "--calibrate-cascade measures the schedules of the model's schedules.json: give it without "
            f"--{given[0].replace('_', '-')}"
        )
    if not questions:
        raise ValueError(f"{arguments.file}: there are no questions to calibrate on")
    path = resolve_source(arguments.model, arguments.revision)
    # A cascade.json that cannot be read is made anew, too.
    answerer = load_answerer(arguments, with_schedules=False)
    answerer.front = schedules_of(path, answerer.config.num_hidden_layers)
    schedules = _schedules(answerer, arguments.model)
    prepared = PreparedQuestions(answerer, questions)
    with tqdm(total=len(questions) * (1 + len(schedules)), unit="q", disable=arguments.quiet or None) as bar:
        stages = stages_of(prepared, schedules, bar.update)
    name, dtype = Path(arguments.file).name, arguments.dtype or "float32"
    sha256, weights = ids_sha256(questions), weights_sha256(path)
    found = CalibratedCascade(stages, name, len(questions), sha256, dtype, weights, __version__)
    file = model_folder(path) / CASCADE_FILE
    write_cascade(file, found)
    print(f"dtbert: {file}: of {len(stages)} schedules and {len(questions):,} questions", file=sys.stderr)
    promises = [found.within(agreement) for agreement in _SHOWN]
    if arguments.json:
        fields: list[dict[str, Any]] = [
            {**one._asdict(), "schedule": one.schedule and one.schedule.to_dict()} for one in promises
        ]
        print_json({"out": str(file), "questions": len(questions), "cascades": fields})
    else:
        print("agreement    work   first answers")
        for one in promises:
            print(f"{one.agreement:9g}{one.work:8.3f}   {describe_cascade(one)}")
    return 0


def _schedules(answerer: "QuestionAnswerer", model: str) -> list[Any]:
    """The best of its front within each of some budgets."""
    if answerer.front is None:
        raise ValueError(
            f"--calibrate-cascade: {model} has no schedules.json, of which the first answers come: `dtbert search` "
            "makes one"
        )
    cheapest = min((one.macs_fraction for one in answerer.schedules), default=1.0)
    chosen = [answerer.within_budget(budget).schedule for budget in _BUDGETS if budget >= cheapest]
    found = list(dict.fromkeys(one for one in chosen if one is not None))
    if not found:
        raise ValueError(f"--calibrate-cascade: {model}'s schedules.json has no schedule of at most {_BUDGETS[-1]}")
    return found
