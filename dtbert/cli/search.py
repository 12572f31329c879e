"""`dtbert search`: the schedules of a model that are worth their cost."""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.cli.options import (
    QUIET_HELP,
    add_model_options,
    add_window_options,
    holds_many,
    known_scorers,
    other_windows,
    positive,
    resolved,
)
from dtbert.cli.output import check_output, print_json, printable
from dtbert.cli.search_subjects import (
    SCORERS,
    TEXT_SCORERS,
    Subject,
    keep_question,
    kept_questions,
    learnt,
    questions_of,
    starts_of,
    texts_of,
)
from dtbert.cli.search_table import table
from dtbert.cli.tasks import TASK_HELP, add_task_option
from dtbert.files import differing, text_sha256
from dtbert.pictures import check_picture

if TYPE_CHECKING:
    from tqdm import tqdm

    from dtbert.model import Policy
    from dtbert.qa import ScheduleFront
    from dtbert.search import PolicyName, Search
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
Of several policies, as in --policy lengths,threshold, there is one study and
one front; the best of lengths alone stay in it, for a GPU and dtbert export.
With --learn the first thresholds tried are learnt by gradient on the same
questions, of what the full model answers, and measured as the others are.

With --task the file has labelled texts, and the accuracy stands in the place of
F1.
"""
EXAMPLES = f"""\
examples:
  dtbert search held-out.json --model run/best --out run/best/schedules.json
  dtbert search held-out.json --model run/best --out front.json --trials 400 \\
      --scorers cls,answer --budget-range 0.3,0.8 --plot front.png
  dtbert search held-out.json --policy threshold --out thresholds.json
  dtbert search held-out.json --policy lengths,threshold --start lengths.json \\
      --start thresholds.json --out front.json
  dtbert answer --model run/best --budget 0.5 --question Q --context FILE
  dtbert search dev.tsv --task sst2 --model classifier/best --out front.json

