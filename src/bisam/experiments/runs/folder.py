"""Folder: one training run on disk, written atomically, resumed by the same command, held by one process at a time.

runs/digits/sam-noise-0.4-1f0c22e9/seed-0/
    recipe.json       what was asked for; its fingerprint is in the folder's name
    metrics.csv       one row per epoch
    checkpoint.pt     everything that the next epoch needs, and the weights of the best epoch
    result.json       written once, at the end
"""

from __future__ import annotations

import csv
import io
import json
import os
import platform
import subprocess
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

from bisam import __version__
from bisam.experiments.errors import RunError
from bisam.experiments.recipes.recipe import Recipe

Row = dict[str, float]


@dataclass(frozen=True)
class Run:
    """The folder of one recipe and seed."""

    folder: Path
    recipe: Recipe

    @classmethod
    def under(cls, root: Path, recipe: Recipe) -> Run:
        """The run of `recipe` among the runs in `root`."""
        return cls(root / recipe.slug / f"seed-{recipe.seed}", recipe)

    @contextmanager
    def open(self) -> Generator[None]:
        """Hold the folder; it is made, or found to be this recipe's.

        Raises:
            RunError: another process holds it, it is damaged, or it belongs to another recipe.
            OSError: the disk is full or read-only.
        """
        environment()  # of the code that runs: by the time it ends another commit may be checked out
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", timeout=0)  # the system drops it when a process is killed
        try:
            with lock:
                self._claim()
                yield
        except Timeout:
            raise RunError(
                f"{self.folder} is in use by another process: let it finish, or give another --out"
            ) from None

    def _claim(self) -> None:
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        path = self.folder / "recipe.json"
        if not path.exists():
            write(path, json.dumps(self.recipe.to_dict(), indent=2) + "\n")
            return
        self.check_recipe()

    def check_recipe(self) -> None:
        """Make sure that the folder is this recipe's.

        Raises:
            RunError: it is damaged, or another recipe's.
        """
        self._check(self.folder, read_recipe(self.folder))

    def _check(self, path: Path, found: Recipe) -> None:
        if found != self.recipe:
            ours, theirs = self.recipe.to_dict(), found.to_dict()
            differ = ", ".join(f"{k}={theirs[k]!r} there, {v!r} here" for k, v in ours.items() if theirs[k] != v)
            raise RunError(f"{path} belongs to another recipe ({differ}): move it away, or give another --out")

    @property
    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None.

        Raises:
            RunError: the file is damaged.
        """
        return _read_result(self.folder)

    def checkpoint(self) -> dict[str, Any] | None:
        """The last epoch's checkpoint on the CPU, or None.

        Raises:
            RunError: the file is damaged, or another recipe's.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        content = path.read_bytes()
        try:
            checkpoint = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            found = Recipe.from_dict(checkpoint.pop("recipe"))
        except RunError as error:  # of a later version
            raise RunError(f"{path}: {error}") from error
        except Exception as error:  # torch raises whatever its unpickler stumbles over
            raise damaged(path, error) from error
        self._check(path, found)
        return checkpoint

    def metrics(self) -> list[Row]:
        """The epochs so far.

        Raises:
            RunError: the file is damaged.
        """
        path = self.folder / "metrics.csv"
        return _read_rows(path) if path.exists() else []

    def save(self, checkpoint: Mapping[str, Any], history: Sequence[Row]) -> None:
        """Replace metrics and checkpoint, each in one stroke; the epoch is over once the checkpoint is there."""
        buffer = io.BytesIO()
        torch.save({**checkpoint, "recipe": self.recipe.to_dict()}, buffer)
        write(self.folder / "metrics.csv", to_csv(history))
        write(self.folder / "checkpoint.pt", buffer.getvalue())

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the result, with where and when it was made; from now on the run is done."""
        complete = {**result, **environment(), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write(self.folder / "result.json", json.dumps(complete, indent=2) + "\n")
        return complete


@dataclass(frozen=True)
class Finished:
    """A finished run, read back from its folder."""

    recipe: Recipe
    result: dict[str, Any]
    metrics: list[Row]


def finished(root: Path) -> Iterator[Finished | RunError]:
    """All finished runs in `root`, in the order of their folders; in a damaged one's place, what is wrong with it."""
    for path in sorted(root.glob("*/seed-*/result.json")):
        try:
            recipe, result = read_recipe(path.parent), _read_result(path.parent)
            assert result is not None
            yield Finished(recipe, result, _read_metrics(path.with_name("metrics.csv"), recipe.epochs))
        except RunError as error:
            yield error


def read_recipe(folder: Path) -> Recipe:
    """The recipe of a run folder.

    Raises:
        RunError: the file is missing or damaged.
    """
    path = folder / "recipe.json"
    values = read_json(path)
    try:
        return Recipe.from_dict(values or {})
    except (ValueError, TypeError) as error:
        raise damaged(path, error) from error
    except RunError as error:  # of a later version
        raise RunError(f"{path}: {error}") from error


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where there is no file.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(values, dict):
        raise damaged(path, ValueError("it is not an object"))
    return values


_RESULT = (
    "test_best",
    "test_last",
    "validation_best",
    "best_epoch",
    "seconds_per_epoch",
    "relative_time",
    "gradients_per_step",
    "forwards_per_step",
    "finished",
)


def _read_result(folder: Path) -> dict[str, Any] | None:
    path = folder / "result.json"
    result = read_json(path)
    if result is not None and (missing := [key for key in _RESULT if key not in result]):
        raise damaged(path, ValueError(f"it has no {', '.join(missing)}"))
    return result


def _read_rows(path: Path) -> list[Row]:
    try:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(path.read_text()))]
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path, error) from error


def _read_metrics(path: Path, epochs: int) -> list[Row]:
    rows = _read_rows(path)
    if len(rows) != epochs or any("flipped" not in row for row in rows):
        raise damaged(path, ValueError(f"it has not the {epochs} epochs of the recipe"))
    return rows


def damaged(path: Path, error: Exception) -> RunError:
    """The error that names a damaged file, what is wrong with it, and the remedy."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(f"{path} is damaged ({reason}): delete {path.parent} to run it again; other runs are not affected")


def write(path: Path, content: str | bytes) -> None:
    """Write a file so that it is there whole or not at all: to a neighbour first, then renamed.

    Raises:
        OSError: the disk is full or read-only; what was at `path` still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of equal keys as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


@cache
def environment() -> dict[str, str]:
    """Where results come from: versions, hardware, commit."""
    return {
        "bisam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "commit": commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """The commit of this package, or unknown where it is not in its own repository."""
    package = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if package != Path(git("rev-parse", "--show-toplevel")).resolve() / "src" / "bisam":
            return "unknown"  # installed somewhere inside another project's repository
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
