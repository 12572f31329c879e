"""Split the question files into parts for training, for choosing and for reporting.

    python scripts/split_squad.py data splits --no-answer 0.25

The folder data holds, as .json or .json.gz, train-v1.1 and perhaps dev-v1.1 of SQuAD 1.1, and of SquadShifts
new_wiki_v1.0, reddit_v1.0 and amazon_reviews_v1.0; docs/results.md says where to get them. Each may also be named as
SOURCES has it.

Of SQuAD's training set ten articles are held out for choosing schedules, scorers, thresholds and hyperparameters, and
about 1,500 questions of new-wiki (choose-articles.json, choose-new-wiki.json, and choose.json, which has both); about
1,000 each of reddit and amazon for reporting (report-reddit.json, report-amazon.json); the rest is for training.
Those articles (paragraphs, where a file is one article) go by a hash of their title (their text), so the split never
moves. The development set of SQuAD is left alone.

With --no-answer a part of the questions of SQuAD's two sides is also set beside another paragraph of the same article:
the one that shares the most of the question's words, rare ones first, and does not hold the answer. They are in SQuAD
2.0's format, as no-answer-squad.json and no-answer-choose-articles.json. half-no-answer-choose-articles.json and, of
the development set, half-no-answer-dev.json hold each such question twice: beside its own paragraph and beside the
other.
"""

import argparse
import gzip
import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple


class Source(NamedTuple):
    """A file, and what of it is held out: articles by title, or a part by the hash of a title or a paragraph's text.

    ``official`` is what the file is called where it comes from.
    """

    file: str
    train: str
    held_out: str
    hashed: str = "title"
    part: float = 0.0
    titles: frozenset[str] = frozenset()
    official: str = ""


SQUAD = Source(
    "squad-train-v1.1",
    "train-squad",
    "choose-articles",
    titles=frozenset(
        (
            "Houston",
            "Eritrea",
            "Black_people",
            "Infrared",
            "Samurai",
            "Software_testing",
            "Nigeria",
            "Biodiversity",
            "Tajikistan",
            "Immaculate_Conception",
        )
    ),
    official="train-v1.1",
)
# Reported on alone: nothing of it is held out, or trained on.
DEV = Source("squad-dev-v1.1", "", "dev", official="dev-v1.1")
SOURCES = (
    SQUAD,
    Source(
        "squadshifts-new-wiki", "train-squadshifts-new-wiki", "choose-new-wiki", part=0.19, official="new_wiki_v1.0"
    ),
    Source(
        "squadshifts-reddit",
        "train-squadshifts-reddit",
        "report-reddit",
        hashed="context",
        part=0.10,
        official="reddit_v1.0",
    ),
    Source(
        "squadshifts-amazon", "train-squadshifts-amazon", "report-amazon", part=0.10, official="amazon_reviews_v1.0"
    ),
)

_WORD = re.compile(r"\w+")
# Behind the id of a question that is set beside another paragraph.
_ELSEWHERE = "-elsewhere"


def is_in_part(key: str, part: float) -> bool:
    """Whether a key falls into a part: the first 32 bits of its SHA-256 as a fraction."""
    return int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32 < part


def split(articles: list[dict[str, Any]], source: Source) -> tuple[list[Any], list[Any]]:
    """The articles to train on, and those held out; by paragraphs where the ``context`` is hashed."""
    if source.hashed == "context":
        articles = [{**article, "paragraphs": [one]} for article in articles for one in article["paragraphs"]]
    sides: tuple[list[Any], list[Any]] = ([], [])
    for article in articles:
        title = article["title"]
        key = title if source.hashed == "title" else article["paragraphs"][0]["context"]
        sides[title in source.titles or is_in_part(key, source.part)].append(article)
    return sides


def without_answers(articles: Iterable[dict[str, Any]], part: float) -> list[dict[str, Any]]:
    """A part of the questions, by a hash of their ids, each beside a paragraph of its article that does not answer."""
    found = []
    for article in articles:
        asked: dict[int, list[dict[str, Any]]] = {}
        for place, qa in _elsewhere(article["paragraphs"], part):
            asked.setdefault(place, []).append(qa)
        paragraphs = [
            {"context": article["paragraphs"][place]["context"], "qas": asked[place]} for place in sorted(asked)
        ]
        if paragraphs:
            found.append({"title": article["title"], "paragraphs": paragraphs})
    return found


