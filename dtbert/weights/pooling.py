"""How a sentence encoder makes one vector of a text, as sentence-transformers notes it beside the weights."""

from pathlib import Path
from typing import NamedTuple

from dtbert.files import Json, naming
from dtbert.model import Pooling

MODULES_FILE = "modules.json"
# Where every published model has it.
POOLING_FILE = "1_Pooling/config.json"
_PREFIX = "pooling_mode_"
_POOLINGS: dict[str, Pooling] = {"mean_tokens": "mean", "cls_token": "cls"}


class SentencePooling(NamedTuple):
    """What becomes of the tokens' states, and whether the result is brought to length 1."""

    pooling: Pooling = "mean"
    normalize: bool = False


def read_pooling(folder: Path) -> SentencePooling:
    """What a model's ``modules.json`` asks for; the mean, as it is, where there is no such file.

    Raises:
        OSError: a file cannot be read, or is missing.
        ValueError: it asks for what dtbert does not do; the message names the file.
    """
    file = folder / MODULES_FILE
    if not file.is_file():
        return SentencePooling()
    with naming(file):
        modules = Json.parse(file.read_bytes()).items()
        kinds = [module.field("type").of(str).rpartition(".")[2] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            raise ValueError(
                f"the modules are {', '.join(kinds) or 'none'}: dtbert does Transformer, Pooling and Normalize, in "
                "this order; load_encoder loads the encoder alone"
            )
        paths = [modules[index].field("path").of(str) for index in (0, 1)]
        if paths != ["", "1_Pooling"]:
            raise ValueError(f"expected the paths '' and '1_Pooling' of Transformer and Pooling, found {paths}")
    return SentencePooling(_pooling_of(folder / POOLING_FILE), "Normalize" in kinds)


def _pooling_of(file: Path) -> Pooling:
    with naming(file):
        fields = Json.parse(file.read_bytes())
        modes = [name.removeprefix(_PREFIX) for name in fields.of(dict) if name.startswith(_PREFIX)]
        chosen = [name for name in modes if fields.field(_PREFIX + name).of(bool)]
        if len(chosen) != 1 or chosen[0] not in _POOLINGS:
            raise ValueError(f"the pooling is {' with '.join(chosen) or 'none'}: dtbert does {' or '.join(_POOLINGS)}")
    return _POOLINGS[chosen[0]]
