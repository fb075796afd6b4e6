"""The package: what a wheel and a source distribution hold, and what `import bisam` costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

import pytest

import bisam

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "bisam"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WHEEL_BYTES = 1_000_000


def built(kind: str, to: Path) -> Path:
    """The path of a wheel or a source distribution of this checkout."""
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(to)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    (path,) = to.iterdir()
    return path


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def metadata(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode())


def of_source() -> set[str]:
    """All files of the package, with what is no Python (py.typed, data)."""
    files = [path for path in SOURCE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {path.relative_to(SOURCE.parent).as_posix() for path in files}


def test_a_wheel_holds_the_package_and_nothing_else(wheel: Path):
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert names == of_source()
    assert "bisam/py.typed" in names


def test_a_wheel_is_small(wheel: Path):
    assert wheel.stat().st_size < WHEEL_BYTES


def test_a_wheel_needs_torch_alone_and_has_the_extras(metadata):
    needs = metadata.get_all("Requires-Dist")
    core = [need for need in needs if "extra ==" not in need]
    assert [need.partition(">")[0] for need in core] == ["torch"]
    assert set(metadata.get_all("Provides-Extra")) == set(PROJECT["optional-dependencies"])
    assert metadata["Version"] == bisam.__version__
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_each_python_that_is_declared_is_tried_by_the_hosted_checks(metadata):
    declared = {name.rpartition(" ")[2] for name in PROJECT["classifiers"] if "Python :: 3." in name}
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    tried = next(line for line in workflow.splitlines() if "python: [" in line)
    assert {f'"{version}"' in tried for version in declared} == {True}
    assert metadata["Requires-Python"] == f">={min(declared, key=lambda version: int(version[2:]))}"


def test_a_source_distribution_holds_what_its_tests_need(tmp_path: Path):
    with tarfile.open(built("sdist", tmp_path)) as archive:
        names = {PurePosixPath(*PurePosixPath(name).parts[1:]).as_posix() for name in archive.getnames()}
    assert {f"src/{name}" for name in of_source()} <= names
    tests = {path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("*.py")}
    assert tests <= names
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "pyproject.toml"} <= names
    assert not [name for name in names if name.startswith(("runs/", "docs/build/")) or "__pycache__" in name]


def test_importing_the_package_loads_no_other_one():
    """The number of modules stands for the time, which a busy machine would change."""
    code = (
        "import sys; before = set(sys.modules); import bisam; new = set(sys.modules) - before; "
        "print(len(new), *sorted({name.partition('.')[0] for name in new} - set(sys.stdlib_module_names)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(SOURCE.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    count, *packages = done.stdout.split()
    assert packages == ["bisam"]
    assert int(count) < 100
