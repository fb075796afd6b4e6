"""Folder: the files of one run, which one process at a time may write.

runs/digits/sam-noise-0.4-1f0c22e9/seed-0/
    recipe.json             the recipe; its fingerprint is in the name of the folder
    metrics.csv             one row for each epoch; the last one of a run of steps may be cut short
    log.txt                 lines with times, of each epoch and of how the run ended; a resumed run appends to it
    stats.csv               with --stats, mean statistics of the steps of each epoch that was trained with it
    checkpoint.pt           the state after the last completed epoch, see checkpoint.py
    checkpoint-previous.pt  the checkpoint before it, until the run is finished
    checkpoint-damaged.pt   a checkpoint.pt that was found damaged
    result.json             written once, at the end, see results.py
    analysis.json           what `bisam analyse` measured afterwards, with its figures in analysis/

Each file except log.txt is replaced atomically and is on the disk before the next one is written. The command that
started a run also resumes it: after the last completed epoch, or after the one before if checkpoint.pt is damaged.
"""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from filelock import FileLock, Timeout

from bisam.experiments.errors import CopyError, InUseError, RunError, RunWarning
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.checkpoint import CHECKPOINT, DAMAGED, PREVIOUS, file_fault, read_checkpoint, serialized
from bisam.experiments.runs.environment import environment
from bisam.experiments.runs.files import damaged, make_folders, read_bytes, read_json, read_rows, to_csv, write
from bisam.experiments.runs.results import (
    Result as Result,
    Row as Row,
    first_diverged,
    read_metrics,
    read_result,
    with_checksums,
)
from bisam.statistics import NAMES


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

        If the latest checkpoint is damaged and the one before it is not, the damaged one is moved aside.

        Raises:
            RunError: another process has locked it, it is damaged, or it belongs to another recipe.
            OSError: the disk is full or read-only.

        Warns:
            RunWarning: the latest checkpoint is damaged.
        """
        environment()  # looked up now: by the end of the run another commit may be checked out
        make_folders(self.folder)
        lock = FileLock(self._lock, timeout=0)  # the system releases it when the process is killed
        try:
            with lock:
                self._claim()
                yield
        except Timeout:
            raise InUseError(
                f"{self.folder} is in use by another process: let it finish, or give another --out"
            ) from None

    @property
    def _lock(self) -> Path:
        return self.folder / ".lock"

    def _claim(self) -> None:
        for leftover in self.folder.glob(".*.tmp"):  # from a process that was killed while it wrote
            leftover.unlink(missing_ok=True)
        path = self.folder / "recipe.json"
        if not path.exists():
            write(path, json.dumps(self.recipe.to_dict(), indent=2) + "\n", make_folder=False)
        else:
            self.check_recipe()
        if self.result is None:
            self._set_damaged_checkpoint_aside()

    def _set_damaged_checkpoint_aside(self) -> None:
        latest, previous = self.folder / CHECKPOINT, self.folder / PREVIOUS
        if not latest.exists() or (fault := file_fault(latest)) is None:
            return
        if not previous.exists():
            raise damaged(latest, ValueError(fault))
        if (other := file_fault(previous)) is not None:
            raise damaged(latest, ValueError(f"{fault}, and {PREVIOUS} too: {other}"))
        latest.replace(latest.with_name(DAMAGED))
        warnings.warn(
            f"{latest} is damaged ({fault}), and is now {DAMAGED}: the run resumes from {PREVIOUS}, one epoch earlier",
            RunWarning,
            stacklevel=2,
        )

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
    def result(self) -> Result | None:
        """The result that `Writer.finish` wrote, or None.

        Raises:
            RunError: the file is damaged.
        """
        return read_result(self.folder, self.recipe)

    def known_result(self) -> Result | None:
        """Return the result, or None, without locking the folder.

        Raises:
            RunError: the folder is damaged, or belongs to another recipe.
        """
        if not (self.folder / "result.json").exists():
            return None
        self.check_recipe()  # first: the result of another recipe is no damage
        return self.result

    def checkpoint(self) -> dict[str, Any] | None:
        """Return the state in the latest checkpoint, on the CPU, or None if there is none.

        Raises:
            RunError: the file is damaged, or belongs to another recipe.
        """
        for path in (self.folder / CHECKPOINT, self.folder / PREVIOUS):
            if path.exists():  # the first is not there if the process ended while it was replaced
                state, recipe = read_checkpoint(path)
                self._check(path, recipe)
                return state
        return None

    def metrics(self) -> list[Row]:
        """Return the rows of the completed epochs.

        Raises:
            RunError: the file is damaged.
        """
        return read_metrics(self.folder, self.recipe) if (self.folder / "metrics.csv").exists() else []

    def stats(self) -> list[Row]:
        """Return the statistics of the epochs that were trained with `Machine.stats`, without those that have none.

        Raises:
            RunError: the file is damaged.
        """
        path = self.folder / "stats.csv"
        if not path.exists():
            return []
        rows = read_rows(path, blanks=True)
        if not rows or any(row.keys() - {"epoch", *NAMES} or row.get("epoch", 0.5) % 1 for row in rows):
            raise damaged(path, ValueError("it does not have the columns of statistics, or numbers of epochs"))
        return [{**row, "epoch": int(row["epoch"])} for row in rows]

    def writer(self) -> Writer:
        """Return what writes the files of this run into the folder as it is now, which `open` has locked."""
        return Writer(self)


class Writer:
    """Writes the files of a run, into the folder that was there when it was made.

    If the folder is deleted, moved away or replaced, nothing is written into the one in its place. The folder is
    recognised by its lock file: another file cannot have the same number, because the process that locked it keeps it
    open.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._lock = self._number()

    def _number(self) -> tuple[int, int] | None:
        try:
            found = (self._run.folder / ".lock").stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino

    def check(self) -> None:
        """Check that the folder is still the same.

        Raises:
            RunError: it is not.
        """
        if self._lock != self._number():
            raise self._gone()

    def _gone(self) -> RunError:
        return RunError(
            f"{self._run.folder} was deleted, moved or replaced while the run was in progress: training stopped, and "
            "nothing is written into a new folder; the same command starts the run again, or resumes what is there"
        )

    def metrics(self, history: Sequence[Row]) -> None:
        """Replace the metrics if they differ: they are ahead of the checkpoint after a kill, and can be damaged.

        Raises:
            RunError: the folder was deleted or replaced.
            OSError: the disk is full or read-only.
        """
        self.check()
        if read_bytes(self._run.folder / "metrics.csv") != (content := to_csv(history).encode()):
            self.write("metrics.csv", content)

    def stats(self, rows: Sequence[Row]) -> None:
        """Replace the statistics of the epochs that have any.

        Raises:
            RunError: the folder was deleted or replaced.
            OSError: the disk is full or read-only.
        """
        self.write("stats.csv", to_csv([{name: row.get(name) for name in ("epoch", *NAMES)} for row in rows]))

    def save(self, state: Mapping[str, Any], history: Sequence[Row]) -> None:
        """Replace the metrics and then the checkpoint, and keep the one before.

        The epoch is completed once the checkpoint is replaced.

        Raises:
            RunError: the folder was deleted or replaced.
            OSError: the disk is full or read-only.
        """
        checkpoint = serialized(state, self._run.recipe)
        self.metrics(history)
        self.write(CHECKPOINT, checkpoint, keep=self._run.folder / PREVIOUS)

    def log(self, line: str) -> None:
        """Append a line to log.txt.

        Raises:
            RunError: the folder was deleted or replaced.
            OSError: the disk is full or read-only.
        """
        self.check()
        try:
            with open(self._run.folder / "log.txt", "a", encoding="utf-8") as file:
                file.write(f"{line}\n")
        except (FileNotFoundError, NotADirectoryError) as error:  # deleted since
            raise self._gone() from error

    def finish(self, result: Mapping[str, Any], history: Sequence[Row]) -> Result:
        """Write the result with its environment and time, and return it; the run is finished then.

        Raises:
            RunError: the folder was deleted or replaced.
            OSError: the disk is full or read-only.
        """
        values = {**result, **environment(), "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        complete = with_checksums(values, self._run.recipe, history)
        self.metrics(history)
        self.write("result.json", json.dumps(complete, indent=2) + "\n")
        (self._run.folder / PREVIOUS).unlink(missing_ok=True)
        return cast(Result, complete)

    def write(self, name: str, content: str | bytes, keep: Path | None = None) -> None:
        """Replace a file of the folder atomically; see `files.write`.

        Raises:
            RunError: the folder was deleted or replaced.
            OSError: the disk is full or read-only.
        """
        self.check()
        try:
            write(self._run.folder / name, content, keep=keep, make_folder=False)
        except (FileNotFoundError, NotADirectoryError) as error:  # deleted since
            raise self._gone() from error


@dataclass(frozen=True)
class Finished:
    """A finished run, read from its folder."""

    recipe: Recipe
    result: Result
    metrics: list[Row]
    folder: Path | None = field(default=None, compare=False)
    """Where it was read from."""

    @property
    def diverged(self) -> int | None:
        """First epoch with a loss that is not finite, or None; results of 0.1 do not tell it, but their metrics do."""
        return self.result["diverged"] if "diverged" in self.result else first_diverged(self.metrics)


def finished(root: Path) -> Iterator[Finished | RunError]:
    """Yield the finished runs in `root` in the order of their folders, and an error in place of each damaged one.

    A run counts once: of several folders with one recipe and seed, as a backup and its original, there is the one with
    the name of the recipe, else the first, and an error in place of the others.
    """
    found = [_finished(path.parent) for path in sorted(root.glob("*/seed-*/result.json"))]
    counted = dict[Recipe, Path]()
    for run in found:
        if isinstance(run, Finished) and run.folder is not None:
            is_own = run.folder == Run.under(root, run.recipe).folder
            counted[run.recipe] = run.folder if is_own else counted.get(run.recipe, run.folder)
    for run in found:
        if isinstance(run, Finished) and run.folder != (original := counted[run.recipe]):
            yield CopyError(
                f"{run.folder} has the recipe and seed of {original}, and a run counts once: move one of them out of "
                f"{root}"
            )
        elif run is not None:
            yield run


def _finished(folder: Path) -> Finished | RunError | None:
    """The finished run in a folder, the error if it is damaged, or None if it was deleted since it was listed."""
    try:
        recipe = read_recipe(folder)
        if (result := read_result(folder, recipe)) is None:
            return None
        return Finished(recipe, result, read_metrics(folder, recipe, result), folder)
    except RunError as error:
        return error


def read_recipe(folder: Path) -> Recipe:
    """Return the recipe of a run folder.

    Raises:
        RunError: the file is missing or damaged.
    """
    path = folder / "recipe.json"
    if (values := read_json(path)) is None:
        raise damaged(path, ValueError("it is missing"))
    try:
        return Recipe.from_dict(values)
    except (ValueError, TypeError) as error:
        raise damaged(path, error) from error
    except RunError as error:  # of a later version
        raise RunError(f"{path}: {error}") from error
