"""`dtbert evaluate`: a model at a schedule on a SQuAD file: how right, at what cost, how fast."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtbert.cli.calibrate import calibrate, check_folder
from dtbert.cli.options import (
    QUIET_HELP,
    SCHEDULE_HELP,
    add_answer_options,
    add_model_options,
    add_schedule_options,
    check_threshold_is_used,
    describe_cascade,
    describe_schedule,
    load_for_answers,
    positive,
)
from dtbert.cli.output import check_output, print_json, printable
from dtbert.cli.tasks import TASK_HELP, add_task_option, evaluate_task
from dtbert.files import write_whole

if TYPE_CHECKING:
    from dtbert.evaluation import Cost, Measurement, SquadQuestion
    from dtbert.qa import Cascade

SUMMARY = "measure a model and a schedule on a SQuAD file, or on a task of GLUE"
DESCRIPTION = """\
Answer the questions of a SQuAD file, 1.1 or 2.0; report the official exact
match and F1 in percent, multiply-accumulates (MACs) a question, and questions a
second.

Where some questions have no answer, as in SQuAD 2.0, the model may say so: it
does where the best span's margin is below the threshold. The figures are then
also of the questions with and without an answer alone, and with the threshold
that is best for this file. --choose-threshold writes that as no_answer.json
into the model's folder, from where it is the model's: choose it on questions
that you do not report on.

--calibrate-cascade answers the questions in full and at small budgets, and
writes cascade.json into the model's folder: with that, --budget auto answers at
a small budget, and again in full where it is unsure, as seldom as the promised
--agreement with the full model's answers allows. Calibrate on questions that
you do not report on; some 1,500 will do.

MACs are a mean over the questions, each of them the sum over its windows:
  executed          what dtbert computes with the schedule
  95% up to         the same of 95 questions in 100, where the text decides,
                    or a cascade
  published count   the same as the literature counts it, there called FLOPs
  nothing dropped   the same model without a schedule, at each window's length
  padded to 384     that, with every window padded, as the literature has it

With --task the file has labelled texts, and the report has the task's own
metrics in percent: accuracy, F1, Matthews' correlation, or Pearson's and
Spearman's. Of a model without a classifier, whose embeddings make it a sentence
encoder, stsb and regression measure the cosine.
"""
EXAMPLES = f"""\
examples:
  dtbert evaluate dev-v1.1.json
  dtbert evaluate dev-v1.1.json.gz --limit 500 --schedule 1,1,0.9,0.6,0.4,0.2
  dtbert evaluate dev-v1.1.json --json --predictions predictions.json
  dtbert evaluate held-out-v2.0.json --model folder/ --choose-threshold
  dtbert evaluate held-out.json --model folder/ --calibrate-cascade
  dtbert evaluate dev-v1.1.json --budget auto --agreement 0.95
  dtbert evaluate dev.tsv --task sst2 --model folder/ --budget 0.5

{TASK_HELP}
{SCHEDULE_HELP}"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="questions in SQuAD's format, .json or .json.gz")
    add_task_option(parser)
    parser.add_argument("--limit", type=positive, metavar="N", help="N questions only, evenly spread over the file")
    parser.add_argument("--predictions", metavar="OUT", help="save the answers as JSON, {id: text}, or {line: label}")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quiet", action="store_true", help=QUIET_HELP)
    parser.add_argument(
        "--choose-threshold", action="store_true", help="write the best threshold into the model's folder"
    )
    parser.add_argument(
        "--calibrate-cascade",
        action="store_true",
        help="write cascade.json into the model's folder, for --budget auto",
    )
    add_model_options(parser)
    add_answer_options(parser)
    add_schedule_options(parser, budget=True, auto=True)


def run(arguments: argparse.Namespace) -> int:
    if arguments.task is not None:
        return evaluate_task(arguments)
    from tqdm import tqdm

    from dtbert.evaluation import evenly_spaced, measure, read_squad
    from dtbert.qa import Cascade

    if arguments.predictions is not None:
        sources = (arguments.file, arguments.schedule)
        check_output("--predictions", Path(arguments.predictions), *sources, model=arguments.model)
    questions = evenly_spaced(read_squad(arguments.file), arguments.limit)
    if arguments.calibrate_cascade:
        return calibrate(arguments, questions)
    some_impossible = any(one.is_impossible for one in questions)
    if some_impossible and arguments.budget == "auto":
        raise ValueError(
            f"{arguments.file} has questions without an answer: --budget auto promises spans, give a number"
        )
    no_answer = arguments.no_answer or some_impossible
    check_threshold_is_used(arguments, no_answer)
    if arguments.choose_threshold:
        _check_choice(arguments, questions)
    answerer, chosen = load_for_answers(arguments)
    cascade, schedule = (chosen, chosen.schedule) if isinstance(chosen, Cascade) else (None, chosen)
    with tqdm(total=len(questions), unit="q", disable=arguments.quiet or None) as bar:
        found = measure(answerer, questions, chosen, no_answer=no_answer, on_answers=bar.update)
    if arguments.choose_threshold:
        _write_threshold(arguments, len(questions), found)
    for identifier, reason in found.unreadable.items():
        print(printable(f"dtbert: question {identifier} counts as wrong: {reason}"), file=sys.stderr)
    if arguments.predictions is not None:
        write_whole(Path(arguments.predictions), json.dumps(found.predictions, ensure_ascii=False) + "\n")
    report = {
        "file": str(arguments.file),
        "model": arguments.model,
        "budget": arguments.budget,
        "schedule": None if schedule is None else schedule.to_dict(),
        **({} if cascade is None else _cascade_fields(cascade, found)),
        "window": answerer.window,
        "questions": len(questions),
        "missing": list(found.scores.missing),
        "exact_match": found.scores.exact_match,
        "f1": found.scores.f1,
        **(_no_answer_fields(found, answerer.threshold) if no_answer else {}),
        "questions_per_second": found.questions_per_second,
        **_cost_fields(found.cost),
    }
    if arguments.json:
        print_json(report)
    else:
        if cascade is not None:
            print(f"budget auto chose: {describe_cascade(cascade)}\n")
        elif arguments.budget is not None:
            print(f"budget {arguments.budget:g} chose: {describe_schedule(schedule)}\n")
        elif schedule is not None:
            print(f"schedule: {describe_schedule(schedule)}\n")
        print(_table(report))
    return 1 if found.unreadable else 0


