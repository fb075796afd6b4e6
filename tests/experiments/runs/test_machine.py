"""The machine of a run."""

from __future__ import annotations

import subprocess
import sys

import pytest

QUIET = """
import logging
import {module}
{call}
assert logging.getLogger("lightning_fabric").level == logging.ERROR, logging.getLogger("lightning_fabric").level
"""


@pytest.mark.parametrize(
    ("module", "call"),
    [("bisam.experiments.runs.machine", "{module}.Machine().fabric()"), ("bisam.experiments.training.train", "")],
    ids=["command", "process of a device"],
)
def test_fabric_is_quiet(module, call):
    """Importing Lightning sets the level of its logger to INFO; each process would print advice."""
    code = QUIET.format(module=module, call=call.format(module=module))
    subprocess.run([sys.executable, "-c", code], check=True)
