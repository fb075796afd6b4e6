"""The house: each file imports lower floors only, and the core imports torch and nothing else."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import bisam

ROOT = Path(bisam.__file__).parent
# In this order; files of one floor do not see each other, and a package's files see their own package.
FLOORS = [
    {"validation", "vector"},
    {"objectives", "schedules"},
    {"distributed"},
    {"evaluation"},
    {"oracle"},
    {"perturbations", "optim"},
    {"masks"},
    {"methods"},
    {"state", "model"},
    {"loss"},
    {"deprecated"},
    {"integrations", "analysis"},
    {"experiments"},
    {"__init__"},
]
ROOFS = {"integrations", "experiments"}  # these import what they integrate, and nothing imports them
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = {path.relative_to(ROOT): path for path in sorted(ROOT.rglob("*.py"))}
each_file = pytest.mark.parametrize("file", FILES, ids=str)


def house(file: Path) -> str:
    """The name on the floor plan: a file of the root, or the folder that a file is in."""
    return file.parts[0].removesuffix(".py")


def imported(source: str, file: Path) -> set[str]:
    """Absolute names of all modules and members that are imported, at any depth of the code."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = ["bisam", *file.parts[:-1]][: len(file.parts) + 1 - node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            names |= {f"{base}.{alias.name}" for alias in node.names}
    return names


def of_bisam(names: set[str]) -> set[str]:
    """The houses behind names, where `from bisam import SAM` is a visit to the roof."""
    parts = [name.split(".") for name in names if name.split(".")[0] == "bisam"]
    return {p[1] if len(p) > 1 and p[1] in FLOOR else "__init__" for p in parts}


def violations(source: str, file: Path) -> set[str]:
    own = house(file)
    inside = {own} if len(file.parts) > 1 else set()
    return {name for name in of_bisam(imported(source, file)) - inside if FLOOR[name] >= FLOOR[own]} | (
        of_bisam(imported(source, file)) & ROOFS - inside
    )


@each_file
def test_every_file_has_a_floor(file):
    assert house(file) in FLOOR


@each_file
def test_a_file_imports_lower_floors_only(file):
    # Above the core a package may take names from the roof, as its users do: `from bisam import SAM`.
    above = {"__init__"} if FLOOR[house(file)] > FLOOR["loss"] and house(file) != "__init__" else set()
    assert violations(FILES[file].read_text(), file) - above == set()


@each_file
def test_the_core_imports_torch_and_the_standard_library_only(file):
    if house(file) in ROOFS:
        return
    outside = {name.split(".")[0] for name in imported(FILES[file].read_text(), file)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "bisam"}


def test_the_core_is_there():
    assert {house(file) for file in FILES} >= set().union(*FLOORS[:8], {"__init__"})


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("vector.py", "from bisam.objectives import mean", {"objectives"}),
        ("objectives.py", "import bisam.oracle", {"oracle"}),
        ("evaluation.py", "from bisam import oracle", {"oracle"}),
        ("evaluation.py", "from . import oracle", {"oracle"}),
        ("methods.py", "def f():\n    from .loss import SharpnessAware", {"loss"}),
        ("methods.py", "from bisam import SAM", {"__init__"}),
        ("methods.py", "from bisam.oracle import Oracle", set()),
        ("analysis/hessian.py", "from bisam.analysis.probe import f\nfrom ..loss import g", set()),
        ("analysis/hessian.py", "from ..integrations import f", {"integrations"}),
        ("__init__.py", "from bisam.experiments import cli", {"experiments"}),
    ],
)
def test_the_checker_sees_what_is_wrong(file, source, found):
    assert violations(source, Path(file)) == found
