"""Run: computes what is not there yet of the analyses of a run, and writes it into the folder of the run.

content = analyse(Path("runs/digits/sam-noise-0-1f0c22e9/seed-0"), ["sharpness", "flips"])
numbers(content, ["sharpness"], Settings(weights="last"))          # {"loss": 0.01, "rise": 0.05, ...}
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bisam.analysis.curvature import ConvergenceError
from bisam.experiments.analyses.catalogue import ANALYSES, DEFAULT, known
from bisam.experiments.analyses.file import (
    ANALYSIS,
    Entry,
    as_text,
    content,
    find,
    new_entry,
    read_entries,
    with_entry,
    with_settings,
)
from bisam.experiments.analyses.settings import FILE, Settings
from bisam.experiments.analyses.subject import Subject, of_file, of_run
from bisam.experiments.errors import RunError, reason
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.files import checksum, make_folders, write
from bisam.experiments.runs.folder import Result, Run, read_recipe
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies.study import Analyses
from bisam.experiments.training.trained import result_of


class AnalysisError(ValueError):
    """Some analyses could not be made; those that could are saved.

    Args:
        message: which and why.
        content: the content of `analysis.json`.
    """

    def __init__(self, message: str, content: dict[str, Any]) -> None:
        super().__init__(message)
        self.content = content


OnProgress = Callable[[str, int, int], None]
"""Called as `(measure, done, total)`, with the numbers of examples of its forward passes."""


def analyse(
    folder: Path,
    what: Sequence[str] = DEFAULT,
    settings: Settings = Settings(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Compute what is not there yet of the analyses of a finished run, and return the content of its `analysis.json`.

    The file is written after each analysis, and after each radius of one: an interruption loses that one alone. An
    analysis is computed again with other settings, and if the run was trained again.

    Args:
        folder: of the run, with recipe.json, result.json and checkpoint.pt.
        what: names of analyses, see `ANALYSES`.
        settings: of the analyses.
        machine: device and folder of the data.
        progress: called after each forward pass of a batch.

    Raises:
        AnalysisError: some analyses cannot be made of this model, these data or settings; the others are saved.
        ValueError: an analysis or the device is unknown, a package is missing, or the data or the model cannot be
            loaded.
        RunError: the folder is no run, or its run is unfinished, has diverged, has no such weights, is damaged or in
            use.
        OSError: the disk is full or read-only.
    """
    names = known(what)
    if settings.weights == FILE:
        raise ValueError(f"weights {FILE!r} are not those of a run: use analyse_weights")
    if not (folder / "recipe.json").is_file():
        raise RunError(f"{folder} is no run folder: it has no recipe.json")
    run = Run(folder, read_recipe(folder))
    result_of(run)  # before the lock file is made
    with run.open():
        result, writer = result_of(run), run.writer()
        settings = settings.of(result)

        def save(entries: Iterable[Entry]) -> None:
            writer.write(ANALYSIS, as_text(entries))

        make = partial(of_run, run, result, settings, machine)
        return _completed(folder, checksum(result), names, settings, make, save, progress)


def analyse_weights(
    path: Path,
    recipe: Recipe,
    folder: Path,
    what: Sequence[str] = DEFAULT,
    settings: Settings = Settings(),  # noqa: B008
    machine: Machine = Machine(),  # noqa: B008
    progress: OnProgress | None = None,
) -> dict[str, Any]:
    """Do what `analyse` does for the weights in a file, and write into another folder.

    Args:
        path: a state dict that torch.save or safetensors wrote.
        recipe: model, data set, and what else decides what the examples and the loss are.
        folder: for `analysis.json`.
        what: names of analyses, see `ANALYSES`.
        settings: of the analyses; `weights` is replaced.
        machine: device and folder of the data.
        progress: see `analyse`.

    Raises:
        AnalysisError: see `analyse`.
        ValueError: see `analyse`; or the weights cannot be read or do not fit.
        RunError: the folder is that of a run, in use, or damaged.
        OSError: the disk is full or read-only.
    """
    names, settings = known(what), replace(settings, weights=FILE)
    if (folder / "recipe.json").exists():
        raise RunError(
            f"{folder} is the folder of a run, which has an analysis of its own weights: give another folder"
        )
    try:
        bytes_of_file = path.read_bytes()
    except OSError as error:
        raise ValueError(f"weights {str(path)!r} cannot be read ({error.strerror}): give a file of weights") from error
    about = {k: v for k, v in recipe.to_dict().items() if k != "weights"}
    of = checksum([blake2b(bytes_of_file, digest_size=16).hexdigest(), about])
    with _locked(folder):

        def save(entries: Iterable[Entry]) -> None:
            write(folder / ANALYSIS, as_text(entries), make_folder=False)

        return _completed(
            folder, of, names, settings, partial(of_file, path, recipe, settings, machine), save, progress
        )


