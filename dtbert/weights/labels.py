"""The labels of a classifier, as a hub ``config.json`` names them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtbert.files import Json, naming

# What has a layer of the same name, of another use.
_OTHER_HEADS = ("ForTokenClassification", "ForMultipleChoice")
# More than any classifier has.
_MOST_LABELS = 2**20


def check_classifies(folder: Path) -> None:
    """Raise ValueError if a model's ``config.json`` is one of a classifier of words, or of several labels a text."""
    file = folder / "config.json"
    with naming(file):
        config = Json.parse(file.read_bytes())
        problem, architectures = config.get("problem_type"), config.get("architectures")
        if problem is not None and problem.of(str) == "multi_label_classification":
            raise problem.error("dtbert gives one label a text, this model was trained to give several")
        for name in [] if architectures is None else architectures.items():
            if name.of(str).endswith(_OTHER_HEADS):
                raise name.error(f"{name.value} does not label whole texts: load_encoder loads the encoder alone")


def read_labels(folder: Path) -> tuple[str, ...]:
    """The names of the labels in a model's ``config.json``, in the order of its logits.

    They are ``id2label``'s; without it LABEL_0, LABEL_1 and so on, ``num_labels`` of them or, as in transformers, 2.

    Raises:
        OSError: the file cannot be read.
        ValueError: ``id2label`` does not name the labels 0 to n - 1; the message names the file.
    """
    file = folder / "config.json"
    with naming(file):
        config = Json.parse(file.read_bytes())
        named, number = config.get("id2label"), config.get("num_labels")
        if named is None:
            count = 2 if number is None else number.of(int)
            if not 1 <= count <= _MOST_LABELS:
                raise ValueError(f"num_labels must be from 1 to {_MOST_LABELS}, not {count}")
            return tuple(f"LABEL_{index}" for index in range(count))
        keys = named.of(dict).keys()
        if not keys or keys != {str(index) for index in range(len(keys))}:
            raise named.error(f"expected the labels 0 to n - 1, found {', '.join(map(repr, keys)) or 'none'}")
        return tuple(str(named.field(str(index)).of(str, int)) for index in range(len(keys)))


def label_fields(labels: Sequence[str]) -> dict[str, Any]:
    """The fields of a hub ``config.json`` that name a classifier's labels."""
    return {
        "id2label": {str(index): label for index, label in enumerate(labels)},
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "regression" if len(labels) == 1 else "single_label_classification",
    }


def are_unnamed(labels: Sequence[str]) -> bool:
    """Whether these are LABEL_0, LABEL_1 and so on, what labels are called that nobody named."""
    return list(labels) == [f"LABEL_{number}" for number in range(len(labels))]


def places_of(labels: Sequence[str], of_model: Sequence[str]) -> list[int]:
    """Which of the model's labels each of these is, by name, whatever their order and case.

    Labels that have no names of their own, LABEL_0 and so on, are taken by number.

    Raises:
        ValueError: they are not the same labels.
    """
    if are_unnamed(of_model) and len(of_model) == len(labels):
        return list(range(len(labels)))
    folded = [name.casefold() for name in of_model]
    wanted = [name.casefold() for name in labels]
    if sorted(folded) != sorted(wanted):
        raise ValueError(
            f"the labels are {', '.join(labels)}, the model's {', '.join(of_model)}: if they mean the same, give the "
            "model these names, in its own order, as id2label of its config.json"
        )
    return [folded.index(name) for name in wanted]
