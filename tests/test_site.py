"""The site: each public name is on a page of the reference, and the pages build without a warning."""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote

import pytest

import bisam
from tests.test_public import MODULES

DOCS = Path(__file__).parent.parent / "docs"
PACKAGES = ("analysis", "integrations.checkpoint", "integrations.lightning", "integrations.pairs")
PACKAGES += ("integrations.transformers", "statistics")


def documented() -> list[tuple[str, str]]:
    """Module and name of each entry of the reference, in the order of the pages."""
    found: list[tuple[str, str]] = []
    for page in sorted((DOCS / "api").glob("*.md")):
        module = ""
        for line in page.read_text().splitlines():
            if line.startswith(".. currentmodule::"):
                module = line.split()[-1]
            elif line.startswith(".. autodata::"):
                found.append(tuple(line.split()[-1].rsplit(".", 1)))
            elif re.fullmatch(r"   \w+", line):
                found.append((module, line.strip()))
    return found


def exported(package: str) -> set[str]:
    """The names that a package exports explicitly (`X as X`), or the classes of a module, without importing it."""
    path = Path(bisam.__file__).parent / package.replace(".", "/")
    if not path.is_dir():
        body = ast.parse(path.with_suffix(".py").read_text()).body
        named = {node.name for node in body if isinstance(node, ast.ClassDef | ast.FunctionDef)}
        public = {"statistics": {"StepStats", "StatsMean"}}.get(package)
        return public or {name for name in named if not name.startswith("_")}
    tree = ast.walk(ast.parse((path / "__init__.py").read_text()))
    aliases = [alias for node in tree if isinstance(node, ast.ImportFrom) for alias in node.names]
    return {alias.name for alias in aliases if alias.name == alias.asname}


def test_every_public_name_is_in_the_reference():
    names = {f"{module}.{name}" for module, name in documented()}
    types = {name.rsplit(".", 1)[1] for name in names}  # a name of bisam may be documented in its module
    missing = {name for name in bisam.__all__ if not isinstance(getattr(bisam, name), ModuleType)} - types
    for module, members in MODULES.items():
        missing |= {name for name in members.split() if not {f"{module.__name__}.{name}", f"bisam.{name}"} & names}
    for package in PACKAGES:
        missing |= {f"{package}.{name}" for name in exported(package) if f"bisam.{package}.{name}" not in names}
    assert missing - {"analysis.CORRUPTIONS"} == set()  # is with its module, among the types


def test_the_reference_has_each_name_once():
    assert len(documented()) == len(set(documented())) > 100


@pytest.mark.parametrize("module", sorted({module for module, _ in documented()}))
def test_the_names_of_the_reference_exist(module):
    if module.endswith(("lightning", "transformers")):
        pytest.importorskip(module.rsplit(".", 1)[1])
    there = importlib.import_module(module)
    assert [name for home, name in documented() if home == module and not hasattr(there, name)] == []


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_parser", "pydata_sphinx_theme", "sphinx_copybutton", "sphinx_gallery", "peft"):
        pytest.importorskip(package)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "-q",
        "-W",
        "--keep-going",
        "-D",
        "plot_gallery=0",
        DOCS,
        tmp_path / "site",
    ]
    environment = {**os.environ, "BISAM_DOCS_VERSIONS": f"9.9 {bisam.__version__}", "BISAM_DOCS_ROOT": "/bisam/"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr
    site = tmp_path / "site"
    assert json.loads((site / "switcher.json").read_text()) == [
        {"version": "9.9", "url": "/bisam/9.9/", "preferred": True},
        {"version": bisam.__version__, "url": f"/bisam/{bisam.__version__}/", "preferred": False},
    ]
    for path in site.rglob("*.html"):
        if "_static" not in path.parts:
            text = path.read_text()
            assert not re.search(r"<(script|img)[^>]* src=\"http", text), f"{path} needs the network"
            files = set(re.findall(r" (?:href|src)=\"([^\":#?]+)(?:[#?][^\"]*)?\"", text))
            assert [link for link in files if not (path.parent / unquote(link)).exists()] == [], path
    page = (site / "api" / "generated" / "bisam.SAM.html").read_text()
    assert "theme_switcher_json_url = '/bisam/switcher.json'" in page
    assert "Foret et al., 2021" in page
    assert "[source]" in page
