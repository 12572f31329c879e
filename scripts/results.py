"""Measure a model at budgets, beside a constant ratio at the same cost, and draw the figures.

    python scripts/results.py measure run/best docs/results.json squad=dev-v1.1.json.gz reddit=report-reddit.json
    python scripts/results.py baseline run/best docs/results.json squad=dev-v1.1.json.gz --limit 2000
    python scripts/results.py scorers run/best docs/results.json squad=dev-v1.1.json.gz --limit 1000 --budgets 0.5
    python scripts/results.py time run/best docs/results.json squad=dev-v1.1.json.gz --threads 1
    python scripts/results.py no-answer run/best docs/results.json squad=half-no-answer-dev.json
    python scripts/results.py show docs/results.json --plot docs/results.png

Each row is `dtbert evaluate` with a budget, or, for measure and no-answer, with each --schedule instead;
no-answer needs questions with and without an answer, which scripts/split_squad.py makes. Rows that the
JSON file has already, of the same weights, dtype and threads, are not measured again, so an interrupted run goes on;
`time` measures all of its rows anew and replaces them. Processes that write different files may work side by side;
`show` takes several files.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results_report import draw, tables

from dtbert.cli.options import describe_schedule, parse_schedule
from dtbert.evaluation import (
    PreparedQuestions,
    SquadQuestion,
    check_readable,
    evaluate,
    evenly_spaced,
    measure,
    read_squad,
)
from dtbert.files import write_whole
from dtbert.model import LengthSchedule, Policy
from dtbert.qa import QuestionAnswerer
from dtbert.search import KeepQuestion, bootstrap_intervals, constant_ratio, drops_by
from dtbert.weights import resolve_source, weights_sha256

BUDGETS = (1.0, 0.7, 0.5, 0.33, 0.25)
# By which the same constant ratio loses tokens, and whether the question is kept.
SCORERS = {
    "received": False,
    "cls": False,
    "from_question": False,
    "answer": True,
    "overlap": True,
    "answer_overlap": True,
    "answer_overlap_3": True,
    "random": True,
}
_FIELDS = ("what", "questions", "count", "model_sha256", "dtype", "threads", "budget", "schedule")
# These take each budget, or each schedule that is given instead, as it is.
_ONE_BY_ONE = ("measure", "no-answer")
_TIMED = 64
_ROUNDS = 7

Row = dict[str, Any]


def load(path: Path) -> list[Row]:
    rows = json.loads(path.read_text("utf-8")) if path.exists() else []
    if any(field not in row for row in rows for field in _FIELDS):
        raise ValueError(f"{path} holds rows without {', '.join(_FIELDS)}: measure into a new file")
    return rows


def save(path: Path, rows: list[Row]) -> None:
    write_whole(path, "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")


def key(row: Row) -> str:
    """What a row is of: all but what was measured."""
    return json.dumps([row[field] for field in _FIELDS])


def place(row: Row) -> str:
    """What there is one row of: at a budget, whichever schedule it chose."""
    if row["budget"] is None:
        return key(row)
    schedule = row["schedule"]
    compared = (schedule["scorer"], schedule["keep_question"]) if row["what"] == "scorers" else None
    return key({**row, "schedule": compared})


def put(rows: list[Row], row: Row) -> None:
    """Add a row in place of the one that it measures again."""
    rows[:] = [old for old in rows if place(old) != place(row)] + [row]


def plain(schedule: Policy | None) -> dict[str, Any] | None:
    return None if schedule is None else schedule.to_dict()


def measured(answerer: QuestionAnswerer, questions: Sequence[SquadQuestion], schedule: Policy | None) -> Row:
    """F1, exact match and cost of a schedule, and questions a second."""
    found = measure(answerer, questions, schedule)
    check_readable(found.unreadable)
    assert found.cost is not None
    (interval,) = bootstrap_intervals([np.array([score.f1 for score in found.scores.per_question.values()])])
    return {
        "f1": round(found.scores.f1, 3),
        "f1_interval": [round(bound, 3) for bound in interval],
        "exact_match": round(found.scores.exact_match, 3),
        "executed": round(found.cost.executed / found.cost.own_length, 4),
        "published": round(found.cost.published / found.cost.own_length, 4),
        "padded": round(found.cost.executed / found.cost.padded, 4),
        "questions_per_second": round(found.questions_per_second, 2),
    }


def no_answer(answerer: QuestionAnswerer, questions: Sequence[SquadQuestion], schedule: Policy | None) -> Row:
    """How the margin of the best span tells questions with an answer from those without, and F1 at thresholds of it.

    AUROC is the probability that a question with an answer has the greater margin of two, one of either kind.
    """
    if len({one.is_impossible for one in questions}) < 2:
        raise ValueError(
            "no-answer needs questions with and without an answer: scripts/split_squad.py makes such files"
        )
    found = measure(answerer, questions, schedule, no_answer=True, threshold=-math.inf)
    check_readable(found.unreadable)
    assert found.scores.has_answer is not None
    best, texts, margins = found.best["f1"], found.predictions, found.margins

    def at(threshold: float) -> float:
        answers = {key: text if margins[key] >= threshold else "" for key, text in texts.items()}
        return round(evaluate(questions, answers).f1, 3)

    own = np.array([margins[one.id] for one in questions if not one.is_impossible])
    other = np.sort([margins[one.id] for one in questions if one.is_impossible])
    below = np.searchsorted(other, own, "left") + np.searchsorted(other, own, "right")
    return {
        "auroc": round(float(below.mean()) / 2 / len(other), 4),
        "f1_of_answerable": round(found.scores.has_answer.f1, 3),
        "f1_best": round(best.score, 3),
        "threshold_best": round(best.threshold, 3),
        "f1_at_0": at(0.0),
        "f1_own": at(answerer.threshold),
        "threshold_own": answerer.threshold,
        "kept_at_best": round(float((own >= best.threshold).mean()), 4),
        "left_out_at_best": round(float((other < best.threshold).mean()), 4),
    }


def chosen(answerer: QuestionAnswerer, budgets: list[float]) -> Iterator[tuple[float, Policy | None]]:
    for budget in budgets:
        yield budget, None if budget == 1 else answerer.within_budget(budget).schedule


def constant(sample: PreparedQuestions, goal: float, scorer: str, keep_question: KeepQuestion) -> LengthSchedule:
    """The constant ratio that executes as many MACs a question."""
    num_layers = sample.answerer.config.num_hidden_layers
    low, high = 0.05, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        made = constant_ratio(middle, num_layers, **drops_by(scorer, keep_question))
        low, high = (middle, high) if sample.cost(made).executed < goal else (low, middle)
    return constant_ratio(high, num_layers, **drops_by(scorer, keep_question))


def competitors(
    what: str,
    answerer: QuestionAnswerer,
    questions: Sequence[SquadQuestion],
    budgets: list[float],
    schedules: list[Policy],
) -> Iterator[tuple[str, float | None, Policy | None]]:
    """What is measured: the action's name for it, the budget and the schedule."""
    if schedules:
        for given in schedules:
            yield what, None, given
        return
    if what in _ONE_BY_ONE:
        for budget, schedule in chosen(answerer, budgets):
            yield what, budget, schedule
        return
    # Tokenized once, for the schedules that are tried differ in their lengths alone.
    sample = PreparedQuestions(answerer, questions[:: max(1, len(questions) // 200)])
    if what == "scorers":
        for budget in budgets:
            goal = budget * sample.cost().executed
            for scorer, keep_question in SCORERS.items():
                yield what, budget, constant(sample, goal, scorer, keep_question)
        return
    for budget, schedule in chosen(answerer, budgets):
        if schedule is not None:
            yield "searched", budget, schedule
            like = sample.cost(schedule).executed, schedule.scorers[0], schedule.keep_question
            yield "constant", budget, constant(sample, *like)


def time_schedules(
    answerer: QuestionAnswerer, questions: Sequence[SquadQuestion], budgets: list[float]
) -> Iterator[tuple[float, Policy | None, Row]]:
    """Seconds a question, all budgets and the full model in turns, and what part of the MACs saved is time saved."""
    pairs = [(one.question, one.context) for one in questions]
    prepared = PreparedQuestions(answerer, questions)
    schedules = dict(chosen(answerer, [1.0, *budgets]))
    seconds: dict[float, list[float]] = {budget: [] for budget in schedules}
    for _ in range(_ROUNDS + 1):
        for budget, schedule in schedules.items():
            start = time.perf_counter()
            list(answerer.answer_many(pairs, schedule=schedule))
            seconds[budget].append((time.perf_counter() - start) / len(pairs))
    # The first round warms up. Ratios are within a round, so that a machine that slows down slows both.
    for budget, schedule in schedules.items():
        own = seconds[budget][1:]
        ratio = statistics.median(mine / full for mine, full in zip(own, seconds[1.0][1:], strict=True))
        costs = prepared.cost(schedule)
        executed = costs.executed / costs.own_length
        row = {
            "executed": round(executed, 4),
            "time": round(ratio, 4),
            "time_per_macs_saved": None if executed == 1 else round((1 - ratio) / (1 - executed), 3),
            "questions_per_second": round(1 / statistics.median(own), 2),
        }
        yield budget, schedule, row


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    answerer = QuestionAnswerer.load(arguments.model, dtype=getattr(torch, arguments.dtype))
    given = [parse_schedule(spec, "--schedule") for spec in getattr(arguments, "schedule", [])]
    schedules = [schedule.resolve(answerer.own_scorer) for schedule in given]
    if answerer.front is None and arguments.what != "scorers" and not schedules:
        raise ValueError(f"{arguments.model} has no schedules.json: make one with `dtbert search`")
    rows = load(arguments.json)
    model = {
        "model_sha256": weights_sha256(resolve_source(arguments.model)),
        "dtype": arguments.dtype,
        "threads": arguments.threads,
    }

    def record(row: Row, schedule: Policy | None) -> None:
        put(rows, row)
        save(arguments.json, rows)
        print({**row, "schedule": describe_schedule(schedule)}, flush=True)

    for name, path in arguments.questions:
        questions = evenly_spaced(read_squad(path), _TIMED if arguments.what == "time" else arguments.limit)
        about = {"questions": name, "count": len(questions), **model}
        if arguments.what == "time":
            for timed, schedule, row in time_schedules(answerer, questions, arguments.budgets):
                record({"what": "time", **about, "budget": timed, "schedule": plain(schedule), **row}, schedule)
            continue
        for what, budget, schedule in competitors(arguments.what, answerer, questions, arguments.budgets, schedules):
            row = {"what": what, **about, "budget": budget, "schedule": plain(schedule)}
            if key(row) in map(key, rows):
                continue
            find = no_answer if what == "no-answer" else measured
            record(row | find(answerer, questions, schedule), schedule)


def show(arguments: argparse.Namespace) -> None:
    rows = [row for path in arguments.json for row in load(path)]
    print(tables(rows))
    if arguments.plot is not None:
        draw(rows, arguments.plot)


def name_and_file(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE such as squad=dev-v1.1.json, got {text!r}")
    return name, path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    actions = parser.add_subparsers(dest="what", required=True)
    for name in ("measure", "baseline", "scorers", "no-answer", "time"):
        one = actions.add_parser(name)
        one.add_argument("model")
        one.add_argument("json", type=Path)
        one.add_argument("questions", nargs="+", type=name_and_file, metavar="NAME=FILE")
        # Whether there is an answer is asked at full length, unless said otherwise.
        one.add_argument("--budgets", type=float, nargs="+", default=[1.0] if name == "no-answer" else list(BUDGETS))
        if name in _ONE_BY_ONE:
            one.add_argument("--schedule", action="append", default=[], metavar="SPEC", help="as `dtbert evaluate`'s")
        one.add_argument("--limit", type=int, help="questions of each file, evenly spread")
        one.add_argument("--threads", type=int, default=1)
        one.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
        one.set_defaults(run=run)
    one = actions.add_parser("show")
    one.add_argument("json", type=Path, nargs="+")
    one.add_argument("--plot", type=Path)
    one.set_defaults(run=show)
    arguments = parser.parse_args()
    try:
        arguments.run(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"results.py: {error}")


if __name__ == "__main__":
    main()
