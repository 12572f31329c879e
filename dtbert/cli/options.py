"""Options that several commands share: the model, the schedule, threads; and what they stand for."""

import argparse
import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.cli.output import printable
from dtbert.files import naming

if TYPE_CHECKING:
    from dtbert.model import OwnScorer, Policy
    from dtbert.qa import Cascade, QuestionAnswerer

REVISION_HELP = "branch, tag or commit of a hub id"
THREADS_HELP = "CPU threads (default: torch's choice)"
QUIET_HELP = "no progress bar (there is none outside a terminal), no notes of how far a run has come"

WINDOW, STRIDE, MAX_ANSWER_TOKENS = 384, 128, 30
_MOST_THREADS = 4096
DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn")

SCHEDULE_HELP = """\
schedules:
  SPEC is a list with one entry per layer of the model, or a schedule in JSON,
  or a file that holds one; brackets and spaces as you like:
    269,253,252,202,104,34   whole numbers: tokens that stay after each layer
    1,1,0.9,0.6,0.4,0.2      else: parts of the text's own length that stay
    1,1,1,1,1,1              ones alone are parts: nothing is dropped
    {"kind": "ratios", "length_config": [1, 1, 0.9, 0.6, 0.4, 0.2]}
    {"kind": "threshold", "thresholds": [0, 0, 0.001, 0.002, 0.004, 0.01]}
    {"kind": "top_p", "parts": [1, 1, 0.95, 0.9, 0.8, 0.6], "floor": 0.1}
  With the last two the text decides how many tokens stay: those whose part of
  the significance is at least a threshold, or the fewest that have together
  such a part of it. Each kind may have "accumulate": true, by which a token's
  scores are summed over the layers, and "skip_layers": [4], which are left out.
  NAME, the scorer that chooses the tokens, is one of received,
  received_off_diagonal, received_max, cls, from_question, value_norm, answer,
  overlap, answer_overlap, answer_overlap_3, random; or a function of yours,
  MODULE:FUNCTION, as Python imports it from here; or a list of them with one
  per layer. A schedule that names none takes the model's own, with the question
  kept where it does.
"""

_LIST = re.compile(r"\s*[\[(]?[\d.,\s+\-eE]*[\])]?\s*")


def add_model_options(parser: argparse.ArgumentParser, *, shipped: bool = True) -> None:
    """The model, where it runs and in what numbers; whether the one inside dtbert will do."""
    default = " (default: the one inside dtbert)" if shipped else ""
    group = parser.add_argument_group("model")
    group.add_argument("--model", metavar="SOURCE", help=f"a hub id, a folder or a file{default}")
    group.add_argument("--revision", metavar="R", help=REVISION_HELP)
    group.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1, ... (default: cpu)")
    group.add_argument("--dtype", choices=DTYPES, help="number format of the computation (default: float32)")
    group.add_argument("--threads", type=threads, metavar="N", help=THREADS_HELP)


def add_window_options(group: Any) -> None:
    group.add_argument("--window", type=positive, default=WINDOW, metavar="N", help=f"tokens read at a time ({WINDOW})")
    group.add_argument("--stride", type=int, default=STRIDE, metavar="N", help=f"tokens that windows share ({STRIDE})")


def add_answer_options(parser: argparse.ArgumentParser) -> None:
    """What `answer` and `evaluate` may say of windows and answers."""
    group = parser.add_argument_group("windows and answers")
    add_window_options(group)
    longest = f"longest answer, in tokens ({MAX_ANSWER_TOKENS})"
    group.add_argument("--max-answer-tokens", type=positive, default=MAX_ANSWER_TOKENS, metavar="N", help=longest)
    group.add_argument("--no-answer", action="store_true", help='the answer may be that there is none, which is ""')
    group.add_argument(
        "--threshold",
        type=_finite,
        metavar="M",
        help="margin below which there is no answer (default: of the model's no_answer.json, else 0)",
    )


def other_windows(arguments: argparse.Namespace) -> dict[str, int]:
    """Window and stride where they are not the default: what a run is compared by, beside what it always was."""
    given = {"window": arguments.window, "stride": arguments.stride}
    return {} if given == {"window": WINDOW, "stride": STRIDE} else given


