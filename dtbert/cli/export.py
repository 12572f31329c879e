"""`dtbert export`: a model and a schedule as an ONNX file."""

import argparse
from pathlib import Path

from dtbert.cli.options import REVISION_HELP, SCHEDULE_HELP, add_schedule_options, describe_schedule, load_for_schedule
from dtbert.cli.output import check_output, print_json, size_text

SUMMARY = "write a model as an ONNX file, for apps without PyTorch"
DESCRIPTION = """\
Write a model with a schedule as FILE.onnx, for one text of any length: what the
schedule drops is gathered away. Beside it go FILE.onnx.json, which says what to
know of it, and tokenizer.json, so that onnxruntime and tokenizers can answer
alone. No ONNX file can let the text decide how many tokens stay: a budget
chooses among lengths.
"""
EXAMPLES = f"""\
examples:
  dtbert export model.onnx
  dtbert export model.onnx --budget 0.5 --int8
  dtbert export model.onnx --model Intel/dynamic_tinybert \\
    --schedule 0.9,0.8,0.6,0.4,0.3,0.1

{SCHEDULE_HELP}
An ONNX file can compute received, cls, answer, overlap, answer_overlap and
answer_overlap_4.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="where the model goes: a name that ends in .onnx")
    parser.add_argument("--int8", action="store_true", help="matrices in 8 bits with a scale per row: a quarter")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model", metavar="SOURCE", help="a hub id, a folder or a file (default: the one inside dtbert)"
    )
    group.add_argument("--revision", metavar="R", help=REVISION_HELP)
    add_schedule_options(parser, budget=True)
    parser.set_defaults(device=None, dtype=None, threads=None)


def run(arguments: argparse.Namespace) -> int:
    from dtbert.export import check_onnx_path, export_onnx

    check_onnx_path(arguments.file)
    check_output("FILE", arguments.file, arguments.schedule, model=arguments.model)
    answerer, schedule = load_for_schedule(arguments, static=True)
    files = export_onnx(answerer, arguments.file, schedule, int8=arguments.int8)
    sizes = {str(file): file.stat().st_size for file in files}
    if arguments.json:
        print_json({"schedule": None if schedule is None else schedule.to_dict(), "bytes": sizes})
        return 0
    print(f"wrote {files.model}, which keeps {describe_schedule(schedule)}")
    for name, size in sizes.items():
        print(f"  {size_text(size):>8}  {name}")
    return 0
