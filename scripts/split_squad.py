"""Split the question files into parts for training, for choosing and for reporting.

    python scripts/split_squad.py ../shared/data/squad splits

Articles (paragraphs, where a file is one article) go by a hash of their title (their text), so the split never moves:
about 1,500 questions of new-wiki are held out for choosing schedules, scorers and hyperparameters; about 1,000 each of
reddit and amazon for reporting; all the rest is for training. The development set of SQuAD is left alone.
"""

import argparse
import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

# File, what is hashed, the part of it that is held out, and what the held-out part is for.
SOURCES = (
    ("squadshifts-new-wiki", "title", 0.19, "choose-new-wiki"),
    ("squadshifts-reddit", "context", 0.10, "report-reddit"),
    ("squadshifts-amazon", "title", 0.10, "report-amazon"),
    ("squad-train-v1.1-first-12-articles", "title", 0.0, ""),
)


def is_held_out(key: str, part: float) -> bool:
    """Whether a title or paragraph falls into the held-out part: the first 32 bits of its SHA-256 as a fraction."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32 < part


def split(articles: list[dict[str, Any]], hashed: str, part: float) -> tuple[list[Any], list[Any]]:
    """The articles to train on, and those held out; by paragraphs where ``hashed`` is ``context``."""
    if hashed == "context":
        articles = [{**article, "paragraphs": [one]} for article in articles for one in article["paragraphs"]]
    sides: tuple[list[Any], list[Any]] = ([], [])
    for article in articles:
        key = article["title"] if hashed == "title" else article["paragraphs"][0]["context"]
        sides[is_held_out(key, part)].append(article)
    return sides


def count(articles: list[dict[str, Any]]) -> int:
    return sum(len(paragraph["qas"]) for article in articles for paragraph in article["paragraphs"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder with the .json.gz files")
    parser.add_argument("dest", type=Path, help="the folder to write")
    arguments = parser.parse_args()
    arguments.dest.mkdir(parents=True, exist_ok=True)
    for name, hashed, part, held_out in SOURCES:
        document = json.loads(gzip.decompress((arguments.source / f"{name}.json.gz").read_bytes()))
        for side, articles in zip((f"train-{name}", held_out), split(document["data"], hashed, part), strict=True):
            if not articles:
                continue
            text = json.dumps({"version": document["version"], "data": articles})
            (arguments.dest / f"{side}.json").write_text(text, "utf-8")
            print(f"{side}.json: {len(articles)} articles, {count(articles)} questions")


if __name__ == "__main__":
    main()
