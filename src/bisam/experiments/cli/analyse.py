"""`bisam analyse`: measure finished runs, or the weights in a file."""

from __future__ import annotations

import itertools
import os
import signal
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from cyclopts import Parameter
from rich.table import Column, Table
from rich.text import Text

from bisam.experiments.cli.flags import Whole
from bisam.experiments.cli.folders import check_folder
from bisam.experiments.cli.idle import refuse_idle
from bisam.experiments.cli.options import Given, flag
from bisam.experiments.cli.progress import MeasuringDisplay
from bisam.experiments.cli.terminal import console, errors
from bisam.experiments.errors import RunError, is_out_of_memory, reason
from bisam.experiments.runs.archive import is_archive
from bisam.experiments.runs.files import write
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.signals import exit_code, ignore_further, past_tense

if TYPE_CHECKING:
    from bisam.experiments.analyses.file import Entry
    from bisam.experiments.analyses.settings import Settings
    from bisam.experiments.recipes.recipe import Recipe

EXAMPLES = (
    "bisam analyse runs/digits",
    "bisam analyse RUN --what sharpness,flips --rho 0.05,0.1",
    "bisam analyse --weights model.pt --model resnet20 --dataset cifar10 --out analysed",
)

_PLACE = {"data_dir", "download", "loaders"}
_DATA = Machine().data_dir


def analyse(
    *runs: Path,
    what: str | None = None,
    rho: str = "0.05",
    steps: Whole = 20,
    split: str = "train",
    examples: Whole = 2000,
    batch_size: Whole = 128,
    weights: str | None = None,
    seed: Whole = 0,
    model: str | None = None,
    dataset: str | None = None,
    out: Path | None = None,
    device: str = "cpu",
    data_dir: Path = _DATA,
    download: Annotated[bool, Parameter(negative="")] = False,
    loaders: Whole = 0,
    given: Given = frozenset(),
) -> int:
    """Measure how flat the minima of finished runs are, and what adversaries find around them.

    Each run folder gets an `analysis.json`, and figures in `analysis/`. What is there already, with the same settings
    and of the same weights, is kept; the same command resumes an interrupted one after its last analysis.

    Args:
        runs: Folders of finished runs, or folders above several: runs/digits.
        what: Analyses, with commas: sharpness, zero-one, flips, hessian, spectrum, landscape, margins,
            feature-margins, calibration, rank, gradient, corruptions. By default all but spectrum, feature-margins and
            corruptions.
        rho: Radii of the balls, with commas. They are the same for all runs, whatever the runs were trained with.
        steps: Steps of each ascent.
        split: Examples: train (with the label noise of the run, without augmentation), validation or test.
        examples: Largest number of examples, which the seed chooses.
        batch_size: Examples of a batch, which has a step of its own in flips and m-sharpness.
        weights: Weights of the runs: best (of the best validation epoch), last, or ema; by default those whose test
            score reports show. Without RUNS: a file of weights, .pt or .safetensors.
        seed: Seed of the examples and of random directions.
        model: Model of the file of weights, see `bisam list`.
        dataset: Data set on which the weights of the file are analysed.
        out: Folder for what is found of the weights of a file.
        device: Device: cpu, cuda, cuda:1, mps, ... or auto.
        data_dir: Folder of the data sets. The environment variable BISAM_DATA sets the default.
        download: Download data sets that are missing in the data folder.
        loaders: Processes that read and decode image files.
    """
    from bisam.experiments.analyses.catalogue import ANALYSES, DEFAULT, known
    from bisam.experiments.analyses.settings import Settings

    names = known(DEFAULT if what is None else _parts(what))
    settings = Settings(_radii(rho), steps, split, examples, batch_size, seed=seed)
    own = {name for one in names for name in ANALYSES[one].settings}
    if idle := sorted((given & {"rho", "steps"}) - own):
        raise ValueError(f"{', '.join(names)} has no {' and no '.join(idle)}: leave {_flags(idle)} out")
    machine = Machine(device=device, data_dir=data_dir, download=download, loaders=loaders, log=())
    if runs:
        jobs = _of_runs(runs, names, settings if weights is None else _with_weights(settings, weights), machine)
        if idle := sorted(given & {"model", "dataset", "out"}):
            raise ValueError(f"the folder of a run says what it is: leave {_flags(idle)} out")
    else:
        if out is not None:
            check_folder(out, "--out")
        jobs = [_of_file(weights, model, dataset, out, names, settings, machine)]
    recipes = [job.recipe for job in jobs if job.recipe is not None]
    if recipes:
        refuse_idle(recipes, machine, given & _PLACE)
    machine.fabric()  # fails here, before the first run, if the device is missing
    return _all(jobs, names)


