"""`dtbert search`: the schedules of a model that are worth their cost."""

import argparse
import json
import math
import sys
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.cli.options import (
    QUIET_HELP,
    add_model_options,
    add_window_options,
    describe_schedule,
    holds_many,
    known_scorers,
    load_answerer,
    other_windows,
    parse_schedule,
    placement,
    positive,
    resolved,
)
from dtbert.cli.output import check_output, print_json, printable
from dtbert.files import differing, text_sha256
from dtbert.pictures import check_picture

if TYPE_CHECKING:
    from tqdm import tqdm

    from dtbert.evaluation import SquadQuestion
    from dtbert.model import Policy
    from dtbert.qa import MeasuredSchedule, QuestionAnswerer, ScheduleFront
    from dtbert.search import Search
    from dtbert.search.plot import PublishedPoint

SUMMARY = "find the schedules of a model that are worth their cost"
DESCRIPTION = """\
Search schedules with Optuna: F1 up, and multiply-accumulates (MACs) or measured
time down. Those that no other beats go to --out; a file schedules.json in the
model's folder is what --budget of the other commands chooses from.

Use questions that the model was not trained on, and report on others than
these: F1 of a schedule that was chosen on them is a little too high.

Trials are kept in a study, by default in a SQLite file beside --out. The same
command goes on where an interrupted one stopped, and a larger --trials adds to
it; several processes with different --seed may work on one study, each with
one thread unless --threads says otherwise. What --start gives is tried first,
and constant ratios, three for each scorer and choice of --keep-question: 36 by
default. A trial is given up when, on its first questions, a schedule that costs
no more is clearly better. Of schedules that cost the same to 0.5% those that
are clearly worse are left out.

With --policy threshold a layer keeps the tokens whose share of the significance
is at least its threshold, with top-p the fewest that together have a part of
it: the text decides how many. What that takes is counted as it is answered.
With --learn the first thresholds tried are learnt by gradient on the same
questions, of what the full model answers, and measured as the others are.
"""
EXAMPLES = """\
examples:
  dtbert search held-out.json --model run/best --out run/best/schedules.json
  dtbert search held-out.json --model run/best --out front.json --trials 400 \\
      --scorers cls,answer --budget-range 0.3,0.8 --plot front.png
  dtbert search held-out.json --policy threshold --out thresholds.json
  dtbert answer --model run/best --budget 0.5 --question Q --context FILE
"""

_SCORERS = "received,cls,from_question,value_norm,answer,answer_overlap"
# What the names of settings stand for, where an option does not have the same name.
_SHOWN = {"model_sha256": "the model's weights", "question_ids_sha256": "the questions"}
_KEEP_QUESTION = {"yes": (True,), "no": (False,), "both": (False, True)}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="questions in SQuAD 1.1's format, .json or .json.gz")
    parser.add_argument("--out", metavar="FILE", required=True, help="where the schedules go, as JSON")
    parser.add_argument("--plot", metavar="FILE", help="draw the front and all trials: .png, .pdf or .svg")
    parser.add_argument("--published", metavar="TSV", help="draw published points too: length_config, macs, f1")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    group = parser.add_argument_group("search")
    group.add_argument("--trials", type=positive, default=200, metavar="N", help="in the whole study (default: 200)")
    group.add_argument("--objective", choices=("macs", "latency"), default="macs", help="the cost (default: macs)")
    group.add_argument(
        "--sampler", choices=("nsga2", "tpe"), default="tpe", help="Bayesian (tpe, default), or evolution"
    )
    group.add_argument(
        "--policy",
        choices=("lengths", "threshold", "top-p"),
        default="lengths",
        help="parts of the length that stay (default), or shares of the significance, where the text decides",
    )
    group.add_argument(
        "--learn",
        type=_weights,
        default=(),
        metavar="W,W",
        help="with thresholds: start from those learnt by gradient, one for each weight of the work, such as 1,3",
    )
    group.add_argument(
        "--scorers",
        default=_SCORERS,
        metavar="A,B",
        help=f"names, or a MODULE:FUNCTION of yours (default: {_SCORERS.replace(',', ', ')})",
    )
    group.add_argument(
        "--keep-question", choices=("yes", "no", "both"), default="both", help="keep the question first (default: both)"
    )
    group.add_argument(
        "--budget-range",
        type=_range,
        default=(0.1, 1.0),
        metavar="LOW,HIGH",
        help="parts of the full model's MACs to search in (default: 0.1,1)",
    )
    group.add_argument(
        "--start", metavar="SPEC", action="append", default=[], help="try a schedule first, or all of a schedules.json"
    )
    group.add_argument("--seed", type=int, default=0, metavar="N", help="each process its own (default: 0)")
    group.add_argument("--storage", metavar="URL", help="of the study, as Optuna's (default: SQLite beside --out)")
    group.add_argument("--study", metavar="NAME", help="of the study (default: made from model, questions, options)")
    group = parser.add_argument_group("effort")
    group.add_argument("--limit", type=positive, metavar="N", help="N questions only, evenly spread over the articles")
    group.add_argument(
        "--rungs",
        type=_rungs,
        default=(100, 200, 400, 800),
        metavar="N,N",
        help="questions after which bad trials end, or none (default: 100,200,400,800)",
    )
    group.add_argument(
        "--margin",
        type=float,
        default=1.0,
        metavar="X",
        help="how clearly, in standard errors; more against many schedules (default: 1)",
    )
    add_model_options(parser)
    add_window_options(parser.add_argument_group("windows"))
    parser.set_defaults(threads=1)


