"""The examples in the docstrings of the core run, and the code blocks that do not run are valid Python."""

from __future__ import annotations

import ast
import doctest
import importlib
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import bisam

ROOT = Path(bisam.__file__).parent
FILES = sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] != "experiments")
CODE = ("=", "(", "import ")  # of these an indented block that is code has at least one; the others are tables


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = [module_name(path) for path in FILES]
EXAMPLES = [
    "Adaptive",
    "Binary",
    "BiSAM",
    "Evaluation",
    "L2",
    "Lookahead",
    "ModelOracle",
    "NegLog",
    "next_step",
    "Oracle",
    "Query",
    "SAM",
    "SharpnessAware",
    "Tanh",
    "Vector",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name):
    if "transformers" in name:
        pytest.importorskip("transformers")
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0


@pytest.mark.parametrize("name", EXAMPLES)
def test_the_most_used_names_have_an_example(name):
    assert doctest.DocTestParser().get_examples(getattr(bisam, name).__doc__)


def blocks(path: Path) -> Iterator[str]:
    """The indented blocks of module docstrings that are neither doctests nor tables."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    for paragraph in text.split("\n\n"):
        is_code = all(line.startswith("    ") for line in paragraph.splitlines()) and ">>>" not in paragraph
        if is_code and any(sign in paragraph for sign in CODE):
            yield textwrap.dedent(paragraph)


@pytest.mark.parametrize("path", FILES, ids=MODULES)
def test_other_code_blocks_are_valid_python(path):
    for block in blocks(path):
        if "Q = (1/mu)" not in block:  # a formula
            compile(block, str(path), "exec")