def check_threshold_is_used(arguments: argparse.Namespace, no_answer: bool) -> None:
    """Raise ValueError for a threshold that would say nothing."""
    if arguments.threshold is not None and not no_answer:
        raise ValueError("--threshold says when there is no answer: give --no-answer with it")


def add_schedule_options(
    parser: argparse.ArgumentParser, *, budget: bool = False, several: bool = False, auto: bool = False
) -> None:
    """How many tokens stay and which: one schedule, or as many as are named where `several` may be.

    Where there is a ``budget``, it may be ``auto`` if that is so.
    """
    nargs: Any = "+" if several else None
    group = parser.add_argument_group("token dropping")
    if budget:
        chosen = (
            "the most accurate schedule of the model's schedules.json within this part of all MACs, such as 0.5; 1 "
            "drops nothing"
        )
        more = (
            "; or auto: a small one, then all of it where that was unsure, by the model's cascade.json" if auto else ""
        )
        kind = _budget if auto else _part
        group.add_argument("--budget", type=kind, nargs=nargs, metavar="X", help=chosen + more)
    if auto:
        promised = "for --budget auto: the part of the answers that are to be the full model's (0.98)"
        group.add_argument("--agreement", type=_part, metavar="A", help=promised)
    default = "" if several else " (default: all)"
    group.add_argument(
        "--schedule", nargs=nargs, metavar="SPEC", help=f"how many tokens stay after each layer{default}"
    )
    which = "which tokens stay (default: the schedule's own, or the model's)"
    group.add_argument("--scorer", nargs=nargs, metavar="NAME", help=which)
    group.add_argument("--keep-cls", action="store_true", help="always keep the first token")
    group.add_argument("--keep-question", action="store_true", help="keep the question before the context")
    group.add_argument("--accumulate", action="store_true", help="sum a token's scores over the layers so far")
    group.add_argument("--skip-layers", type=_layers, metavar="A,B", help="layers to leave out, counted from 0")


