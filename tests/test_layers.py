"""The layers: each file imports lower layers only, and the core imports torch and the standard library only.

CONTRIBUTING's table of them is made of this file and of the modules' docstrings: `python tests/test_layers.py`.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

import bisam

ROOT = Path(bisam.__file__).parent
# In this order; files of one floor do not see each other, and a package's files see their own package. The rooms of
# experiments have floors of their own, as `experiments.data`: a package, or a file beside the packages.
FLOORS = [
    {"validation", "vector", "batches", "targets"},
    {"schedules", "seeded"},
    {"objectives"},
    {"distributed"},
    {"evaluation"},
    {"oracle"},
    {"perturbations", "proximal", "optim", "statistics"},
    {"masks"},
    {"methods"},
    {"state", "model"},
    {"loss"},
    {"deprecated"},
    {"analysis"},
    {"integrations"},
    {"experiments.errors", "experiments.markdown"},
    {"experiments.recipes"},
    {"experiments.runs"},
    {"experiments.models"},
    {"experiments.data"},
    {"experiments.studies"},
    {"experiments.training", "experiments.measurements"},
    {"experiments.analyses", "experiments.inference"},
    {"experiments.launch", "experiments.reports"},
    {"experiments.tuning"},
    {"experiments.cli"},
    {"experiments"},  # its entry point
    {"__init__", "__main__"},
]
WITH_ROOMS = {"experiments"}
ROOFS = {"integrations", "experiments"}  # these import what they integrate; only `__main__` imports them
EXTRAS = ROOFS | {"analysis"}  # these may import other packages than torch
FLOOR = {name: i for i, names in enumerate(FLOORS) for name in names}
FILES = {path.relative_to(ROOT): path for path in sorted(ROOT.rglob("*.py"))}
each_file = pytest.mark.parametrize("file", FILES, ids=str)


def place(parts: Sequence[str]) -> str:
    """The name on the floor plan of a module below bisam: its first part, or its first two where there are rooms."""
    rooms = [".".join(parts[:2])] if len(parts) > 1 and parts[0] in WITH_ROOMS else []
    return next((name for name in (*rooms, *parts[:1]) if name in FLOOR), "__init__")


def house(file: Path) -> str:
    """The name on the floor plan: a file of the root, the folder that a file is in, or its room in there."""
    parts = file.with_suffix("").parts
    if parts[0] in WITH_ROOMS and len(parts) > 1:
        return parts[0] if parts[1] == "__init__" else ".".join(parts[:2])
    return parts[0]


def roof(name: str) -> str:
    """The folder whose room a name is, or the name itself."""
    return name.partition(".")[0]


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
    return {place(name.split(".")[1:]) for name in names if name.split(".")[0] == "bisam"}


def violations(source: str, file: Path) -> set[str]:
    own = house(file)
    outside = of_bisam(imported(source, file)) - ({own} if len(file.parts) > 1 else set())
    return {
        name
        for name in outside
        if FLOOR[name] >= FLOOR[own] or (roof(name) in ROOFS and roof(own) not in (roof(name), "__main__"))
    }


def circle(sources: Mapping[Path, str]) -> list[str]:
    """Modules that import each other in a circle, the first of them again at the end; none if there is no circle."""
    names = {".".join(("bisam", *file.with_suffix("").parts)).removesuffix(".__init__"): file for file in sources}

    def module(name: str) -> str | None:
        while name and name not in names:
            name = name.rpartition(".")[0]
        return name or None

    arrows = {name: {module(found) for found in imported(sources[file], file)} for name, file in names.items()}
    over: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in over:
            return []
        for found in sorted(other for other in arrows[name] if other and other != name):
            if way := follow(found, [*path, name]):
                return way
        over.add(name)
        return []

    return next((way for name in names if (way := follow(name, []))), [])


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
    if roof(house(file)) in EXTRAS:
        return
    outside = {name.split(".")[0] for name in imported(FILES[file].read_text(), file)} - set(sys.stdlib_module_names)
    assert outside <= {"torch", "bisam"}


def test_no_files_of_experiments_import_each_other_in_a_circle():
    assert circle({file: path.read_text() for file, path in FILES.items() if file.parts[0] == "experiments"}) == []


def test_the_core_is_there():
    assert {house(file) for file in FILES} >= set().union(*FLOORS[:9], {"__init__"})


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
        ("__init__.py", "from bisam.experiments import cli", {"experiments.cli"}),
        ("experiments/data/glue.py", "from bisam.experiments.data import load\nfrom . import splits", set()),
        ("experiments/data/glue.py", "from bisam.experiments.training.epoch import f", {"experiments.training"}),
        ("experiments/data/glue.py", "def f():\n    from ..studies import g", {"experiments.studies"}),
        ("experiments/data/glue.py", "from bisam.experiments import errors, launch", {"experiments.launch"}),
        ("experiments/errors.py", "import bisam.experiments.recipes.recipe", {"experiments.recipes"}),
        ("experiments/cli/__init__.py", "from bisam.experiments import main", {"experiments"}),
        ("experiments/cli/run.py", "from bisam.integrations.pairs import f", {"integrations"}),
        ("experiments/cli/run.py", "from bisam.experiments.data import load\nfrom .progress import f", set()),
        ("experiments/__init__.py", "from bisam.experiments.cli import main", set()),
        ("integrations/pairs.py", "from bisam.experiments.runs.folder import Run", {"experiments.runs"}),
    ],
)
def test_the_checker_sees_what_is_wrong(file, source, found):
    assert violations(source, Path(file)) == found


@pytest.mark.parametrize(
    ("sources", "found"),
    [
        ({"a": "from bisam.b import f", "b": "import torch"}, []),
        ({"a": "from bisam.b import f", "b": "def g():\n    from bisam import a"}, ["bisam.a", "bisam.b", "bisam.a"]),
        ({"c": "import bisam.a", "a": "import bisam.b", "b": "from . import a"}, ["bisam.a", "bisam.b", "bisam.a"]),
        ({"p/__init__": "from bisam.p.a import f", "p/a": "from bisam.p.b import f", "p/b": ""}, []),
        (
            {"p/__init__": "from bisam.p.a import f", "p/a": "from bisam.p import g"},
            ["bisam.p", "bisam.p.a", "bisam.p"],
        ),
    ],
)
def test_the_checker_sees_a_circle(sources, found):
    assert circle({Path(f"{name}.py"): source for name, source in sources.items()}) == found


# The table in CONTRIBUTING.

CONTRIBUTING = ROOT.parent.parent / "CONTRIBUTING.md"
BEGIN, END = "<!-- layers: begin (python tests/test_layers.py writes this table) -->", "<!-- layers: end -->"


def described(name: str) -> tuple[str, str]:
    """The path of a layer's module in the repository, and the first sentence of its docstring."""
    path = ROOT.joinpath(*name.split("."))
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    first = (ast.get_docstring(ast.parse(file.read_text())) or "").split("\n\n")[0]
    text = " ".join(first.split()).partition(": ")[2] or first
    return f"{'/'.join(name.split('.'))}{'/' if path.is_dir() else '.py'}", text.rstrip(".:")


def table() -> str:
    rows = ["| layer | module | contents |", "|---|---|---|"]
    for number, names in enumerate(FLOORS):
        there = [n for n in sorted(names) if ROOT.joinpath(*n.split(".")).is_dir() or (ROOT / f"{n}.py").is_file()]
        there += [n for n in sorted(names) if "." in n and ROOT.joinpath(*n.split(".")).with_suffix(".py").is_file()]
        rows += [f"| {number} | `{module}` | {text} |" for module, text in map(described, there)]
    return "\n".join([BEGIN, *rows, END])


def written(page: str) -> str:
    return page[: page.index(BEGIN)] + table() + page[page.index(END) + len(END) :]


@pytest.mark.skipif(not CONTRIBUTING.is_file(), reason="needs a checkout")
def test_contributing_has_the_layers():
    page = CONTRIBUTING.read_text()
    assert page == written(page), "run python tests/test_layers.py"


if __name__ == "__main__":
    CONTRIBUTING.write_text(written(CONTRIBUTING.read_text()))
