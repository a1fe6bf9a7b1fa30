"""The page at `/` in headless Chromium, by Playwright; skipped where there is none of these."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from astra_runtime.serve.http import HttpOptions
from astra_runtime.serve.service import ServiceFailed
from tests.serve.fakes import FakeService, serving

KEY = "a-key"
PHONE = {"width": 390, "height": 800}


@pytest.fixture(scope="module")
def shared() -> Iterator[tuple[FakeService, str]]:
    service = FakeService()
    with serving(service, HttpOptions(api_keys=(KEY,))) as url:
        yield service, url


@pytest.fixture
def page(browser: Any, shared: tuple[FakeService, str], service: FakeService) -> Iterator[Any]:
    """The page with its key given; nothing may have gone wrong in it at the end."""
    context = browser.new_context(viewport={"width": 1280, "height": 800})
    page = context.new_page()
    page.set_default_timeout(60_000)
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda line: wrong.append(line.text) if line.type == "error" else None)
    page.goto(shared[1])
    page.fill("#key", KEY)
    page.click("#key-form button")
    page.wait_for_selector("#state[data-ready=yes]")
    yield page
    context.close()
    # the browser itself reports the 401 that the page asks for the key after
    assert [text for text in wrong if "401" not in text] == []


def ask(page: Any, question: str) -> None:
    page.fill("#question", question)
    page.press("#question", "Enter")


def picture(page: Any, name: str) -> None:
    """Keeps a picture where somebody wants to look at one."""
    folder = os.environ.get("ASTRA_PICTURES")
    if folder:
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def test_a_question_is_answered_in_a_stream(page: Any, service: FakeService) -> None:
    service.text = "Paris.\n```python\nprint('Ça va')\n```\nThat is all, <b>really</b>."
    ask(page, "What is the capital of France?")
    answer = page.locator(".turn.assistant:not(.waiting)")
    answer.wait_for()
    assert "That is all, <b>really</b>." in answer.locator(".words").inner_text()
    assert answer.locator("pre").inner_text() == "print('Ça va')"
    assert "answered by rank 0" in answer.locator(".note").inner_text()
    assert page.locator(".turn.user .words").inner_text() == "What is the capital of France?"
    ask(page, "And of Spain?")
    page.locator(".turn.assistant:not(.waiting)").nth(1).wait_for()
    asked = service.tokenizer.decode(service.asked[1].prompt_ids)
    assert asked.count("<|start|>") == 4, "the conversation goes along"
    picture(page, "desktop")


def test_devices_queue_and_timeline_are_shown(page: Any) -> None:
    peers = page.locator(".peer")
    assert peers.count() == 2
    assert "writes 1 answer" in peers.nth(0).inner_text()
    assert "away" in peers.nth(1).inner_text()
    # each device's own view of the one link
    assert "↑ 5.0 kB ↓ 7.0 kB" in peers.nth(0).inner_text()
    assert "↑ 7.0 kB ↓ 5.0 kB" in peers.nth(1).inner_text()
    assert "43 %" in peers.nth(0).inner_text()
    assert "↑ 1.0 Mbit/s ↓ 0 bit/s" in peers.nth(0).inner_text()
    assert "2.5 ms" in peers.nth(0).inner_text()
    assert "2 running · 1 waiting" in page.inner_text("#queue")
    assert page.locator("#timeline rect.compute").count() == 2  # the bar, and in the legend
    assert "750 ms" in page.text_content("#timeline svg")


def test_an_answer_can_be_stopped(page: Any, service: FakeService) -> None:
    service.endless = True
    ask(page, "Go on")
    page.locator(".turn.assistant .words", has_text=re.compile("Gr")).wait_for()
    page.click("#stop")
    assert service.cancelled.wait(60)
    page.locator(".note", has_text="Stopped.").wait_for()
    page.click("#settings summary")
    page.click("#clear")
    assert page.locator(".turn").count() == 0


def test_an_error_is_shown(page: Any, service: FakeService) -> None:
    service.error, service.error_at = ServiceFailed("rank 1 was lost"), 4
    ask(page, "Go on")
    page.locator(".note.problem", has_text="rank 1 was lost").wait_for()


def test_readable_on_a_phone(page: Any, service: FakeService) -> None:
    page.set_viewport_size(PHONE)
    service.text = "A long answer with averyveryverylongwordthatfitsnoline" * 8
    ask(page, "Hello")
    page.locator(".turn.assistant:not(.waiting)").wait_for()
    picture(page, "phone-chat")
    wide = "document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= PHONE["width"], "nothing sticks out"
    assert not page.locator("#devices").is_visible()
    page.click("nav [data-view=devices]")
    assert page.locator("#devices").is_visible()
    assert not page.locator("#chat").is_visible()
    assert page.evaluate(wide) <= PHONE["width"]
    picture(page, "phone-devices")


def test_a_wrong_key_is_asked_for_again(
    browser: Any, shared: tuple[FakeService, str], service: FakeService
) -> None:
    page = browser.new_page()
    page.set_default_timeout(60_000)
    page.goto(shared[1])
    page.fill("#key", "wrong")
    page.click("#key-form button")
    page.locator("#key-problem").wait_for()
    page.fill("#key", KEY)
    page.click("#key-form button")
    page.wait_for_selector("#state[data-ready=yes]")
    page.close()


def test_nothing_is_loaded_from_elsewhere() -> None:
    folder = Path(__file__).parents[2] / "python/astra_runtime/serve/http/page"
    for file in folder.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|url\(", text), file