@dataclass
class _Job:
    """Weights to analyse.

    Attributes:
        folder: for what is found.
        recipe: data and model; None if it cannot be read, which the job reports.
        settings: of the analyses.
        call: analyses them, with a function that shows progress, and returns the content of `analysis.json`.
        error: why it failed.
        found: the entries with these settings.
    """

    folder: Path
    recipe: Recipe | None
    settings: Settings
    call: Callable[[Callable[[str, int, int], None]], dict[str, Any]]
    error: str = ""
    found: list[Entry] = field(default_factory=list[Any])


def _of_runs(runs: Iterable[Path], names: Sequence[str], settings: Settings, machine: Machine) -> list[_Job]:
    from bisam.experiments.analyses.run import analyse as analyse_run
    from bisam.experiments.runs.folder import Run, read_recipe

    def job(folder: Path) -> _Job:
        recipe, own = None, settings
        with suppress(RunError):  # analyse_run says what is wrong
            recipe = read_recipe(folder)
            if (result := Run(folder, recipe).result) is not None:
                own = settings.of(result)
        return _Job(folder, recipe, own, lambda shown: analyse_run(folder, names, own, machine, shown))

    return [job(folder) for folder in dict.fromkeys(folder for path in runs for folder in found_under(path))]


def found_under(path: Path) -> list[Path]:
    """The folders of runs at a path or below it, in order.

    Raises:
        ValueError: there is none.
    """
    if (path / "recipe.json").exists():
        return [path]
    if path.is_dir():
        if found := sorted(file.parent for file in path.rglob("recipe.json")):
            return found
        raise ValueError(f"{path} has no run folder, which has a recipe.json: give runs/STUDY, or a folder below it")
    if is_archive(path):
        raise ValueError(f"{path} is an archive of finished runs, without their weights: there is nothing to measure")
    if path.exists():
        raise ValueError(f"{path} is a file: give the folder of a run; for a file of weights write --weights {path}")
    there = Path("runs") / path
    raise ValueError(
        f"{path} does not exist" + (f": did you mean {there}?" if there.exists() else ": give a run folder")
    )


def _with_weights(settings: Settings, weights: str) -> Settings:
    from bisam.experiments.analyses.settings import WEIGHTS
    from bisam.experiments.errors import unknown

    if weights in WEIGHTS:
        return replace(settings, weights=weights)
    if Path(weights).exists():
        raise ValueError(f"--weights {weights} is a file: give it without run folders, with --model and --dataset")
    raise unknown("weights of a run", weights, WEIGHTS)


def _of_file(
    weights: str | None,
    model: str | None,
    dataset: str | None,
    out: Path | None,
    names: Sequence[str],
    settings: Settings,
    machine: Machine,
) -> _Job:
    from bisam.experiments.analyses.run import analyse_weights
    from bisam.experiments.analyses.settings import FILE
    from bisam.experiments.recipes.recipe import Recipe

    if weights is None:
        raise ValueError("nothing to analyse: give run folders, such as runs/digits, or a file with --weights")
    missing = [name for name, value in (("model", model), ("dataset", dataset), ("out", out)) if value is None]
    if missing:
        raise ValueError(f"--weights {weights} is a file of weights: give {_flags(missing)} too")
    recipe, folder = Recipe(dataset=cast(str, dataset), model=cast(str, model)), cast(Path, out)
    return _Job(
        folder,
        recipe,
        replace(settings, weights=FILE),
        lambda shown: analyse_weights(Path(weights), recipe, folder, names, settings, machine, shown),
    )


def _all(jobs: Sequence[_Job], names: Sequence[str]) -> int:
    with MeasuringDisplay(len(jobs)) as display, _noticed() as pressed:
        try:
            for job in jobs:
                display.run()
                _one(job, names, display, pressed)
        except KeyboardInterrupt as error:
            ignore_further()
            display.stop()
            errors.print(f"{past_tense(error)}: finished analyses are saved; the same command resumes after them")
            return exit_code(error)
    done = [job for job in jobs if job.found]
    if done:
        _show(done)
    failed = sorted((job for job in jobs if job.error), key=lambda job: job.error)
    for error, same in itertools.groupby(failed, key=lambda job: job.error):
        first, *others = same
        place = "" if str(first.folder) in error else f"{first.folder}{f' and {len(others)} more' if others else ''}: "
        errors.print(f"bisam: {place}{error}")
    return 0 if not failed else 1 if done else 2


