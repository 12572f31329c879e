"""`dtbert convert`: a checkpoint as a folder with safetensors."""

import argparse

from dtbert.cli.options import REVISION_HELP
from dtbert.cli.output import print_json, size_text

SUMMARY = "write a checkpoint as safetensors, or in 8 bits"
DESCRIPTION = """\
Write a checkpoint, any that dtbert loads, as a new folder with safetensors and
the config and tokenizer. With --int8 the weights take a quarter of float32's
size.
"""
EXAMPLES = """\
examples:
  dtbert convert Intel/dynamic_tinybert dynamic-tinybert
  dtbert convert my-model my-model-int8 --int8
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a hub id, a folder or a file")
    parser.add_argument("dest", metavar="DEST", help="the folder to make; it must not be there, or be empty")
    parser.add_argument(
        "--int8", action="store_true", help="matrices as int8 with a scale per row, the rest as float16"
    )
    parser.add_argument("--revision", metavar="R", help=REVISION_HELP)
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    from dtbert.weights import convert

    folder = convert(arguments.source, arguments.dest, revision=arguments.revision, int8=arguments.int8)
    sizes = {file.name: file.stat().st_size for file in sorted(folder.iterdir())}
    if arguments.json:
        print_json({"folder": str(folder), "bytes": sizes})
        return 0
    print(f"wrote {folder}")
    for name, size in sizes.items():
        print(f"  {size_text(size):>8}  {name}")
    return 0