def _check_choice(arguments: argparse.Namespace, questions: "Sequence[SquadQuestion]") -> None:
    check_folder("--choose-threshold", arguments.model)
    if len({one.is_impossible for one in questions}) < 2:
        raise ValueError(
            f"{arguments.file}: --choose-threshold needs questions with and without an answer, as SQuAD 2.0 has them"
        )


def _write_threshold(arguments: argparse.Namespace, num_questions: int, found: "Measurement") -> None:
    from dtbert.qa import ChosenThreshold, write_threshold
    from dtbert.qa.thresholds import THRESHOLD_FILE
    from dtbert.weights import model_folder, resolve_source, weights_sha256

    best, path = found.best["f1"], resolve_source(arguments.model, arguments.revision)
    name, file = Path(arguments.file).name, model_folder(path) / THRESHOLD_FILE
    write_threshold(file, ChosenThreshold(best.threshold, best.score, name, num_questions, weights_sha256(path)))
    print(f"dtbert: {file}: threshold {best.threshold:g}", file=sys.stderr)


def _cascade_fields(cascade: "Cascade", found: "Measurement") -> dict[str, Any]:
    fields = {"unsure_to": cascade.unsure_to, "promised_agreement": cascade.agreement, "expected_work": cascade.work}
    return {**fields, **({} if found.cascading is None else found.cascading._asdict())}


def _no_answer_fields(found: "Measurement", threshold: float) -> dict[str, Any]:
    parts = {"has_answer": found.scores.has_answer, "no_answer": found.scores.no_answer}
    return {
        "threshold": threshold,
        **{name: None if part is None else part._asdict() for name, part in parts.items()},
        **{f"best_{name}": best._asdict() for name, best in found.best.items()},
    }


def _cost_fields(cost: "Cost | None") -> dict[str, Any]:
    if cost is None:
        return {}
    macs = {name: getattr(cost, name) for name in ("executed", "executed_p95", "published", "own_length", "padded")}
    macs = {name: count for name, count in macs.items() if count is not None}
    return {
        "windows_per_question": cost.windows,
        "tokens_per_window": cost.tokens,
        "macs_per_question": {name: round(count) for name, count in macs.items()},
        "ratio_to_own_length": {name: count / cost.own_length for name, count in macs.items()},
        "ratio_to_padded": {name: count / cost.padded for name, count in macs.items()},
    }


def _table(report: dict[str, Any]) -> str:
    lines = [
        f"questions        {report['questions']:8,}",
        f"exact match      {report['exact_match']:8.2f}",
        f"F1               {report['f1']:8.2f}",
        f"questions/s      {report['questions_per_second']:8.1f}",
    ]
    for name, label in (("has_answer", "with an answer"), ("no_answer", "with none")):
        if report.get(name):
            part = report[name]
            lines.insert(-1, f"  {label:<15}{part['f1']:8.2f}   (exact match {part['exact_match']:.2f})")
    if "agreement" in report:
        promised = f"   (promised {report['promised_agreement']:g} of answers like those of the calibration)"
        lines.insert(-1, f"the full model's {report['agreement']:8.3f}{promised}")
        lines.insert(-1, f"answered again   {report['again']:8.3f}")
    if "best_f1" in report:
        best, used = report["best_f1"], report["threshold"]
        lines.insert(-1, f"  at best        {best['score']:8.2f}   (threshold {best['threshold']:.3g}, not {used:.3g})")
    if report["missing"]:
        lines.insert(1, f"without answer   {len(report['missing']):8,}   (counted as wrong)")
    if "macs_per_question" not in report:
        return "\n".join(lines)
    lines += ["", "MACs a question        millions   of own length   of padded"]
    labels = {"executed": "executed", "published": "published count"} if report["schedule"] else {}
    if "executed_p95" in report["macs_per_question"]:
        labels = {"executed": "executed", "executed_p95": "  95% up to", "published": "published count"}
    labels |= {"own_length": "nothing dropped", "padded": f"padded to {report['window']}"}
    for name, label in labels.items():
        millions = report["macs_per_question"][name] / 1e6
        own, padded = report["ratio_to_own_length"][name], report["ratio_to_padded"][name]
        lines.append(f"  {label:<17} {millions:11,.0f}   {own:13.3f}   {padded:9.3f}")
    windows, tokens = report["windows_per_question"], report["tokens_per_window"]
    return "\n".join([*lines, f"  {windows:.2f} windows a question, {tokens:.0f} tokens a window"])
