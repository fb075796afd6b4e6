"""Folder: the files of one run, which one process at a time may write.

runs/digits/sam-noise-0.4-1f0c22e9/seed-0/
    recipe.json       the recipe; its fingerprint is in the name of the folder
    metrics.csv       one row for each epoch
    checkpoint.pt     the state after the last completed epoch, see checkpoint.py
    result.json       written once, at the end

Each file is replaced atomically. The command that started a run also resumes it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bisam.experiments.errors import RunError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.checkpoint import read_checkpoint, serialized
from bisam.experiments.runs.environment import environment
from bisam.experiments.runs.files import damaged, read_json, read_rows, to_csv, write

Row = dict[str, float]
"""Metrics of an epoch."""


@dataclass(frozen=True)
class Run:
    """The folder of one recipe and seed."""

    folder: Path
    recipe: Recipe

    @classmethod
    def under(cls, root: Path, recipe: Recipe) -> Run:
        """Return the run of `recipe` among the runs in `root`."""
        return cls(root / recipe.slug / f"seed-{recipe.seed}", recipe)

    @contextmanager
    def open(self) -> Generator[None]:
        """Lock the folder for this process; create it, or check that it belongs to this recipe.

        Raises:
            RunError: another process has locked it, it is damaged, or it belongs to another recipe.
            OSError: the disk is full or read-only.
        """
        environment()  # looked up now: by the end of the run another commit may be checked out
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.folder / ".lock", timeout=0)  # the system releases it when the process is killed
        try:
            with lock:
                self._claim()
                yield
        except Timeout:
            raise RunError(
                f"{self.folder} is in use by another process: let it finish, or give another --out"
            ) from None

    def _claim(self) -> None:
        for leftover in self.folder.glob(".*.tmp"):  # from a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        path = self.folder / "recipe.json"
        if not path.exists():
            write(path, json.dumps(self.recipe.to_dict(), indent=2) + "\n")
            return
        self.check_recipe()

    def check_recipe(self) -> None:
        """Check that the folder belongs to this recipe.

        Raises:
            RunError: it is damaged, or belongs to another recipe.
        """
        self._check(self.folder, read_recipe(self.folder))

    def _check(self, path: Path, found: Recipe) -> None:
        if found != self.recipe:
            ours, theirs = self.recipe.to_dict(), found.to_dict()
            differ = ", ".join(f"{k}={theirs[k]!r} there, {v!r} here" for k, v in ours.items() if theirs[k] != v)
            raise RunError(f"{path} belongs to another recipe ({differ}): move it away, or give another --out")

    @property
    def result(self) -> dict[str, Any] | None:
        """The result that `finish` wrote, or None.

        Raises:
            RunError: the file is damaged.
        """
        return _read_result(self.folder)

    def checkpoint(self) -> dict[str, Any] | None:
        """Return the state in the checkpoint, on the CPU, or None if there is none.

        Raises:
            RunError: the file is damaged, or belongs to another recipe.
        """
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        state, recipe = read_checkpoint(path)
        self._check(path, recipe)
        return state

    def metrics(self) -> list[Row]:
        """Return the rows of the completed epochs.

        Raises:
            RunError: the file is damaged.
        """
        path = self.folder / "metrics.csv"
        return read_rows(path) if path.exists() else []

    def save(self, state: Mapping[str, Any], history: Sequence[Row]) -> None:
        """Replace the metrics and then the checkpoint; the epoch is completed once the checkpoint is replaced."""
        checkpoint = serialized(state, self.recipe)
        write(self.folder / "metrics.csv", to_csv(history))
        write(self.folder / "checkpoint.pt", checkpoint)

    def finish(self, result: Mapping[str, Any]) -> dict[str, Any]:
        """Write the result with its environment and time, and return it; the run is finished then."""
        complete = {**result, **environment(), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        write(self.folder / "result.json", json.dumps(complete, indent=2) + "\n")
        return complete


@dataclass(frozen=True)
class Finished:
    """A finished run, read from its folder."""

    recipe: Recipe
    result: dict[str, Any]
    metrics: list[Row]


def finished(root: Path) -> Iterator[Finished | RunError]:
    """Yield the finished runs in `root` in the order of their folders, and an error in place of each damaged one."""
    for path in sorted(root.glob("*/seed-*/result.json")):
        try:
            recipe, result = read_recipe(path.parent), _read_result(path.parent)
            assert result is not None
            yield Finished(recipe, result, _read_metrics(path.with_name("metrics.csv"), recipe.epochs))
        except RunError as error:
            yield error


def read_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run folder.

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


_RESULT_KEYS = (
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
    if result is not None and (missing := [key for key in _RESULT_KEYS if key not in result]):
        raise damaged(path, ValueError(f"it has no {', '.join(missing)}"))
    return result


def _read_metrics(path: Path, epochs: int) -> list[Row]:
    rows = read_rows(path)
    if len(rows) != epochs or any("flipped" not in row for row in rows):
        raise damaged(path, ValueError(f"it does not have the {epochs} epochs of the recipe"))
    return rows
