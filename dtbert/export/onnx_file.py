"""What an app needs to answer without dtbert: the ONNX file, the tokenizer, and what to know of both."""

import json
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import NamedTuple

from dtbert.files import replacing, write_whole
from dtbert.model.policy import Policy
from dtbert.qa import QuestionAnswerer
from dtbert.qa.tokenize import special_ids

TOKENIZER_FILE = "tokenizer.json"
_FORMAT = 1
# Of protobuf's, less room for what is not weights.
_MOST_BYTES = 2**31 - 2**20


class Exported(NamedTuple):
    """The files of an export."""

    model: Path
    about: Path
    tokenizer: Path


def check_onnx_path(path: str | PathLike[str]) -> None:
    """Raise ValueError where no ONNX file can be written under the name: another ending, or onnx is not installed."""
    if Path(path).suffix != ".onnx":
        raise ValueError(f"{str(path)!r}: the name of an ONNX file ends in .onnx")
    if find_spec("onnx") is None:
        raise ValueError("an ONNX file is written with onnx, which is not installed: pip install 'dtbert[onnx]'")


def export_onnx(
    answerer: QuestionAnswerer,
    path: str | PathLike[str],
    schedule: Policy | None = None,
    *,
    int8: bool = False,
) -> Exported:
    """Write a model as ``NAME.onnx``, and beside it ``NAME.onnx.json`` and ``tokenizer.json``.

    The graph takes one sequence of any length, ``input_ids`` and ``token_type_ids``, int64 ``[1, n]``, and gives
    ``start_logits`` and ``end_logits``, float32 ``[1, n]``. What the schedule drops is gathered away. It is of opset
    20, with no operators but the standard's.

    Args:
        answerer: the model and its tokenizer; its window, stride and longest answer go into the JSON.
        path: of the ONNX file; a file that is there is replaced.
        schedule: tokens that each layer keeps; all by default. One without a scorer takes the model's own.
        int8: matrices in 8 bits with a scale per row, a quarter of the size.

    Raises:
        ValueError: another ending than .onnx, a scorer or a policy that the graph cannot compute, a schedule for
            another number of layers, a model that was loaded to compute in int8 or fp8, or is beyond the 2 GB that the
            format holds, onnx is not installed, or another model's ``tokenizer.json`` is there.
        TypeError: not a policy.
        OSError: a file cannot be written.
    """
    check_onnx_path(path)
    path = Path(path)
    schedule = answerer.resolve(schedule)
    from dtbert.export.onnx_graph import INPUTS, OPSET, OUTPUTS, onnx_graph

    tokenizer = answerer.tokenizer.to_str()
    files = Exported(path, path.with_name(f"{path.name}.json"), path.with_name(TOKENIZER_FILE))
    if files.tokenizer.exists() and files.tokenizer.read_text("utf-8") != tokenizer:
        raise ValueError(
            f"{files.tokenizer} is there already, and not this model's: export into another folder, or remove it"
        )
    graph = onnx_graph(answerer.model, schedule, int8=int8)
    if graph.ByteSize() > _MOST_BYTES:
        raise ValueError(f"the model takes {graph.ByteSize() / 1e9:.1f} GB, an ONNX file holds 2.1 GB: give int8")
    cls, sep = special_ids(answerer.tokenizer, answerer.config.vocab_size)
    about = {
        "format": _FORMAT,
        "opset": OPSET,
        "inputs": list(INPUTS),
        "outputs": list(OUTPUTS),
        "max_tokens": answerer.config.max_position_embeddings,
        "cls_id": cls,
        "sep_id": sep,
        "window": answerer.window,
        "stride": answerer.stride,
        "max_answer_tokens": answerer.max_answer_tokens,
        "int8": int8,
        "schedule": None if schedule is None else schedule.to_dict(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_bytes(graph.SerializeToString())
    write_whole(files.about, json.dumps(about, indent=1) + "\n")
    write_whole(files.tokenizer, tokenizer)
    return files