def numbers(found: Mapping[str, Any], what: Iterable[str], settings: Settings) -> dict[str, float]:
    """Return the numbers of analyses in the content of an `analysis.json`, by the titles of their columns.

    Args:
        found: what `analyse` returned.
        what: names of analyses.
        settings: as for `analyse`, with one radius, and with weights by name, as `settings.of(result)` has them.

    Raises:
        KeyError: an analysis with these settings is not there.
    """
    values: dict[str, float] = {}
    for name in known(what):
        own = ANALYSES[name].settings
        (one,) = settings.each(own)
        if (entry := with_settings(found["entries"], name, one.relevant(own))) is None:
            raise KeyError(f"{name} with {one.relevant(own)}")
        values |= ANALYSES[name].numbers(entry["results"])
    return values


def settings_by_name(analyses: Analyses) -> dict[str, Settings]:
    """Return the settings of each analysis of a study, in the order in which they are computed."""
    return {name: Settings(**analyses.settings_of(name)) for name in known(analyses.what)}


def missing(folder: Path, result: Result, wanted: Mapping[str, Settings]) -> list[str]:
    """Return the names of the analyses of a finished run that `analyse` would compute.

    Args:
        folder: of the run.
        result: of the run.
        wanted: names of analyses, with their settings.

    Raises:
        RunError: the file is damaged.
    """
    entries, of, left = read_entries(folder), checksum(result), list[str]()
    for name, settings in wanted.items():
        own = ANALYSES[name].settings
        if any(find(entries, name, one.relevant(own), of) is None for one in settings.of(result).each(own)):
            left.append(name)
    return left


def _completed(
    folder: Path,
    of: str,
    names: Sequence[str],
    settings: Settings,
    make: Callable[[], Subject],
    save: Callable[[Iterable[Entry]], None],
    progress: OnProgress | None,
) -> dict[str, Any]:
    """Compute and write what is missing; the subject is made only if something is."""
    entries, subject, failed = read_entries(folder), None, dict[str, list[str]]()
    for name in names:
        analysis = ANALYSES[name]
        for one in settings.each(analysis.settings):
            relevant = one.relevant(analysis.settings)
            if find(entries, name, relevant, of) is not None:
                continue
            subject = make() if subject is None else subject
            start, results = time.perf_counter(), dict[str, Any]()
            try:
                for key, measure in analysis.measures.items():
                    title = f"{name}: {measure.title}"
                    results[key] = measure.call(subject, one, partial(_report, progress, title)).to_dict()
            except (ValueError, ConvergenceError) as error:
                failed.setdefault(reason(error), []).append(name)
                continue
            seconds = time.perf_counter() - start
            entries = with_entry(entries, new_entry(name, relevant, of, results, seconds, subject.device))
            save(entries)
    if failed:
        said = "; ".join(f"{', '.join(dict.fromkeys(which))}: {why}" for why, which in failed.items())
        raise AnalysisError(said, content(entries))
    return content(entries)


def _report(progress: OnProgress | None, title: str, done: int, total: int) -> None:
    if progress is not None:
        progress(title, done, total)


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """Lock a folder that is not that of a run for this process."""
    make_folders(folder)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise RunError(f"{folder} is in use by another process: let it finish, or give another folder") from None
