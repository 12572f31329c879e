"""What the documents promise: links that lead somewhere, Python that runs, commands that parse."""

import ast
import inspect
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest

import dtbert
from dtbert.cli import COMMANDS, build_parser

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "CHANGELOG.md",
    *PAGES,
    ROOT / "dtbert" / "weights" / "shipped" / "README.md",
]
# What a block names where it needs a network or a folder of the reader's: it is checked, but not run.
ELSEWHERE = ("Intel/", "path/to/")
LINK = re.compile(r"\[[^\[\]]*\]\(\s*<?([^\s<>()]+)>?(?:\s+\"[^\"]*\")?\s*\)")
COMMAND = re.compile(r"^(?:.* -m dtbert\.cli|dtbert) (?=[a-z])")


class Block(NamedTuple):
    """A block of code: its language, empty where none is named, and the number of its first line."""

    language: str
    line: int
    text: str


def name(document: Path) -> str:
    return str(document.relative_to(ROOT))


@cache
def split(document: Path) -> tuple[str, tuple[Block, ...]]:
    """The prose of a document, and its fenced and indented blocks of code."""
    prose: list[str] = []
    blocks: list[Block] = []
    fence, language, first, code = "", "", 0, list[str]()
    previous = ""

    def close() -> None:
        if code:
            blocks.append(Block(language, first, "\n".join(code).rstrip() + "\n"))
            code.clear()

    for number, line in enumerate(document.read_text("utf-8").splitlines(), 1):
        if fence:
            if line.strip() == fence:
                close()
                fence = ""
            else:
                code.append(line)
        elif opening := re.match(r"(`{3,}|~{3,})\s*(\w*)", line):
            close()
            fence, language, first = opening[1], opening[2], number + 1
        elif line.startswith("    ") and (code or not previous.strip()):
            if not code:
                language, first = "", number
            code.append(line[4:])
        elif code and not line.strip():
            code.append("")
        else:
            close()
            prose.append(line)
        previous = line
    assert not fence, f"{name(document)} leaves a fence open"
    close()
    return "\n".join(prose), tuple(blocks)


@cache
def anchors(document: Path) -> frozenset[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    found: set[str] = set()
    times: Counter[str] = Counter()
    for heading in re.findall(r"^#{1,6}\s+(.*?)(?:\s+#+)?\s*$", split(document)[0], re.MULTILINE):
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        found.add(f"{slug}-{times[slug]}" if times[slug] else slug)
        times[slug] += 1
    return frozenset(found)


def links(document: Path) -> Iterator[str]:
    """The targets of a document's links and pictures that stay in the repository."""
    prose = re.sub(r"(`+).*?\1", "", split(document)[0], flags=re.DOTALL)
    assert not re.search(r"^\s*\[[^\]]+\]:\s|<(?:a|img)\s", prose, re.MULTILINE), "write links as [text](target)"
    for target in LINK.findall(prose):
        if not re.match(r"[a-z]+:", target):
            yield target


def commands(document: Path) -> Iterator[str]:
    """The dtbert commands of a document's blocks, each on one line."""
    for block in split(document)[1]:
        if block.language != "python":
            for line in block.text.replace("\\\n", " ").splitlines():
                if COMMAND.match(line):
                    yield line


def calls(tree: ast.AST) -> Iterator[tuple[ast.Call, Any]]:
    """The calls of ``dtbert.name(...)`` and ``dtbert.name.name(...)``, each with what it calls."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("dtbert."):
            called: Any = dtbert
            for attribute in ast.unparse(node.func).split(".")[1:]:
                called = getattr(called, attribute)
            yield node, called


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_links_lead_to_a_file_and_a_heading(document: Path) -> None:
    broken = []
    for target in links(document):
        path, _, anchor = unquote(target).partition("#")
        there = (document.parent / path).resolve() if path else document
        if not there.is_relative_to(ROOT) or not there.exists():
            broken.append(f"{target}: no such file")
        elif anchor and (there.suffix != ".md" or anchor not in anchors(there)):
            broken.append(f"{target}: no such heading")
    assert not broken


def test_readme_is_short_and_leads_to_every_page() -> None:
    readme = ROOT / "README.md"
    assert len(readme.read_text("utf-8").splitlines()) <= 150
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in links(readme)}
    assert linked >= set(DOCUMENTS) - {readme}


@pytest.mark.parametrize("document", [ROOT / "README.md", *PAGES], ids=name)
def test_python_blocks_run_one_after_another(document: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for block in split(document)[1]:
        if block.language != "python":
            continue
        # Numbered as in the document, so that a traceback shows the line.
        code = "\n" * (block.line - 1) + block.text
        if any(place in block.text for place in ELSEWHERE):
            for call, called in calls(ast.parse(code)):
                named = {keyword.arg: keyword.value for keyword in call.keywords if keyword.arg}
                inspect.signature(called).bind(*call.args, **named)
        else:
            exec(compile(code, document, "exec"), namespace)


def test_python_is_shown_and_run_in_readme_and_guide() -> None:
    for document in (ROOT / "README.md", ROOT / "docs" / "guide.md"):
        texts = [block.text for block in split(document)[1] if block.language == "python"]
        assert sum(not any(place in text for place in ELSEWHERE) for text in texts) >= 2, name(document)


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_commands_parse(document: Path) -> None:
    parser = build_parser()
    for command in commands(document):
        arguments = COMMAND.sub("", command)
        try:
            parser.parse_args(shlex.split(arguments, comments=True))
        except SystemExit:
            pytest.fail(f"{name(document)}: dtbert {arguments}")


def test_every_command_is_shown() -> None:
    shown = {COMMAND.sub("", command).split()[0] for document in DOCUMENTS for command in commands(document)}
    assert shown == COMMANDS.keys()


@pytest.mark.parametrize(
    ("heading", "anchor"),
    [
        ("# Where answers are lost", "where-answers-are-lost"),
        ("## SQuAD 1.1, development set", "squad-11-development-set"),
        ("## `score`, and *its* key_padding - twice #", "score-and-its-key_padding---twice"),
        ("### See [the guide](guide.md)", "see-the-guide"),
    ],
)
def test_anchors_follow_githubs_rule(heading: str, anchor: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"{heading}\n\n    # no heading\n\n```\n# nor this\n```\n\n{heading}\n", "utf-8")
    assert anchors(page) == {anchor, f"{anchor}-1"}