@contextmanager
def _noticed() -> Generator[Callable[[], bool]]:
    """A context with a function that tells whether Ctrl-C was pressed in it.

    Torch turns the exception into another one where its C++ code calls Python, as in products with the Hessian.
    """
    count = 0

    def interrupt(*_: Any) -> None:
        nonlocal count
        count += 1
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield lambda: count > 0
    finally:
        signal.signal(signal.SIGINT, before)


def _one(job: _Job, names: Sequence[str], display: MeasuringDisplay, pressed: Callable[[], bool]) -> None:
    def show(title: str, done: int, total: int) -> None:
        if pressed():
            raise KeyboardInterrupt
        display.measure(title, done, total)

    try:
        _measure(job, names, show)
    except Exception:
        if pressed():
            raise KeyboardInterrupt from None
        raise
    if pressed():
        raise KeyboardInterrupt


def _measure(job: _Job, names: Sequence[str], show: Callable[[str, int, int], None]) -> None:
    from bisam.experiments.analyses.run import AnalysisError

    try:
        content = job.call(show)
    except AnalysisError as error:
        job.error, content = " ".join(str(error).split()), error.content
    except (RunError, ValueError) as error:
        job.error = " ".join(str(error).split())
        return
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        job.error = f"out of memory: fewer --examples and a smaller --batch-size need less ({reason(error)})"
        return
    job.found = _wanted(content["entries"], names, job.settings)
    if not job.found:
        return
    files = ["analysis.json", *_drawn(job.folder, job.found)]
    console.print(f"{job.folder}/: {', '.join(files)}", soft_wrap=True, highlight=False)


def _wanted(entries: Iterable[Entry], names: Sequence[str], settings: Settings) -> list[Entry]:
    from bisam.experiments.analyses.catalogue import ANALYSES

    wanted = [(n, s.relevant(ANALYSES[n].settings)) for n in names for s in settings.each(ANALYSES[n].settings)]
    return [entry for entry in entries if (entry["analysis"], entry["settings"]) in wanted]


def _drawn(folder: Path, entries: Iterable[Entry]) -> list[str]:
    """Draw the figures that are missing or older than their entries; return the names of all figures of the entries."""
    from bisam.experiments.analyses.catalogue import ANALYSES
    from bisam.experiments.analyses.file import seconds_of, stem
    from bisam.experiments.reports.drawing import rendered

    names: list[str] = []
    for entry in entries:
        analysis = ANALYSES[entry["analysis"]]
        if analysis.draw is None:
            continue
        file = folder / "analysis" / f"{stem(entry)}.png"
        if not file.is_file() or file.stat().st_mtime < seconds_of(entry):
            write(file, rendered(analysis.draw(analysis.restored(entry["results"])), dpi=300))
        names.append(f"analysis/{file.name}")
    return names


def _show(jobs: Sequence[_Job]) -> None:
    """Print a table: of one run all numbers, below one another; of several the main ones, with a row for each run."""
    from bisam.experiments.reports.analyses import cell, sheets, written

    top = Path(os.path.commonpath([job.folder for job in jobs]))
    for sheet in sheets({job.folder: job.found for job in jobs}):
        heads = sheet.heads
        if not heads:
            continue
        if len(jobs) == 1:
            table = Table(
                "measure", Column("value", justify="right"), title="Analysis", caption=sheet.said, min_width=60
            )
            for head in heads:
                table.add_row(Text(written(head)), cell([head.value(sheet.entries[top])], head.column.percent, 1))
            console.print(table)
            continue
        if console.width < 40 + 12 * len(heads):
            heads = tuple(head for head in heads if head.column.brief) or heads[:4]
        columns = (Column("run", overflow="fold"), *(Column(written(head), justify="right") for head in heads))
        table = Table(*columns, title=f"Analysis of {top}", caption=sheet.said)
        for folder, entries in sheet.entries.items():
            numbers = [cell([head.value(entries)], head.column.percent, 1) for head in heads]
            table.add_row(Text(str(folder.relative_to(top))), *numbers)
        console.print(table)


def _parts(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _radii(text: str) -> tuple[float, ...]:
    values: list[float] = []
    for part in _parts(text):
        try:
            values.append(float(part))
        except ValueError:
            raise ValueError(f"--rho {text}: {part!r} is not a number; write radii as in --rho 0.05,0.1") from None
    return tuple(values)


def _flags(names: Iterable[str]) -> str:
    return ", ".join(map(flag, names))
