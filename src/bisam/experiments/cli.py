"""The command line: `bisam run`, `train`, `list`, `methods`, `report`."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from bisam import __version__
from bisam.experiments.machine import Machine
from bisam.experiments.names import unknown
from bisam.experiments.recipes import Recipe, Whole
from bisam.experiments.runs import Finished, Run, RunError, finished, to_csv, write

console = Console()
errors = Console(stderr=True, soft_wrap=True, highlight=False, markup=False)

app = App(
    name="bisam",
    version=__version__,
    help="Sharpness-aware training: run the studies, train one recipe, report from run folders.",
    help_epilogue="Start with:  bisam run digits",
)

Out = Annotated[Path, Parameter(help="Folder that the run folders are in.")]


@app.command(help_epilogue="Examples:  bisam run digits   |   bisam run digits --seeds 2 --epochs 5 --workers 1")
def run(
    study: str,
    *,
    seeds: Whole | None = None,
    epochs: Whole | None = None,
    workers: Whole | None = None,
    machine: Annotated[Machine, Parameter(name="*")] = Machine(),  # noqa: B008
    out: Out = Path("runs"),
) -> int:
    """Run a study: what is finished is kept, what was interrupted goes on from its last epoch.

    Args:
        study: Name of the study, see `bisam list`.
        seeds: Seeds per recipe; by default the study's own number.
        epochs: Epochs per run (SGD gets twice as many); by default the study's own number.
        workers: Processes; by default one per core.
    """
    from bisam.experiments.processes import run_all
    from bisam.experiments.studies import expand

    for name, value in (("seeds", seeds), ("epochs", epochs), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    chosen = _study(study)
    recipes = expand(chosen.recipes(epochs), seeds or chosen.seeds, chosen.first_seed)
    machine.fabric()  # says so now if the device is not here
    root = out / chosen.name
    with _Display(sum(recipe.epochs for recipe in recipes), len(recipes)) as display:
        try:
            outcomes = run_all(recipes, root, workers or os.cpu_count() or 1, machine, display)
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
            display.stop()
            errors.print(
                f"interrupted: {display.finished} of {len(recipes)} runs are finished; the same command goes on"
            )
            return 130
    if any(outcome.result for outcome in outcomes):
        wanted = {replace(recipe, seed=0) for recipe in recipes}
        _report(chosen, [run for run in _finished(root) if _without_seed(run) in wanted], root)
    failed = [outcome for outcome in outcomes if outcome.error]
    for outcome in failed:
        errors.print(f"bisam: {outcome.recipe.slug}, seed {outcome.recipe.seed} failed: {outcome.error}")
    return 1 if failed else 0


@app.command(
    help_epilogue="Examples:  bisam train --method sam --noise 0.4 --rho 0.4   |   "
    "bisam train --optim bisam_log --rho 0.05 --epochs 20 --learning_rate 0.1"
)
def train(
    *,
    recipe: Annotated[Recipe, Parameter(name="*")] = Recipe(),  # noqa: B008
    machine: Annotated[Machine, Parameter(name="*")] = Machine(),  # noqa: B008
    out: Out = Path("runs"),
) -> int:
    """Train one recipe; the flags are its fields, in the BiSAM authors' spelling too (--optim, --learning_rate)."""
    from bisam.experiments.train import train as train_run

    one = Run.under(out / "train", recipe)
    with _Display(recipe.epochs, 1) as display:
        try:
            result = train_run(one, machine, lambda row: display.epoch(recipe, int(row["epoch"]), row["validation"]))
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
            display.stop()
            errors.print(f"interrupted: {one.folder} is saved; the same command goes on from its last epoch")
            return 130
        display.done(recipe, None)
    console.print(
        f"test accuracy {100 * result['test_best']:.1f} % at the best validation epoch "
        f"({result['best_epoch']:g}), {100 * result['test_last']:.1f} % at the last; {one.folder}",
        soft_wrap=True,
    )
    return 0


@app.command(name="list", help_epilogue="Example:  bisam list")
def list_studies() -> int:
    """List the studies, and the methods, data sets and models that `bisam train` takes."""
    from bisam.experiments.catalogue import METHODS
    from bisam.experiments.studies import STUDIES

    table = Table("study", "what", "runs", "methods", box=None, pad_edge=False, header_style="bold")
    for study in STUDIES.values():
        recipes = study.recipes(None)
        methods = list(dict.fromkeys(recipe.method for recipe in recipes))
        shown = ", ".join(methods) if len(methods) < 10 else f"{len(methods)}, see bisam methods"
        table.add_row(study.name, study.title, f"{len(recipes)} x {study.seeds} seeds", shown)
    console.print(table)
    console.print(
        f"\nbisam train --method NAME --dataset digits --model convnet, with NAME one of {', '.join(METHODS)}"
    )
    return 0