def _elsewhere(paragraphs: list[dict[str, Any]], part: float) -> Iterator[tuple[int, dict[str, Any]]]:
    """The questions, and the number of the paragraph that each is set beside."""
    texts = [paragraph["context"].casefold() for paragraph in paragraphs]
    words = [set(_WORD.findall(text)) for text in texts]
    frequency = Counter(word for one in words for word in one)
    for own, paragraph in enumerate(paragraphs):
        for qa in paragraph["qas"]:
            if not is_in_part(qa["id"], part):
                continue
            answers = [answer["text"].casefold() for answer in qa["answers"]]
            asked = set(_WORD.findall(qa["question"].casefold()))
            shared = {
                place: sum(math.log(len(texts) / frequency[word]) for word in sorted(asked & words[place]))
                for place, text in enumerate(texts)
                if place != own and not any(answer in text for answer in answers)
            }
            best = max(shared, key=lambda place: (shared[place], -place), default=None)
            if best is not None and shared[best] > 0:
                yield (
                    best,
                    {"id": f"{qa['id']}{_ELSEWHERE}", "question": qa["question"], "answers": [], "is_impossible": True},
                )


def with_and_without(articles: list[dict[str, Any]], part: float) -> list[dict[str, Any]]:
    """The questions of `without_answers`, each beside its own paragraph and beside that which does not answer it."""
    others = {article["title"]: article["paragraphs"] for article in without_answers(articles, part)}
    found = []
    for article in articles:
        elsewhere = others.get(article["title"], [])
        asked = {qa["id"].removesuffix(_ELSEWHERE) for paragraph in elsewhere for qa in paragraph["qas"]}
        own = [
            {"context": paragraph["context"], "qas": [qa for qa in paragraph["qas"] if qa["id"] in asked]}
            for paragraph in article["paragraphs"]
        ]
        if paragraphs := [*(paragraph for paragraph in own if paragraph["qas"]), *elsewhere]:
            found.append({"title": article["title"], "paragraphs": paragraphs})
    return found


def read(folder: Path, source: Source) -> Any:
    """The document of a source; FileNotFoundError where it is under none of its names."""
    names = [f"{stem}{ending}" for stem in (source.official, source.file) for ending in (".json", ".json.gz")]
    for name in names:
        if (folder / name).is_file():
            raw = (folder / name).read_bytes()
            return json.loads(gzip.decompress(raw) if name.endswith(".gz") else raw)
    raise FileNotFoundError(f"{folder} holds none of {', '.join(names)}: docs/results.md says where to get it")


def count(articles: list[dict[str, Any]]) -> int:
    return sum(len(paragraph["qas"]) for article in articles for paragraph in article["paragraphs"])


def write(folder: Path, name: str, version: str, articles: list[dict[str, Any]]) -> None:
    (folder / f"{name}.json").write_text(json.dumps({"version": version, "data": articles}), "utf-8")
    print(f"{name}.json: {len(articles)} articles, {count(articles)} questions")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder with the files")
    parser.add_argument("dest", type=Path, help="the folder to write")
    parser.add_argument(
        "--no-answer", type=float, default=0.0, metavar="PART", help="of SQuAD's questions (default: 0)"
    )
    arguments = parser.parse_args()
    try:
        documents = {source: read(arguments.source, source) for source in SOURCES}
        arguments.dest.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    chosen_on: list[dict[str, Any]] = []
    for source, document in documents.items():
        train, held_out = split(document["data"], source)
        for name, articles in ((source.train, train), (source.held_out, held_out)):
            write(arguments.dest, name, document["version"], articles)
            if source is SQUAD and arguments.no_answer > 0:
                others = without_answers(articles, arguments.no_answer)
                write(arguments.dest, f"no-answer-{name.removeprefix('train-')}", "v2.0", others)
        chosen_on += held_out if source.held_out.startswith("choose-") else []
    write(arguments.dest, "choose", "1.1", chosen_on)
    if arguments.no_answer > 0:
        reported = {SQUAD.held_out: split(documents[SQUAD]["data"], SQUAD)[1]}
        try:
            reported[DEV.held_out] = read(arguments.source, DEV)["data"]
        except FileNotFoundError as error:
            print(f"no half-no-answer-{DEV.held_out}.json: {error}")
        for name, articles in reported.items():
            write(arguments.dest, f"half-no-answer-{name}", "v2.0", with_and_without(articles, arguments.no_answer))


if __name__ == "__main__":
    main()