{TASK_HELP}"""

# What the names of settings stand for, where an option does not have the same name.
_SHOWN = {"model_sha256": "the model's weights", "question_ids_sha256": "the questions"}
_POLICIES: "tuple[PolicyName, ...]" = ("lengths", "threshold", "top-p")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="questions in SQuAD 1.1's format, .json or .json.gz")
    add_task_option(parser)
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
        type=_policies,
        default=_POLICIES[:1],
        metavar="P,P",
        help="lengths: parts of the length that stay (default); threshold, top-p: shares of the significance, where "
        "the text decides; several in one front",
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
        metavar="A,B",
        help=f"names, or a MODULE:FUNCTION of yours (default: {SCORERS.replace(',', ', ')}; with --task "
        f"{TEXT_SCORERS.replace(',', ', ')})",
    )
    group.add_argument(
        "--keep-question",
        type=keep_question,
        metavar="WHERE",
        help="keep the question, or the first text of a pair, first: yes, no, both (default; of single texts no), or "
        "in so many of the first layers, and then [CLS] alone of it; several such as 3,4,yes",
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

    from dtbert.qa import write_schedules
    from dtbert.qa.budgets import own_scorer, schedules_of
    from dtbert.search import naming_storage
    from dtbert.search.plot import plot_front
    from dtbert.weights import resolve_source

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    starts = starts_of(arguments.start)
    # A schedules.json that is old or damaged is what the search may be there to replace.
    subject = questions_of(arguments) if arguments.task is None else texts_of(arguments)
    if any(one.scorer is None for one in starts):
        source, config = resolve_source(arguments.model, arguments.revision), subject.model.config
        starts = resolved(starts, own_scorer(schedules_of(source, config.num_hidden_layers), config))
    with naming_storage(_storage(arguments)):
        search, front, published = _run(arguments, subject, starts)
        if errors := search.errors():
            print(printable(f"dtbert: {len(errors)} trials failed; the last one: {errors[-1]}"), file=sys.stderr)
        write_schedules(arguments.out, front)
        if arguments.plot is not None:
            plot_front(search, front, Path(arguments.plot), published)
        if arguments.json:
            print_json({**_counts(search), "out": arguments.out, "front": json.loads(front.to_json())})
        else:
            print(table(search, front))
    return 0


def _storage(arguments: argparse.Namespace) -> str:
    from dtbert.search import sqlite_url

    return arguments.storage or sqlite_url(Path(arguments.out).with_suffix(".study.db"))


def _run(
    arguments: argparse.Namespace, subject: Subject, starts: "list[Policy]"
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
            search = _search(arguments, subject, model_sha256, starts)
            if arguments.published is not None:
                published = read_published(arguments.published, subject.model.config, search.evaluator)
            bar.set_description("search")
            show()
            _say_starts(arguments, search, bar)
            search.run(arguments.trials, show)
            bar.set_description("timing the front")
            return search, front_of(search, subject.questions, Path(arguments.file).name, model_sha256), published
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
    if arguments.scorers is not None:
        known_scorers("--scorers", arguments.scorers)  # of which a --start may have one
    if arguments.published is not None and arguments.plot is None:
        raise ValueError("--published says what to draw: it needs --plot")
    if arguments.published is not None:
        Path(arguments.published).stat()  # FileNotFoundError names it
    if arguments.learn and "threshold" not in arguments.policy:
        raise ValueError("--learn says how thresholds are learnt: it needs --policy threshold")
    if len(arguments.policy) > 1 and arguments.sampler == "nsga2":
        raise ValueError("--sampler nsga2 crosses what all trials have: of several policies search with tpe")
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


def _search(arguments: argparse.Namespace, subject: Subject, model_sha256: str, starts: "list[Policy]") -> "Search":
    from dtbert import search as room

    scorers = tuple(known_scorers("--scorers", arguments.scorers or subject.scorers))
    keeps = arguments.keep_question or subject.keep_question
    num_layers = subject.model.config.num_hidden_layers
    settings: dict[str, Any] = {
        "model_sha256": model_sha256,
        "question_ids_sha256": room.ids_sha256(subject.questions),
        **subject.about,
        "scorers": list(scorers),
        "keep_question": keeps,
        "objective": arguments.objective,
        "dtype": str(subject.model.product_dtype),
        **other_windows(arguments),
        # Studies of lengths have always been without it.
        **({} if arguments.policy == _POLICIES[:1] else {"policy": ",".join(arguments.policy)}),
    }
    if arguments.objective == "latency":
        # Times of different devices do not compare.
        settings |= {"device": str(subject.model.device), "threads": arguments.threads}
    _check_same(Path(arguments.out), settings)
    name = arguments.study or f"dtbert-{text_sha256(json.dumps(settings))[:12]}"
    search = room.Search(
        room.open_study(_storage(arguments), name, settings, arguments.sampler, arguments.seed),
        room.space_of(arguments.policy, num_layers, scorers, kept_questions(keeps, num_layers)),
        subject.evaluator(),
        objective=arguments.objective,
        macs_range=arguments.budget_range,
        effort=room.Effort(arguments.rungs, arguments.margin),
    )
    search.add_starts(starts, "start")
    if arguments.learn:
        search.add_starts(learnt(arguments, search, subject.questions), "learnt")
    for part in search.space.parts:
        search.add_starts(part.constants(), part.constant)
    return search


def _counts(search: "Search") -> dict[str, Any]:
    counts, savings = search.counts(), search.savings()
    return {
        "study": search.study.study_name,
        "trials": counts._asdict(),
        "questions_answered": savings.answered,
        "questions_without_rungs": savings.without_rungs,
    }


def _range(text: str) -> tuple[float, float]:
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers such as 0.2,0.9, got {text!r}") from None
    if not 0 <= low < high <= 1:
        raise argparse.ArgumentTypeError(f"expected two growing numbers from 0 to 1, got {text!r}")
    return low, high


def _policies(text: str) -> "tuple[PolicyName, ...]":
    """In the order of `_POLICIES`, by which a study is named."""
    names = [name.strip() for name in text.split(",")]
    if not set(names) <= set(_POLICIES) or len(set(names)) < len(names):
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(_POLICIES)}, each once, got {text!r}")
    return tuple(name for name in _POLICIES if name in names)


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
