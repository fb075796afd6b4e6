"""A real browser for tests of pages: a Chromium of the system, through Playwright; without one the tests are skipped.

`BISAM_BROWSER` is the path of one in another place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest

NAMES = ("chromium", "google-chrome-stable", "google-chrome", "chromium-browser")


def found() -> str | None:
    """The path of a browser that starts; some systems have a stub that asks for another package instead."""
    for path in (os.environ.get("BISAM_BROWSER"), *map(shutil.which, NAMES)):
        if path and subprocess.run([path, "--version"], capture_output=True, check=False, timeout=60).returncode == 0:
            return path
    return None


@contextmanager
def started() -> Generator[Any]:
    """A Chromium without a window."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if (path := found()) is None:
        pytest.skip("needs a Chromium of the system, such as that of apt-get install chromium")
    with playwright.sync_playwright() as driver:
        # A sandbox needs rights that a container often lacks; the pages are our own.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox", "--disable-gpu"])
        try:
            yield browser
        finally:
            browser.close()
