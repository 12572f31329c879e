"""The page: what it carries, what it may do, and what a reader sees in a browser."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import warnings
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dtbert.model import LengthSchedule
from dtbert.qa import QuestionAnswerer, Trace, TracedToken
from dtbert.tracing import page

HOSTILE = (
    "</script><script>document.title = 'taken'</script> <img src=x onerror=\"document.title = 'taken'\"> &amp; <!-- "
    "\"double\" and 'single' \u2028 Zoë 👩\u200d👩\u200d👧 wrote it. "
)
QUESTION = "Who </title><b>wrote</b> it?"
SCHEDULES = [LengthSchedule.ratios(ratios, scorer="random") for ratios in ([0.8, 0.5], [0.4, 0.2])]
TITLES = ["budget 0.7", "<i>budget</i> 0.3"]


@pytest.fixture(scope="module")
def traces(answerer: QuestionAnswerer) -> list[Trace]:
    return [answerer.trace(QUESTION, HOSTILE * 2, schedule=schedule) for schedule in SCHEDULES]


class Element:
    def __init__(self, name: str, attributes: dict[str, str]) -> None:
        self.name, self.attributes = name, attributes
        self.children: list[Element | str] = []

    @property
    def classes(self) -> list[str]:
        return self.attributes.get("class", "").split()

    def text(self, *without: str) -> str:
        """What the element says, without elements of some names."""
        parts = (one if isinstance(one, str) else one.text(*without) for one in self.children)
        return "" if self.name in without else "".join(parts)

    def all(self, name: str, of_class: str | None = None) -> "list[Element]":
        found = list[Element]()
        for one in self.children:
            if isinstance(one, Element):
                if one.name == name and (of_class is None or of_class in one.classes):
                    found.append(one)
                found += one.all(name, of_class)
        return found


class Tree(HTMLParser):
    """A document as elements."""

    VOID = ("meta", "input", "img", "link", "br")

    def __init__(self, document: str) -> None:
        super().__init__(convert_charrefs=True)
        self.root = Element("", {})
        self._open = [self.root]
        self.feed(document)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs})
        self._open[-1].children.append(element)
        if tag not in self.VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().name == tag

    def handle_data(self, data: str) -> None:
        self._open[-1].children.append(data)


def test_the_page_carries_the_traces_and_nothing_runs_but_its_own_script(traces: list[Trace]) -> None:
    document = Tree(page(traces, TITLES)).root
    data, script = document.all("script")
    assert json.loads(data.text()) == [
        {"title": title, **json.loads(json.dumps(trace.to_dict()))} for title, trace in zip(TITLES, traces, strict=True)
    ]
    (style,) = document.all("style")
    (policy,) = (one.attributes["content"] for one in document.all("meta") if "http-equiv" in one.attributes)
    for kind, element in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(element.text().encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'; ")
    (title,) = document.all("title")
    assert title.text() == f"Which tokens stayed: {QUESTION}"
    # Nobody is asked for anything, and no text became an element.
    names = {"html", "head", "meta", "title", "style", "body", "header", "h1", "main", "noscript", "script"}
    for name in ("img", "b", "i", "link", "iframe"):
        assert not document.all(name)
    assert {one.name for one in everything(document)} == names
    assert not {"src", "href", "onerror"} & {name for one in everything(document) for name in one.attributes}
    assert not re.search(r"url\(|@import|fetch\(|XMLHttpRequest|innerHTML", style.text() + script.text())
    # Whoever runs no scripts reads the marked text.
    (plain,) = document.all("noscript")
    assert QUESTION.split()[0] in plain.text()


def everything(element: Element) -> list[Element]:
    children = [one for one in element.children if isinstance(one, Element)]
    return children + [deeper for one in children for deeper in everything(one)]


def test_traces_that_do_not_belong_together_are_refused(traces: list[Trace], answerer: QuestionAnswerer) -> None:
    with pytest.raises(ValueError, match="2 traces and 1 titles"):
        page(traces, ["one"])
    with pytest.raises(ValueError, match="0 traces"):
        page([], [])
    with pytest.raises(ValueError, match="different texts"):
        page([traces[0], answerer.trace("Who?", HOSTILE)], TITLES)


def rendered(document: str, folder: Path) -> Element:
    """The document after its scripts ran, as a browser without a network has it."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        reason = "NO BROWSER: what a reader of the traces' page sees was not tested; install chromium"
        warnings.warn(reason, stacklevel=1)
        pytest.skip(reason)
    file = folder / "page.html"
    file.write_text(document, "utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
    command = [browser, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return Tree(done.stdout).root


# Moves the slider to layer 1 and back, walks three words into the first context, and lets go; a log has what it saw.
ACTIONS = """
const log = {}, slider = document.querySelector("main input"), text = document.querySelectorAll("main .text")[1];
const tip = document.querySelector("main .tip"), press = (key) =>
  text.dispatchEvent(new KeyboardEvent("keydown", { key, bubbles: true }));
const move = (layer) => { slider.value = layer; slider.dispatchEvent(new Event("input")); };
move(1);
log.said = document.querySelector("main output").textContent;
log.gone = [...text.querySelectorAll(".word")].map((word) => word.classList.contains("gone"));
log.numbers = [...text.querySelectorAll("sub")].filter((mark) => !mark.hidden).map((mark) => mark.textContent);
move(2);
text.focus();
for (let step = 0; step < 3; step++) press("ArrowRight");
log.tip = [...tip.querySelectorAll("p, td")].map((cell) => cell.textContent);
log.at = [...document.querySelectorAll("main .word.at")].map((word) => word.textContent);
press("Escape");
log.hidden = tip.hidden;
text.blur();
document.body.append(Object.assign(document.createElement("pre"), { textContent: JSON.stringify(log) }));
"""


def with_actions(document: str) -> str:
    """The page with a script of the test's, which its policy lets in, too."""
    allowed = base64.b64encode(hashlib.sha256(ACTIONS.encode()).digest()).decode()
    document = document.replace("script-src ", f"script-src 'sha256-{allowed}' ", 1)
    return document.replace("</body>", f"<script>{ACTIONS}</script></body>")


def test_a_reader_sees_what_left_where(traces: list[Trace], tmp_path: Path) -> None:
    document = rendered(with_actions(page(traces, TITLES)), tmp_path)
    (title,) = document.all("title")
    assert title.text() == f"Which tokens stayed: {QUESTION}"
    (main,) = document.all("main")
    assert [one.text() for one in main.all("h2")] == TITLES
    assert not main.all("img") + main.all("b") + main.all("i") + main.all("script")
    (choice,) = main.all("select")
    assert len(choice.all("option")) == len(traces[0].windows) > 1
    for trace, column in zip(traces, main.all("section"), strict=True):
        window = trace.windows[traces[0].answer_window]
        question, context = column.all("div", "text")
        assert question.text("sub") == QUESTION
        assert context.text("sub").strip("… ") == trace.context[window.start : window.end].strip()
        # The text ends in ellipses where the window cuts the context.
        assert context.text("sub").startswith("… ") == (window.start > 0)
        for part, box in (("question", question), ("context", context)):
            words: dict[int, list[int | None]] = {}
            for token in window.tokens:
                if token.part == part:
                    words.setdefault(token.word, []).append(token.left)
            fates = [None if None in left else max(left) for left in words.values()]
            seen = box.all("span", "word")
            assert len(seen) == len(fates)
            for word, fate in zip(seen, fates, strict=True):
                assert ("gone" in word.classes, "stays" in word.classes) == (fate is not None, fate is None)
            # A number behind each run of words that left in the same layer, which needs no colour.
            runs = [fate for fate, after in zip(fates, [*fates[1:], "end"], strict=True) if fate != after]
            numbers = [int(one.text()) for one in box.all("sub")]
            assert numbers == [fate + 1 for fate in runs if fate is not None]
        marked = "".join(one.text("sub") for one in context.all("span", "answer"))
        assert bool(marked) == bool(window.answer)
        assert not window.answer or trace.full_answer.text in marked
        (outcome,) = column.all("p", "outcome")
        assert outcome.text().startswith("Same answer" if trace.survived else "Another answer")
        _, head, *rows = column.all("tr")
        assert len(window.tokens) == int(head.text().split(" token")[0].removeprefix("all"))
        for number, (row, layer) in enumerate(zip(rows, window.layers, strict=True), start=1):
            left = len(set(window.answer).intersection(layer.kept))
            of_answer = f"{left} of {len(window.answer)}" if window.answer else "none"
            assert row.text() == f"{number}{len(layer.kept)} of {layer.entered}{of_answer}"
            (bars,) = row.all("svg")
            kept = [bar for bar in bars.all("rect") if "keeps" in bar.classes]
            positions = [
                at
                for bar in kept
                for at in range(int(bar.attributes["x"]), int(bar.attributes["x"]) + int(bar.attributes["width"]))
            ]
            assert positions == list(layer.kept)
            assert bars.attributes["aria-label"] == (
                f"layer {number} keeps {len(layer.kept)} of {layer.entered} tokens"
            )
    (slider,) = main.all("input")
    assert (slider.attributes["min"], slider.attributes["max"]) == ("0", "2")
    check_actions(json.loads(document.all("pre")[0].text()), traces)


def check_actions(log: dict[str, Any], traces: list[Trace]) -> None:
    """What the slider and the keyboard showed of the first trace."""
    trace = traces[0]
    window = trace.windows[trace.answer_window]
    words: dict[int, list[TracedToken]] = {}
    for token in window.tokens:
        if token.part == "context":
            words.setdefault(token.word, []).append(token)
    gone = [all(token.left == 0 for token in tokens) for tokens in words.values()]
    assert log["said"] == "after layer 1"
    assert log["gone"] == gone
    assert log["numbers"] == ["1"] * sum(one and not after for one, after in zip(gone, [*gone[1:], False], strict=True))
    third = list(words.values())[3]
    text = trace.context[third[0].start : third[-1].end]
    fate, *cells = log["tip"]
    left = [token.left for token in third]
    assert fate == text + (" stayed to the end" if None in left else f" left in layer {max(left) + 1} of 2")
    # The same word in each column.
    assert log["at"] == [text] * len(traces)
    entered = [layer.entered for layer in window.layers]
    ranks = [
        f"rank {token.ranks[layer]} of {entered[layer]}: {'left' if token.left == layer else 'stays'}"
        for layer in range(2)
        for token in third
        if token.ranks[layer] is not None
    ]
    assert [cell.partition(", ")[2] for cell in cells if cell] == ranks
    assert all(float(cell.partition(", ")[0]) for cell in cells if cell)
    assert log["hidden"]