def positive(text: str) -> int:
    """A whole number of at least 1, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")
    return int(text)


def threads(text: str) -> int:
    """A number of threads, for argparse: no machine has more than the most, and asking for more may end the process."""
    number = positive(text)
    if number > _MOST_THREADS:
        raise argparse.ArgumentTypeError(f"expected at most {_MOST_THREADS} threads, got {text}")
    return number


def _layers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers of layers such as 2,4, got {text!r}") from None


def _part(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a part, such as 0.7, got {text!r}") from None


def _finite(text: str) -> float:
    # What JSON cannot hold would be in the report.
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"expected a number, such as -1.5, got {text!r}")
    return number


def _budget(text: str) -> float | str:
    return text if text == "auto" else _part(text)


def schedule_of(arguments: argparse.Namespace) -> "Policy | None":
    """The schedule that the options describe, or None.

    Raises:
        ValueError: a schedule that is not one, or options about a schedule without one.
        OSError: the schedule's file cannot be read.
    """
    changes: dict[str, Any] = {}
    if arguments.scorer is not None:
        names = known_scorers("--scorer", arguments.scorer)
        changes["scorer"] = names[0] if len(names) == 1 else tuple(names)
    changes |= {name: True for name in ("keep_cls", "keep_question", "accumulate") if getattr(arguments, name)}
    if arguments.skip_layers is not None:
        changes["skip_layers"] = arguments.skip_layers
    if arguments.schedule is None:
        # A budget's schedule may name a function that has to be known first.
        of_budget = getattr(arguments, "budget", None) is not None and set(changes) == {"scorer"}
        if changes and not (of_budget and all(":" in name for name in names)):
            option = next(iter(changes)).replace("_", "-")
            raise ValueError(
                f"--{option} is part of a schedule: it needs --schedule, which says how many tokens stay; a budget's "
                "schedule has its own"
            )
        return None
    return replace(parse_schedule(arguments.schedule), **changes)


def known_scorers(option: str, given: str) -> list[str]:
    """The names of a list; of each that is a ``MODULE:FUNCTION`` the function is imported and made known by it.

    What its module registered, under that name or another, stays as it was registered.

    Raises:
        ValueError: it cannot be imported, or is no function; the message names the option.
    """
    from dtbert.model.scorers import available_scorers, make_known

    names = [name.strip() for name in given.split(",")]
    for name in (one.partition("+")[0] for one in names):
        if ":" in name and name not in available_scorers():
            with naming(f"{option} {name}"):
                function = _imported(*name.split(":", 1))
                if name not in available_scorers():
                    make_known(name, function)
    return names


def _imported(module: str, function: str) -> Any:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        found = import_module(module)
    except Exception as error:
        advice = "; name a module as Python imports it, without .py" if module.endswith(".py") else ""
        raise ValueError(f"cannot import {module!r}: {type(error).__name__}: {error}{advice}") from error
    if not hasattr(found, function):
        raise ValueError(f"{module!r} ({getattr(found, '__file__', 'built in')}) has no {function!r}")
    return getattr(found, function)


def resolved(schedules: "Iterable[Policy]", own: "OwnScorer", *, quiet: bool = False) -> "list[Policy]":
    """The schedules as the model runs them; a line on stderr says by what, where they do not say it themselves."""
    given = list(schedules)
    if not quiet and any(one.scorer is None for one in given):
        scorer = own.scorer if isinstance(own.scorer, str) else ", ".join(own.scorer)
        message = f"the schedule names no scorer: the model's own chooses, {scorer}"
        print(printable(f"dtbert: {message}{', the question kept' * own.keep_question}"), file=sys.stderr)
    return [one.resolve(own) for one in given]


def parse_schedule(spec: str, option: str = "--schedule") -> "Policy":
    """The schedule of a SPEC, as SCHEDULE_HELP has it; errors name the option."""
    from dtbert.model import LengthSchedule, Policy
    from dtbert.model.store import is_store, read_store

    if _LIST.fullmatch(spec):
        with naming(f"{option} {spec!r}"):
            return LengthSchedule.parse(spec)
    inline = spec.lstrip().startswith("{")
    text = ""
    try:
        text = spec if inline else Path(spec).read_text("utf-8")
        if text.lstrip().startswith("{"):
            return Policy.from_json(text)
        if not is_store(text):
            return LengthSchedule.parse(text)
        (row,) = rows if len(rows := read_store(text)) == 1 else (None,)
    except FileNotFoundError:
        raise ValueError(
            f"{option} {spec!r} is neither a list such as 1,1,0.9,0.6,0.4,0.2, nor JSON, nor a file"
        ) from None
    except (ValueError, TypeError, RecursionError) as error:
        if holds_many(text):
            raise ValueError(
                f"{option if inline else spec}: this is a schedules.json, of many schedules: keep it in the model's "
                "folder and give --budget"
            ) from error
        raise ValueError(f"{option if inline else spec}: not a schedule, a list or in JSON ({error})") from error
    if row is None:
        raise ValueError(f"{spec}: this is a table of {len(rows)} schedules: give the lengths of one of them")
    return row.schedule


def holds_many(text: str) -> bool:
    """Whether the text is a `schedules.json`'s, not one schedule's."""
    return '"schedules"' in text


def placement(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the model options say to `dtbert.load_model`, beside the model; torch gets its threads."""
    if arguments.revision is not None and arguments.model is None:
        raise ValueError("--revision names a version of a hub id: give it with --model")
    import torch

    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    dtype = None if arguments.dtype is None else getattr(torch, arguments.dtype)
    return {"revision": arguments.revision, "device": arguments.device, "dtype": dtype}


def load_answerer(arguments: argparse.Namespace, with_schedules: bool = True) -> "QuestionAnswerer":
    """The model that the options name, ready to answer; errors as `QuestionAnswerer.load`."""
    from dtbert.qa import QuestionAnswerer

    names = ("window", "stride", "max_answer_tokens", "threshold")
    reading: Any = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    return QuestionAnswerer.load(arguments.model, **placement(arguments), with_schedules=with_schedules, **reading)