def run(arguments: argparse.Namespace) -> int:
    _check(arguments)
    import optuna

    from dtbert.evaluation import read_squad
    from dtbert.qa import write_schedules
    from dtbert.qa.budgets import own_scorer, schedules_of
    from dtbert.search import in_search_order, naming_storage
    from dtbert.search.plot import plot_front
    from dtbert.weights import resolve_source

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    starts = _starts(arguments.start)
    questions = in_search_order(read_squad(arguments.file))[: arguments.limit]
    # A schedules.json that is old or damaged is what the search may be there to replace.
    answerer = load_answerer(arguments, with_schedules=False)
    source = resolve_source(arguments.model, arguments.revision)
    if any(one.scorer is None for one in starts):
        own = own_scorer(schedules_of(source, answerer.config.num_hidden_layers), answerer.config)
        starts = resolved(starts, own)
    with naming_storage(_storage(arguments)):
        search, front, published = _run(arguments, answerer, questions, starts)
        if errors := search.errors():
            print(printable(f"dtbert: {len(errors)} trials failed; the last one: {errors[-1]}"), file=sys.stderr)
        write_schedules(arguments.out, front)
        if arguments.plot is not None:
            plot_front(search, front, Path(arguments.plot), published)
        if arguments.json:
            print_json({**_counts(search), "out": arguments.out, "front": json.loads(front.to_json())})
        else:
            print(_table(search, front))
    return 0


def _storage(arguments: argparse.Namespace) -> str:
    from dtbert.search import sqlite_url

    return arguments.storage or sqlite_url(Path(arguments.out).with_suffix(".study.db"))


def _run(
    arguments: argparse.Namespace,
    answerer: "QuestionAnswerer",
    questions: "list[SquadQuestion]",
    starts: "list[Policy]",
) -> "tuple[Search, ScheduleFront, list[PublishedPoint]]":
    """Search with a progress bar: the search, its front, and the published points to draw beside it."""
    from tqdm import tqdm

    from dtbert.search import front_of
    from dtbert.search.plot import read_published
    from dtbert.weights import resolve_source, weights_sha256

    model_sha256 = weights_sha256(resolve_source(arguments.model, arguments.revision))
    with tqdm(total=arguments.trials, unit="trial", disable=arguments.quiet or None) as bar:
        done, published = "", []

        def show() -> None:
            nonlocal done
            finished = search.num_finished()
            done = f" after {finished} trials"
            bar.n = min(finished, arguments.trials)
            bar.refresh()

        try:
            bar.set_description("full model")
            search = _search(arguments, answerer, questions, model_sha256, starts)
            if arguments.published is not None:
                published = read_published(arguments.published, answerer.config, search.evaluator)
            bar.set_description("search")
            show()
            _say_starts(arguments, search, bar)
            search.run(arguments.trials, show)
            bar.set_description("timing the front")
            return search, front_of(search, questions, Path(arguments.file).name, model_sha256), published
        except KeyboardInterrupt:
            bar.close()
            print(f"dtbert: interrupted{done}; the same command goes on from there", file=sys.stderr)
            raise


