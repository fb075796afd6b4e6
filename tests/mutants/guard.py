"""A plugin of pytest for the runs on mutants: makes sure that the copy was imported, and notes which test fails."""

from __future__ import annotations

import json
import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

COPY, FOUND = "BISAM_MUTANT_COPY", "BISAM_MUTANT_FOUND"
"""Environment variables: the folder that bisam must come from, and the file that the name of a failed test goes to."""

WRONG_COPY = 64
"""The exit code where bisam came from elsewhere."""


def pytest_configure() -> None:
    spec = find_spec("bisam")  # not an import: a mutant that cannot be imported is found by the first test
    _check(spec and spec.origin)
    try:
        from hypothesis import settings
    except ImportError:
        return
    # The same examples in each run, and no examples of one mutant in the run of another.
    settings.register_profile("mutants", derandomize=True, database=None)
    settings.load_profile("mutants")


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _note(report.nodeid, str(report.longrepr))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.failed:
        _note(report.nodeid, str(report.longrepr))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    _check(getattr(sys.modules.get("bisam"), "__file__", None))


def _check(file: str | None) -> None:
    if file is not None and not Path(file).is_relative_to(os.environ[COPY]):
        pytest.exit(f"bisam was imported from {file}, not from {os.environ[COPY]}", returncode=WRONG_COPY)


def _note(test: str, report: str) -> None:
    file = Path(os.environ[FOUND])
    if not file.exists():
        found: dict[str, Any] = {"test": test, "timeout": "Timeout (>" in report}
        file.write_text(json.dumps(found))
