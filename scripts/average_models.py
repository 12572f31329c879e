"""Average the weights of models that were fine-tuned from one start: a model soup (Wortsman et al. 2022).

    python scripts/average_models.py DEST MODEL MODEL ...

DEST, a new folder, gets float32 weights, and the first model's tokenizer and scorer.
"""

import argparse
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import torch

from dtbert.weights import load_trainable, model_folder, resolve_source, save_model


@torch.no_grad()
def average(sources: list[str], dest: Path) -> None:
    """Write the mean of the models' weights; ValueError where their sizes differ."""
    first, *others = (load_trainable(source) for source in sources)
    own = first.config
    of_no_account = {name: getattr(own, name) for name in ("initializer_range", "scorer", "keep_question")}
    for source, other in zip(sources[1:], others, strict=True):
        if replace(other.config, **of_no_account) != own:
            raise ValueError(f"{source} is not of the sizes of {sources[0]}: only models of one shape can be averaged")
    for mean, *values in zip(first.parameters(), *(other.parameters() for other in others), strict=True):
        mean.copy_(torch.stack([mean, *values]).mean(0))
    save_model(first, dest)
    folder = model_folder(resolve_source(sources[0]))
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt"):
        if (file := folder / name).is_file():
            shutil.copy(file, dest)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dest", type=Path)
    parser.add_argument("models", nargs="+")
    arguments = parser.parse_args()
    try:
        average(arguments.models, arguments.dest)
    except (OSError, ValueError) as error:
        sys.exit(f"average_models.py: {error}")


if __name__ == "__main__":
    main()
