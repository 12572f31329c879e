"""Feed dtbert files, texts and schedules that nobody would write: each gives what it should, or a documented error.

    python scripts/fuzz.py --minutes 10
    python scripts/fuzz.py --only texts --seed 7 --rounds 1000
    python scripts/fuzz.py --only files --case 41          # one that failed, alone

A case is made from its kind, the seed and its number, so it can be made again. Exit status: 1 where a case failed.
"""

import argparse
import json
import logging
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file

from dtbert.cli.options import parse_schedule
from dtbert.model import BertConfig, BertForQuestionAnswering, LengthSchedule
from dtbert.qa import Answer, QuestionAnswerer
from dtbert.weights import convert, load_model, save_model

DOCUMENTED = (ValueError, TypeError, OSError)
# Seconds after which a case hangs.
PATIENCE = 60

_WORDS = "who what when where wrote it the a an in by to of letter ada zoe paris london 1843 said and , . ? ##s ##ed"
_NUMBERS = ("-1", "0", "1e400", "1e-400", "NaN", "Infinity", "2147483648", "9223372036854775808", "1" * 40, "1.5")
_VALUES = (*_NUMBERS, "null", "true", '""', "[]", "{}", "[" * 3000, '"\\ud800"', '"\\u001b[2J"')


logger = logging.getLogger("dtbert")


class Hang(BaseException):
    """A case took too long; no error that anything catches."""


def small_model(folder: Path, words: Iterable[str], max_position_embeddings: int = 512) -> Path:
    """Save a random model of two layers, the same each time, with a vocabulary of these words."""
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *words]
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=max_position_embeddings,
        initializer_range=0.5,
    )
    model = BertForQuestionAnswering(config)
    model.reset_parameters(torch.Generator().manual_seed(0))
    save_model(model, folder)
    (folder / "vocab.txt").write_text("\n".join(vocabulary) + "\n", "utf-8")
    return folder


class Room:
    """A small model in each form, and what is made of it."""

    def __init__(self, folder: Path) -> None:
        words = (*_WORDS.split(), *map(chr, range(97, 123)))
        self.folder = small_model(folder / "whole", words, max_position_embeddings=64)
        self.answerer = QuestionAnswerer.load(self.folder, window=48, stride=8)
        convert(self.folder, folder / "int8", int8=True)
        tensors = load_file(self.folder / "model.safetensors")
        for name, archive in (("zip.bin", True), ("legacy.bin", False)):
            torch.save(tensors, folder / name, _use_new_zipfile_serialization=archive)
        self.files: dict[str, bytes] = {
            "config.json": (self.folder / "config.json").read_bytes(),
            "vocab.txt": (self.folder / "vocab.txt").read_bytes(),
            "tokenizer.json": self.answerer.tokenizer.to_str().encode(),
            "tokenizer_config.json": b'{"do_lower_case": true, "strip_accents": null, "model_max_length": 64}',
            "model.safetensors": (self.folder / "model.safetensors").read_bytes(),
            "model.int8.safetensors": (folder / "int8" / "model.int8.safetensors").read_bytes(),
            "zip.bin": (folder / "zip.bin").read_bytes(),
            "legacy.bin": (folder / "legacy.bin").read_bytes(),
        }
        self.changed = folder / "changed"


def files(choose: random.Random, room: Room) -> None:
    """A model's folder in which one file is damaged: it answers as a model does, or says what is wrong."""
    name = choose.choice(list(room.files))
    shutil.rmtree(room.changed, ignore_errors=True)
    shutil.copytree(room.folder, room.changed)
    content = damaged(choose, room.files[name], name.endswith(".json"))
    if name in ("zip.bin", "legacy.bin", "model.int8.safetensors"):
        (room.changed / "model.safetensors").unlink()
        name = "pytorch_model.bin" if name.endswith(".bin") else name
    (room.changed / name).write_bytes(content)
    if name.endswith((".bin", ".safetensors")):
        model = load_model(room.changed)
        assert all(value.to_dense().isfinite().all() for value in model.parameters()), "weights that are no numbers"
    else:
        check(QuestionAnswerer.load(room.changed, window=48, stride=8)("who wrote it?", CONTEXT), CONTEXT)


CONTEXT = "ada wrote the letter in london , zoe said ."


def damaged(choose: random.Random, content: bytes, is_json: bool) -> bytes:
    """The bytes with a few changes of the kind that finds what a reader trusts."""
    changed = bytearray(content)
    for _ in range(choose.choice((1, 1, 2, 5))):
        # Headers, and the ends of archives, say the most.
        reach = choose.choice((16, 300, len(changed)))
        place = choose.randrange(min(reach, len(changed)) or 1)
        place = choose.choice((place, place, max(0, len(changed) - place - 1)))
        kind = choose.randrange(7 if is_json else 5)
        if kind == 0 and changed:
            changed[place] ^= 1 << choose.randrange(8)
        elif kind == 1:
            del changed[place:]
        elif kind == 2:
            changed[place:place] = choose.randbytes(choose.choice((1, 4, 40)))
        elif kind == 3:
            del changed[place : place + choose.choice((1, 8, 100))]
        elif kind == 4:
            changed[place:place] = changed[place : place + choose.choice((8, 100))]
        else:
            text = changed.decode("utf-8", "replace")
            places = [index for index, one in enumerate(text) if one in ":[,"]
            if places:
                begin = choose.choice(places) + 1
                end = next((index for index in range(begin, len(text)) if text[index] in ",]}"), len(text))
                changed = bytearray((text[:begin] + choose.choice(_VALUES) + text[end:]).encode("utf-8", "replace"))
    return bytes(changed)