def _say_starts(arguments: argparse.Namespace, search: "Search", bar: "tqdm[Any]") -> None:
    """Say what comes before the sampler's own draws: it may be all that --trials allows."""
    first, left = search.num_waiting(), arguments.trials - search.num_finished()
    if arguments.quiet or not first or left <= 0:
        return
    draws = left - first if left > first else f"none, for --trials is {arguments.trials}"
    text = f"{first} schedules come first, constant ratios and those of --start; then {arguments.sampler} draws {draws}"
    bar.write(f"dtbert: {text}", file=sys.stderr)


def _check(arguments: argparse.Namespace) -> None:
    """Say what is wrong with the options before the model is loaded."""
    try:
        import dtbert.search
    except ModuleNotFoundError as error:
        raise ValueError(str(error)) from error
    for option in ("out", "plot"):
        given = getattr(arguments, option)
        if given is not None:
            sources = (arguments.file, arguments.published)
            check_output(f"--{option}", Path(given), *sources, model=arguments.model)
    if not arguments.out.endswith(".json"):
        raise ValueError(f"--out {arguments.out}: the ending must be .json")
    if arguments.plot is not None:
        check_picture(Path(arguments.plot), "search")
    _check_replaced(Path(arguments.out))
    known_scorers("--scorers", arguments.scorers)  # of which a --start may have one
    if arguments.published is not None and arguments.plot is None:
        raise ValueError("--published says what to draw: it needs --plot")
    if arguments.published is not None:
        Path(arguments.published).stat()  # FileNotFoundError names it
    if arguments.learn and arguments.policy != "threshold":
        raise ValueError("--learn says how thresholds are learnt: it needs --policy threshold")
    if arguments.seed < 0:
        raise ValueError(f"--seed must be 0 or more, not {arguments.seed}")
    dtbert.search.Effort(arguments.rungs, arguments.margin)


def _check_replaced(out: Path) -> None:
    """Raise FileExistsError if there is something else than schedules, damaged ones included."""
    if not out.is_file() or out.name == "schedules.json" or out.stat().st_size == 0:
        return
    if not holds_many(out.read_text("utf-8", errors="replace")):
        raise FileExistsError(f"--out {out} is there already and holds no schedules: name another file, or remove it")


def _check_same(out: Path, settings: dict[str, Any]) -> None:
    """Raise FileExistsError if there is a front that other settings made; one that is damaged may be replaced."""
    from dtbert.qa import read_schedules

    try:
        front = read_schedules(out)
    except (FileNotFoundError, ValueError):
        return
    before = {"model_sha256": front.model_sha256, "question_ids_sha256": front.question_ids_sha256, **front.settings}
    names = [name for name in differing(before, settings) if front.settings or name in before]
    if names:
        shown = ", ".join(_SHOWN.get(name, name) for name in names)
        raise FileExistsError(
            f"--out {out} holds schedules that were searched with other settings ({shown}): name another file, or "
            "remove that one"
        )


def _search(
    arguments: argparse.Namespace,
    answerer: "QuestionAnswerer",
    questions: "list[SquadQuestion]",
    model_sha256: str,
    starts: "list[Policy]",
) -> "Search":
    from dtbert import search as room

    scorers = tuple(known_scorers("--scorers", arguments.scorers))
    num_layers, keep_question = answerer.config.num_hidden_layers, _KEEP_QUESTION[arguments.keep_question]
    settings: dict[str, Any] = {
        "model_sha256": model_sha256,
        "question_ids_sha256": room.ids_sha256(questions),
        "window": answerer.window,
        "scorers": list(scorers),
        "keep_question": arguments.keep_question,
        "objective": arguments.objective,
        "dtype": str(answerer.model.dtype),
        **other_windows(arguments),
        # Studies of lengths have always been without it.
        **({} if arguments.policy == "lengths" else {"policy": arguments.policy}),
    }
    if arguments.objective == "latency":
        # Times of different devices do not compare.
        settings |= {"device": str(answerer.model.device), "threads": arguments.threads}
    _check_same(Path(arguments.out), settings)
    name = arguments.study or f"dtbert-{text_sha256(json.dumps(settings))[:12]}"
    search = room.Search(
        room.open_study(_storage(arguments), name, settings, arguments.sampler, arguments.seed),
        room.SPACES[arguments.policy](num_layers, scorers, keep_question),
        room.QuestionEvaluator(answerer, questions),
        objective=arguments.objective,
        macs_range=arguments.budget_range,
        effort=room.Effort(arguments.rungs, arguments.margin),
    )
    search.add_starts(starts, "start")
    if arguments.learn:
        search.add_starts(_learnt(arguments, search, answerer, questions), "learnt")
    search.add_starts(search.space.constants(), search.space.constant)
    return search