@app.command(help_epilogue="Examples:  bisam methods   |   bisam methods --to docs/methods.md")
def methods(*, to: Path | None = None) -> int:
    """List the methods: how each is written, what it costs, what to set its radius to.

    Args:
        to: Markdown file to write, with the references, in place of the table on the terminal.
    """
    from bisam.experiments import catalogue

    if to is not None:
        write(to, catalogue.markdown())
        console.print(f"{to}", soft_wrap=True)
        return 0
    wide = console.width >= 130  # else source, state and radius are below the expression
    table = Table(box=None, pad_edge=False, header_style="bold", caption=catalogue.CAPTION, caption_justify="left")
    table.add_column("--method", no_wrap=True)
    table.add_column("expression", overflow="fold", min_width=30)
    for header in ("gradients", "memory", *(("state", "source", "set rho to") if wide else ())):
        table.add_column(header, overflow="fold")
    for key, entry in {**catalogue.METHODS, **catalogue.GAMES}.items():
        more = (entry.state or "–", entry.reference or "–", entry.advice or "–")
        expression = Text(entry.written())
        if not wide:
            labels = ("remembers {}", "{}", "rho: {}")
            below = [label.format(text) for label, text in zip(labels, more, strict=True) if text != "–"]
            expression.append(f"\n{'; '.join(below)}" if below else "", style="dim")
        table.add_row(key, expression, entry.cost, f"{entry.memory:g}", *(more if wide else ()))
    console.print(table)
    return 0


@app.command(help_epilogue="Examples:  bisam report digits   |   bisam report digits --to docs/digits")
def report(study: str, *, out: Out = Path("runs"), to: Path | None = None) -> int:
    """Write report.md, report.csv and the figures from the run folders of a study, and print the table.

    Args:
        study: Name of the study, see `bisam list`.
        to: Folder to write to; by default that of the study's runs.
    """
    chosen = _study(study)
    runs, standard = _finished(out / chosen.name), set(chosen.recipes(None))
    # Shorter trials may lie beside the study; they are reported where there is nothing else.
    runs = [run for run in runs if _without_seed(run) in standard] or runs
    _report(chosen, runs, to or out / chosen.name)
    return 0


def _finished(root: Path) -> list[Finished]:
    """The finished runs in `root`; of damaged ones it says what is wrong."""
    runs: list[Finished] = []
    for run in finished(root):
        if isinstance(run, RunError):
            errors.print(f"bisam: left out: {run}")
        else:
            runs.append(run)
    return runs


def _without_seed(run: Finished) -> Recipe:
    return replace(run.recipe, seed=0)


def _report(study: Any, runs: list[Finished], to: Path) -> None:
    """Table on the terminal, report.md, report.csv and figures in `to`."""
    from bisam.experiments import figures, report as tables

    if not runs:
        raise ValueError(
            f"no finished run of {study.name} there: run `bisam run {study.name}` first, or give its --out"
        )
    table = Table(*(Column(name, no_wrap=True) for name in tables.HEADER), title=study.title, caption=tables.CAPTION)
    rows = tables.summary(runs)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        table.add_row(*tables.cells(row), end_section=following is not None and following["noise"] != row["noise"])
    console.print(table)
    drawings = {f"{name}.png": name for name in study.figures if name != "flips" or tables.perturbed(runs)}
    pictures = {file: figures.WHAT[name] for file, name in drawings.items()}
    write(to / "report.md", tables.markdown(study.title, runs, pictures, study.note))
    write(to / "report.csv", to_csv(rows))
    for file, name in drawings.items():
        figures.save(getattr(figures, name)(runs), to / file)
    console.print(f"{to}/: {', '.join(['report.md', 'report.csv', *drawings])}", soft_wrap=True)


def _study(name: str) -> Any:
    from bisam.experiments.studies import STUDIES

    if name not in STUDIES:
        raise unknown("study", name, STUDIES)
    return STUDIES[name]


class _Display:
    """A bar over all epochs with the last news, or a line per run where the output is no terminal."""

    def __init__(self, epochs: int, runs: int) -> None:
        self.finished = 0
        self._runs = runs
        self._epochs: dict[Recipe, int] = {}
        self._bar = Progress(
            TextColumn("{task.fields[runs]}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("epochs"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[news]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=epochs, runs=self._count(), news="")

    def __enter__(self) -> _Display:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def epoch(self, recipe: Recipe, epoch: int, validation: float) -> None:
        """An epoch of a run is over."""
        news = f"{recipe.method} noise {recipe.noise:g} seed {recipe.seed}: {100 * validation:.1f} % valid."
        self._advance(recipe, epoch, news)

    def done(self, recipe: Recipe, error: str | None) -> None:
        """A run is over, or failed."""
        self.finished += error is None
        self._advance(recipe, recipe.epochs, None)
        if not console.is_terminal:
            state = "done" if error is None else "failed"
            console.print(f"{self._count()}: {recipe.slug} seed {recipe.seed} {state}", soft_wrap=True, highlight=False)

    def _advance(self, recipe: Recipe, epoch: int, news: str | None) -> None:
        step = max(0, epoch - self._epochs.get(recipe, 0))
        self._epochs[recipe] = max(epoch, self._epochs.get(recipe, 0))
        fields: dict[str, Any] = {} if news is None else {"news": news}
        self._bar.update(self._task, advance=step, runs=self._count(), **fields)

    def _count(self) -> str:
        return f"{self.finished}/{self._runs} runs"


def main() -> None:
    """Entry point: a user's mistake is one line and exit code 2."""
    try:
        code = app(sys.argv[1:], exit_on_error=False, print_error=False, result_action="return_value")
    except (CycloptsError, RunError, ValueError) as error:
        errors.print(f"bisam: {' '.join(str(error).split())}")
        sys.exit(2)
    except OSError as error:
        place = error.filename or "the output folder"
        errors.print(
            f"bisam: cannot write {place}: {error.strerror or error}. Free space or give another --out; "
            "finished runs are as they were"
        )
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("interrupted")
        sys.exit(130)
    sys.exit(code if isinstance(code, int) else 0)
