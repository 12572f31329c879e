"""`dtbert embed`: the vectors of texts, or those of a file of them."""

import argparse
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from dtbert.cli import stream
from dtbert.cli.batch import Work
from dtbert.cli.options import SCHEDULE_HELP, add_model_options, add_schedule_options, placement
from dtbert.cli.output import print_json
from dtbert.cli.tasks import load_with_schedule
from dtbert.files import replacing
from dtbert.jobs.lines import Columns, Line, described

if TYPE_CHECKING:
    from torch import Tensor

    from dtbert.model import Policy
    from dtbert.text import SentenceEncoder

SUMMARY = "make vectors of texts, or of a file of them"
DESCRIPTION = """\
Make a vector of each text by a sentence encoder: any BERT, such as those of
sentence-transformers. Whether it is the mean over the tokens or that of the
first, and whether it is brought to length 1, is what the model's modules.json
says, unless --pooling and --normalize or --no-normalize do.

--input is a file of texts, one JSON object a line, such as
  {"id": 7, "text": "A man is eating."}
of which "id" may be missing; or an array of such objects, CSV or TSV whose
first line names these columns, or Parquet (where pyarrow is installed); each
but the last may be a .gz.

With an --output that ends in .npy all vectors go into one array, float32, a row
for each line of --input, in the same order; a line that cannot be read is NaN
there, and is told on stderr. The file appears when all is done.

Any other --output gets one line for each line of --input: "line" (counted from
1; of other files than lines the number of the object or row), the "id" if there
is one, and "embedding", or "error". After an interruption the same command goes
on where it stopped; the file OUTPUT.settings.json is how it knows that it is
the same. With - for either, texts come from stdin, as lines, or vectors go to
stdout; then nothing is kept to go on with. Blank lines and other fields are
passed over.

A text is read whole: one longer than the model's positions is an error, for
nothing is cut off.

exit status: 0 all read, 1 some lines failed, 2 wrong usage or bad input
"""
EXAMPLES = f"""\
examples:
  dtbert embed --model sentence-transformers/all-MiniLM-L6-v2 \\
    --text "A man is eating." "Someone eats."
  dtbert embed --model folder/ --text "A man is eating." --json
  dtbert embed --model folder/ --input texts.jsonl --output vectors.npy
  dtbert embed --model folder/ --input texts.csv.gz --output vectors.jsonl \\
    --normalize
  cat texts.jsonl | dtbert embed --model folder/ --input - --output - | jq .id

{SCHEDULE_HELP}"""

_COLUMNS = Columns("texts", ("text",))
_SHOWN = 6  # values of a vector that are printed for people


def add_arguments(parser: argparse.ArgumentParser) -> None:
    few = parser.add_argument_group("a few texts")
    few.add_argument("--text", metavar="TEXT", nargs="+", action="extend", help="the text itself")
    stream.add_arguments(parser, _COLUMNS, "vectors: an array in .npy, else JSON objects, one a line")
    group = parser.add_argument_group("vectors")
    group.add_argument(
        "--normalize",
        action=argparse.BooleanOptionalAction,
        help="bring them to length 1, or not (default: as the model's modules.json says)",
    )
    group.add_argument("--pooling", choices=("mean", "cls"), help="of what they are made (default: the same)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_model_options(parser, shipped=False)
    add_schedule_options(parser)


def run(arguments: argparse.Namespace) -> int:
    files = [name for name in ("input", "output") if getattr(arguments, name) is not None]
    if arguments.text is not None and not files:
        return _embed_few(arguments)
    if arguments.text is None and len(files) == 2:
        if arguments.output.endswith(".npy"):
            return stream.pipe(arguments, _COLUMNS, _work_of, _array)
        return stream.run(arguments, _COLUMNS, _work_of)
    raise ValueError("give either --text, or --input and --output (see `dtbert embed --help`)")


def _embed_few(arguments: argparse.Namespace) -> int:
    import torch

    encoder, schedule = load_with_schedule(arguments, _load)
    found = encoder.encode(arguments.text, normalize=arguments.normalize, schedule=schedule)
    if arguments.json:
        print_json({"embeddings": [_values(one) for one in found]})
        return 0
    for place, one in enumerate(found, start=1):
        values = " ".join(f"{value:.4f}" for value in one[:_SHOWN].tolist())
        number = f"{place}. " if len(found) > 1 else ""
        print(f"{number}{values} ...: {len(one)} values, length {one.norm():.4g}")
    for place, one in enumerate(found[1:], start=2):
        print(f"cosine of 1 and {place}: {torch.cosine_similarity(found[0], one, dim=0):.4f}")
    return 0


def _load(arguments: argparse.Namespace) -> "SentenceEncoder":
    from dtbert.text import SentenceEncoder

    if arguments.model is None:
        raise ValueError(
            "--model is missing, and the model inside dtbert answers questions: name a sentence encoder, such as "
            "sentence-transformers/all-MiniLM-L6-v2"
        )
    return SentenceEncoder.load(arguments.model, **placement(arguments), pooling=arguments.pooling)


def _work_of(arguments: argparse.Namespace) -> Work:
    encoder, schedule = load_with_schedule(arguments, _load)
    normalize = encoder.normalize if arguments.normalize is None else arguments.normalize
    settings = {
        "schedule": None if schedule is None else schedule.to_dict(),
        "pooling": encoder.model.pooling,
        "normalize": normalize,
    }
    return Work(encoder, partial(_embedded, encoder, schedule, normalize), settings)


def _embedded(
    encoder: "SentenceEncoder", schedule: "Policy | None", normalize: bool, lines: Sequence[Line]
) -> Iterator[tuple[Line, dict[str, Any]]]:
    """Each line, and the JSON fields of its vector, or of its error."""
    texts = (line.texts[0] for line in lines if line.error is None)
    found = encoder.encode_many(texts, errors="yield", normalize=normalize, schedule=schedule)
    return described(lines, found, lambda one: {"embedding": _values(one)})


def _values(vector: "Tensor") -> list[float]:
    # Nine digits give each float32 back as it was.
    return [float(f"{value:.9g}") for value in vector.tolist()]


@contextmanager
def _array(output: str, work: Work) -> Iterator[stream.Write]:
    """What makes an array of lines; the file is written at the end, when its number of rows is known."""
    import numpy as np

    size, count = work.model.config.hidden_size, 0
    with TemporaryFile(dir=Path(output).absolute().parent) as rows:

        def write(line: Line, fields: dict[str, Any]) -> None:
            nonlocal count
            count += 1
            rows.write(np.array(fields.get("embedding", [np.nan] * size), "<f4").tobytes())

        yield write
        rows.seek(0)
        with replacing(output) as partial_file, partial_file.open("wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": (count, size)}
            np.lib.format.write_array_header_1_0(file, header)
            shutil.copyfileobj(rows, file)
