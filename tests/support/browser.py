"""A real browser for tests of pages: a Chromium of the system, through Playwright; without one the tests are skipped.

`BISAM_BROWSER` is the path of one in another place.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


@contextmanager
def started() -> Generator[Any]:
    """A Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    path = os.environ.get("BISAM_BROWSER") or next(filter(None, map(shutil.which, NAMES)), None)
    if path is None:
        pytest.skip("needs a Chromium of the system, such as that of apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # A sandbox needs rights that a container often lacks; the pages are our own.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()