def _learnt(
    arguments: argparse.Namespace, search: "Search", answerer: "QuestionAnswerer", questions: "list[SquadQuestion]"
) -> "list[Policy]":
    """Thresholds that the model learns on the questions, once a study, for each scorer and each weight."""
    from dtbert.model import PackedBatch, Policy, Threshold
    from dtbert.search import ThresholdSpace
    from dtbert.training.learnt_thresholds import ThresholdLearning, learn_thresholds
    from dtbert.weights import load_model

    space = search.space
    assert isinstance(space, ThresholdSpace)
    # Gradients need the plain steps, and weights that are laid out for no processor.
    model = load_model(**{**placement(arguments), "dtype": None}, source=arguments.model, backend="reference")
    windows = [
        PackedBatch.from_lists([window.input_ids], [window.token_type_ids], model.device)
        for one in questions
        for window in answerer.windows(one.question, one.context)
    ]
    found: list[Policy] = []
    for scorer, keep, weight in product(space.scorers, space.keep_question, arguments.learn):
        key = f"learnt {scorer} {keep} {weight:g}"
        if key not in search.study.user_attrs:
            start = Threshold((0.0,) * space.num_layers, scorer=scorer, keep_question=keep)
            learnt = learn_thresholds(model, windows, start, ThresholdLearning(weight))
            search.study.set_user_attr(key, space.nearest(learnt).to_dict())
        found.append(Policy.from_dict(search.study.user_attrs[key]))
    return found


def _starts(specs: list[str]) -> "list[Policy]":
    """The schedules that ``--start`` names."""
    from dtbert.qa import read_schedules

    schedules = []
    for spec in specs:
        if spec.endswith(".json") and holds_many(Path(spec).read_text("utf-8")):
            schedules += [entry.schedule for entry in read_schedules(spec).schedules if entry.schedule is not None]
        else:
            schedules.append(parse_schedule(spec, "--start"))
    return schedules


def _counts(search: "Search") -> dict[str, Any]:
    counts, savings = search.counts(), search.savings()
    return {
        "study": search.study.study_name,
        "trials": counts._asdict(),
        "questions_answered": savings.answered,
        "questions_without_rungs": savings.without_rungs,
    }


def _table(search: "Search", front: "ScheduleFront") -> str:
    counts, savings = search.counts(), search.savings()
    saved = 1 - savings.answered / savings.without_rungs
    return "\n".join(
        [
            f"trials      {counts.finished:,}: {counts.all_questions} answered all questions, "
            f"{counts.ended_early} ended early, {counts.failed} failed",
            f"questions   {savings.answered:,} answered instead of {savings.without_rungs:,}: {saved:.0%} saved",
            "",
            "    MACs    time     F1   95% interval     EM   kept after each layer, scorer",
            *(_row(entry) for entry in (*front.schedules, front.full_model)),
        ]
    )


def _row(entry: "MeasuredSchedule") -> str:
    low, high = entry.f1_interval
    # Time is, as MACs are, a part of the full model's.
    latency = entry.latency
    time = 1 if latency is None else latency.seconds / latency.full_model_seconds
    scores = f"{entry.f1:5.2f}  {low:5.1f} to {high:5.1f}  {entry.exact_match:5.2f}"
    # Rounded up, so that what is read here is a budget that suffices.
    return f"  {entry.least_budget:6.4f}{time:8.3f}  {scores}   {describe_schedule(entry.schedule)}"


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers such as 0.2,0.9, got {text!r}") from None
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"expected two growing numbers from 0 to 1, got {text!r}")
    return low, high


def _weights(text: str) -> tuple[float, ...]:
    try:
        weights = tuple(float(part) for part in text.split(","))
    except ValueError:
        weights = ()
    if not weights or not all(0 < weight < math.inf for weight in weights):
        raise argparse.ArgumentTypeError(f"expected numbers above 0 such as 1,3, got {text!r}")
    return weights


def _rungs(text: str) -> tuple[int, ...]:
    if text == "none":
        return ()
    return tuple(positive(part.strip()) for part in text.split(","))