def load_for_schedule(
    arguments: argparse.Namespace, *, static: bool | None = None
) -> "tuple[QuestionAnswerer, Policy | None]":
    """The model that the options name, and the schedule that ``--schedule`` gives or ``--budget`` chooses.

    Args:
        static: as `QuestionAnswerer.within_budget`.

    Raises:
        ValueError, OSError: as `schedule_of`, `load_answerer` and `QuestionAnswerer.within_budget`; or the schedule
            does not fit the model.
    """
    schedule, budget = schedule_of(arguments), arguments.budget
    if budget is not None:
        _check_alone(schedule)
        from dtbert.qa.budgets import check_budget

        check_budget(budget)
    answerer = load_answerer(arguments)
    if budget is not None:
        schedule = answerer.within_budget(budget, static=static).schedule
    if schedule is None:
        return answerer, None
    schedule.check_layers(answerer.config.num_hidden_layers)
    return answerer, resolved([schedule], answerer.own_scorer)[0]


def load_for_answers(arguments: argparse.Namespace) -> "tuple[QuestionAnswerer, Policy | Cascade | None]":
    """As `load_for_schedule`; where ``--budget`` is ``auto``, with the cascade that keeps the promised agreement.

    Raises:
        ValueError, OSError: as that and `QuestionAnswerer.within_agreement`; or an option that auto does not go with.
    """
    from dtbert.qa.cascade import check_agreement

    agreement = arguments.agreement
    if agreement is not None:
        check_agreement(agreement)
        if arguments.budget != "auto":
            raise ValueError("--agreement is what --budget auto promises: give it with that")
    if arguments.budget != "auto":
        return load_for_schedule(arguments)
    _check_alone(schedule_of(arguments))
    _check_auto(arguments)
    answerer = load_answerer(arguments)
    return answerer, answerer.within_agreement(agreement)


def _check_alone(schedule: "Policy | None") -> None:
    if schedule is not None:
        raise ValueError("--schedule and --budget exclude each other: a budget chooses a schedule")


def _check_auto(arguments: argparse.Namespace) -> None:
    given = {"--top": getattr(arguments, "top", 1) > 1, "--overlap": getattr(arguments, "overlap", False)}
    given["--no-answer"] = arguments.no_answer
    if names := [name for name, is_given in given.items() if is_given]:
        raise ValueError(f"--budget auto promises the best span: give it without {' and '.join(names)}")


def describe_schedule(schedule: "Policy | None") -> str:
    """A schedule in a few words: the ratios, lengths or shares, the scorer, and what else it says."""
    if schedule is None:
        return "everything"
    field, before, after = _KINDS[schedule.kind]
    rest = [" +cls"] if schedule.keep_cls else []
    if layers := tuple(layer for layer, keeps in enumerate(schedule.keeps_question) if keeps):
        some = len(layers) < schedule.num_layers
        rest.append(f" +question in layers {_numbers(layers)}" if some else " +question")
    rest += [" accumulated"] if schedule.accumulate else []
    # What a kind has none of, and what says nothing, is not told.
    for name, nothing in (("skip_layers", ()), ("floor", 0), ("ceiling", 1)):
        if (value := getattr(schedule, name, nothing)) != nothing:
            rest.append(f" {name} {_numbers(value if isinstance(value, tuple) else (value,))}")
    scorer = ",".join(schedule.scorer) if isinstance(schedule.scorer, tuple) else schedule.scorer or "(the model's own)"
    return f"{before}{_numbers(getattr(schedule, field))}{after} {scorer}{''.join(rest)}"


def describe_cascade(cascade: "Cascade") -> str:
    """A cascade in a few words."""
    if cascade.schedule is None:
        return describe_schedule(None)
    again = f"all again where it is sure to {cascade.unsure_to:g} at most" if cascade.unsure_to else "never again"
    return f"{describe_schedule(cascade.schedule)}; {again}"


# Where the numbers of each kind are, and the words around them.
_KINDS = {
    "ratios": ("length_config", "", ""),
    "absolute": ("length_config", "", " tokens"),
    "threshold": ("thresholds", "shares from ", ""),
    "top_p": ("parts", "top ", ""),
}


def _numbers(values: Sequence[float]) -> str:
    return " ".join(repr(value).removesuffix(".0") for value in values)