def texts(choose: random.Random, room: Room) -> None:
    """Questions about texts of any characters: an answer is a piece of its text, the same alone and among others."""
    pairs = [(text(choose, 30), text(choose, choose.choice((5, 80, 2000)))) for _ in range(choose.choice((1, 3)))]
    found = list(room.answerer.answer_many(pairs, errors="yield"))
    for pair, answer in zip(pairs, found, strict=True):
        if isinstance(answer, Answer):
            check(answer, pair[1])
            alone = room.answerer(*pair)
            assert abs(alone.score - answer.score) < 1e-4, f"{alone} alone, {answer} among others"
        else:
            assert isinstance(answer, ValueError | TypeError), f"{answer!r} in place of an answer"


def text(choose: random.Random, most: int) -> str:
    """Words that the model knows, and characters of every kind."""
    kinds: tuple[Callable[[], str], ...] = (
        lambda: choose.choice(_WORDS.split()) + " ",
        lambda: chr(choose.randrange(0x20, 0x7F)),
        lambda: chr(choose.randrange(0x110000)),
        lambda: chr(choose.randrange(0x300)),
        lambda: choose.choice(
            ("\x00", "\x1b[2J", "\u200d", "\u0301" * 5, "\ud800", "\ufeff", "ﬃ", "İ", "[SEP]", "\r\n")
        ),
        lambda: choose.choice("中日語한글") * choose.randrange(1, 9),
        lambda: "x" * choose.randrange(300),
    )
    some = choose.sample(kinds, choose.randrange(1, 4))
    return "".join(choose.choice(some)() for _ in range(choose.randrange(most)))


def check(answer: Answer, context: str) -> None:
    assert context[answer.start : answer.end] == answer.text, f"{answer} is not at its place"
    assert 0 <= answer.score <= 1, f"{answer} has no probability"


def schedules(choose: random.Random, room: Room) -> None:
    """Schedules in words and JSON: refused, or a schedule whose lengths shrink and with which the model answers."""
    entries = [choose.choice((*_NUMBERS, "0.5", "1", "1.0", "20", "7", ".3", "", " 2 ", "x")) for _ in range(2)]
    entries = entries if choose.random() < 0.8 else entries * choose.randrange(3)
    spec = choose.choice(("{}", "[{}]", "({})", " {},")).format(",".join(entries))
    if choose.random() < 0.5:
        kind = choose.choice(("ratios", "absolute", "Ratios"))
        scorer = choose.choice(('"cls"', '["cls", "answer"]', '["cls"]', '"?"', *_VALUES))
        more = choose.choice(("", ', "keep_cls": true', f', "keep_question": {choose.choice(_VALUES)}', ', "more": 1'))
        spec = f'{{"kind": "{kind}", "length_config": [{",".join(entries)}], "scorer": {scorer}{more}}}'
    schedule = parse_schedule(spec)
    assert LengthSchedule.from_json(schedule.to_json()) == schedule, "another one when read again"
    for length in (1, 2, 48, 10_000):
        lengths = schedule.lengths(length)
        assert all(1 <= after <= before <= length for before, after in zip((length, *lengths), lengths, strict=False))
    check(room.answerer("who wrote it ?", CONTEXT, schedule=schedule), CONTEXT)


KINDS = {"files": files, "texts": texts, "schedules": schedules}


@contextmanager
def patience(seconds: int) -> Iterator[None]:
    """Raise Hang where it takes longer."""

    def stop(*_: object) -> None:
        raise Hang(f"it took longer than {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def quiet() -> Iterator[None]:
    """Leave out warnings, which are about files that are damaged on purpose."""
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def fails(kind: str, seed: int, number: int, room: Room) -> bool:
    """Run a case; print what it did where that is wrong."""
    try:
        with patience(PATIENCE), quiet():
            KINDS[kind](random.Random(f"{kind} {seed} {number}"), room)
    except KeyboardInterrupt:
        raise
    except DOCUMENTED:
        return False
    except BaseException:  # a panic of a library is no Exception
        print(f"--only {kind} --seed {seed} --case {number}\n{traceback.format_exc()}", file=sys.stderr, flush=True)
        return True
    return False


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=KINDS, action="append", help="kinds of cases (default: all)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="other cases (default: 0)")
    parser.add_argument("--rounds", type=int, default=200, metavar="N", help="cases of each kind (default: 200)")
    parser.add_argument("--minutes", type=float, metavar="N", help="instead of --rounds: go on for so long")
    parser.add_argument("--case", type=int, metavar="N", help="this one alone, of each kind")
    arguments = parser.parse_args(argv)
    torch.set_num_threads(1)
    kinds, seed = arguments.only or list(KINDS), arguments.seed
    end = None if arguments.minutes is None else time.monotonic() + 60 * arguments.minutes
    number = failed = 0
    with tempfile.TemporaryDirectory() as folder:
        room = Room(Path(folder))
        if arguments.case is not None:
            return int(sum(fails(kind, seed, arguments.case, room) for kind in kinds) > 0)
        while number < arguments.rounds if end is None else time.monotonic() < end:
            failed += sum(fails(kind, seed, number, room) for kind in kinds)
            number += 1
    print(json.dumps({"kinds": kinds, "seed": seed, "cases": number * len(kinds), "failed": failed}))
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
