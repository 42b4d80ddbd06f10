"""The machine's own Chromium, driven by Playwright: for tests of what people see.

Debian: `apt-get install chromium`. Elsewhere CHROMIUM may name the program. Without it, and
without Playwright, tests that need a browser are skipped and say so.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "msedge")


def chromium() -> str | None:
    """The path of a Chromium, None if there is none."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@contextmanager
def page(width: int = 1280, height: int = 720) -> Iterator:
    """A page in a browser without a window; `page.complaints` collects what goes wrong in it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed")
    if not chromium():
        pytest.skip(f"no Chromium on this machine: none of {', '.join(NAMES)} is on the PATH")
    with playwright.sync_playwright() as driver:
        # A container's root may not make Chromium's sandbox; only pages of our own are opened.
        options = ["--no-sandbox", "--disable-dev-shm-usage"]
        browser = driver.chromium.launch(executable_path=chromium(), args=options)
        opened = browser.new_page(viewport={"width": width, "height": height})
        opened.complaints = []
        opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
        try:
            yield opened
        finally:
            browser.close()
