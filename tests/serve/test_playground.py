"""The playground as people meet it: in a real browser, by mouse and keyboard, at two sizes, light and dark.

It needs Chromium: `apt-get install chromium`. Elsewhere it is named by CHROMIUM.
"""

import math
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect, sync_playwright

from dtbert.qa import QuestionAnswerer
from dtbert.serve import Settings, create_app
from dtbert.serve.service import Service
from tests.serve.conftest import held

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
PATIENCE = 60_000  # milliseconds: on a busy machine all is slow


@pytest.fixture(scope="module")
def service(shipped: QuestionAnswerer) -> Iterator[Service]:
    service = Service(shipped, Settings(max_context=60_000), "the model inside dtbert")
    yield service
    service.close()


@pytest.fixture(scope="module")
def url(service: Service) -> Iterator[str]:
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(create_app(service), log_config=None, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


def opened(browser: Browser, url: str, *, width: int = 1280, scheme: str = "light") -> tuple[Page, list[str]]:
    """The playground, and where whatever goes wrong in it, or goes elsewhere, is written down."""
    context = browser.new_context(
        viewport={"width": width, "height": 850},
        color_scheme="dark" if scheme == "dark" else "light",
        reduced_motion="reduce",
    )
    page, wrong = context.new_page(), list[str]()
    page.set_default_timeout(PATIENCE)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: None if request.url.startswith(url) else wrong.append(request.url))
    page.goto(url)
    expect(page.locator("#front .here")).to_be_visible()
    return page, wrong


def done(page: Page) -> None:
    expect(page.locator("#result")).not_to_have_attribute("aria-busy", "true")


def accessible(page: Page) -> None:
    """Axe finds nothing, and did look; nothing stands out of the page's sides."""
    found = Axe().run(page).response
    assert [(one["id"], [node["target"] for node in one["nodes"]]) for one in found["violations"]] == []
    assert {"color-contrast", "link-name"} <= {one["id"] for one in found["passes"]}
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_a_question_is_asked_by_keyboard_and_the_slider_asks_again(
    browser: Browser, url: str, shipped: QuestionAnswerer
) -> None:
    page, wrong = opened(browser, url)
    context, question = page.input_value("#context"), page.input_value("#question")
    page.focus("#question")
    page.keyboard.press("Enter")
    best, *others = shipped.top(question, context, 5, budget=0.5)
    expect(page.locator("#answer")).to_have_text(best.text)
    expect(page.locator("#text mark")).to_have_text(best.text)
    expect(page.locator("#facts")).to_contain_text(f"Score {best.score:.3f}")
    assert page.locator("#others button").all_inner_texts() == [other.text for other in others]
    page.locator("#others button").first.press("Enter")
    expect(page.locator("#text mark")).to_have_text(others[0].text)
    done(page)

    page.focus("#budget")
    before = page.get_attribute("#front .here", "cx")
    page.keyboard.press("Home")  # the least budget that there is
    expect(page.locator("#history tr")).to_have_count(2)
    least = f"{page.input_value('#budget')}%"
    assert page.get_attribute("#budget", "aria-valuetext", timeout=PATIENCE).startswith(f"{least}: ")  # type: ignore[union-attr]
    assert page.get_attribute("#front .here", "cx") != before
    chosen = shipped.within_budget(float(page.input_value("#budget")) / 100)
    expect(page.locator("#answer")).to_have_text(shipped(question, context, schedule=chosen.schedule).text)
    done(page)

    trace = shipped.trace(question, context, schedule=chosen.schedule)
    stayed = {token.word for token in trace.windows[0].tokens if token.part == "context" and token.left is None}
    words = {token.word for token in trace.windows[0].tokens if token.part == "context"}
    expect(page.locator("#trace .word")).to_have_count(len(words))
    expect(page.locator("#trace .word:not(.gone)")).to_have_count(len(stayed))
    kept = [len(layer.kept) / len(trace.windows[0].tokens) for layer in trace.windows[0].layers]
    bars = [f"Layer {number}{math.floor(100 * part + 0.5)}%" for number, part in enumerate(kept, 1)]
    expect(page.locator("#bars li")).to_have_text(bars)
    page.focus("#layer")
    page.keyboard.press("Home")
    expect(page.locator("#trace .gone")).to_have_count(0)
    expect(page.locator("#trace-note")).to_have_text(
        f"{len(words)} of {len(words)} words are there after 0 of 6 layers"
    )
    accessible(page)
    assert wrong == []
    page.context.close()


def test_long_texts_and_errors_on_a_phone_in_the_dark(browser: Browser, url: str, service: Service) -> None:
    page, wrong = opened(browser, url, width=360, scheme="dark")
    filler = "Nothing of note was written on that day in the town. " * 25
    # Characters outside of the first plane count as two in a browser, and as one here.
    page.fill("#context", f"\U0001f600 {filler}The letter was written by Ada Lovelace. {filler}")
    page.fill("#question", "Who wrote the letter?")
    page.click("#submit")
    expect(page.locator("#text mark")).to_have_text("Ada Lovelace")
    expect(page.locator("#text mark")).to_be_in_viewport()
    done(page)
    accessible(page)
    assert wrong == []

    page.fill("#context", "long " * 20_000)
    page.click("#submit")
    expect(page.get_by_role("alert")).to_contain_text("this service takes 60,000")
    page.fill("#context", "The letter is lost.")
    page.fill("#question", "?" * 600)
    page.click("#submit")
    expect(page.get_by_role("alert")).to_contain_text("shorten the question to 252 tokens")
    accessible(page)
    page.route("**/v1/answer", lambda route: route.abort())
    page.fill("#question", "Who wrote the letter?")
    page.click("#submit")
    expect(page.get_by_role("alert")).to_contain_text("The service cannot be reached")
    page.unroute("**/v1/answer")
    page.check("#no-answer")
    page.fill("#question", "How tall is the tower of Pisa?")
    page.keyboard.press("Enter")
    expect(page.locator("#answer")).to_have_text("The text has no answer.")
    expect(page.get_by_role("alert")).to_be_empty()
    page.context.close()


def test_a_question_that_is_given_up_is_dropped(browser: Browser, url: str, service: Service) -> None:
    page, _ = opened(browser, url)
    with held(service.batcher):
        page.click("#submit")
        while not service.batcher.waiting:
            page.wait_for_timeout(5)
        page.context.close()
        while service.batcher.waiting:
            time.sleep(0.005)


def test_the_api_is_described_without_help_from_elsewhere(browser: Browser, url: str) -> None:
    page, wrong = opened(browser, url)
    page.goto(f"{url}/docs")
    expect(page.locator("section h2").first).to_have_text("POST /v1/answer")
    page.locator("summary").first.press("Enter")
    expect(page.get_by_text("no_answer", exact=True).first).to_be_visible()
    accessible(page)
    assert wrong == []
    page.context.close()
