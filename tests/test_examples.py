"""Each example runs, and the twins differ by what the README says."""

from __future__ import annotations

import difflib
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_the_example_runs(path):
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.split()[-1]) > 0.85


def test_the_twins_differ_by_an_import_an_object_and_a_line():
    plain, bisam = ((EXAMPLES / f"train_{name}.py").read_text().splitlines()[1:] for name in ("plain", "bisam"))
    changes = [line for line in difflib.ndiff(plain, bisam) if line[0] in "+-" and line[1:].strip()]
    assert [line[0] for line in changes] == ["+", "+", "-", "+"]


def test_links_in_the_readme_lead_somewhere():
    root = EXAMPLES.parent
    links = re.findall(r"\]\((?!https?:)([^)#]+)\)", (root / "README.md").read_text())
    assert len(links) > 5
    assert [link for link in links if not (root / link).exists()] == []
