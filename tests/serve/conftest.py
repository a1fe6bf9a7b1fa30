"""What several test files ask for: the service behind a server as new, a browser for its page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from .fakes import FakeService

BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")


@pytest.fixture
def service(shared: tuple[FakeService, str]) -> FakeService:
    """That of the file's server, as new for each test."""
    service = shared[0]
    vars(service).update(vars(FakeService()))
    return service


# Not of the whole session: while Playwright is open, its event loop is this thread's.
@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; tests that want it are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    executable = next(filter(None, map(shutil.which, BROWSERS)), None)
    if executable is None:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as started:
        # root, as in a container, can use no sandbox
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
        browser = started.chromium.launch(
            executable_path=executable, args=arguments, timeout=120_000
        )
        yield browser
        browser.close()
