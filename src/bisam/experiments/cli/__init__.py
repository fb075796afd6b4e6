"""The command line: `bisam run`, `train`, `list`, `methods`, `report`, `plot`."""

from __future__ import annotations

import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from rich.table import Table
from rich.text import Text

from bisam import __version__
from bisam.experiments.cli.flags import RecipeFlags, Whole
from bisam.experiments.cli.progress import Display, console, duration, errors
from bisam.experiments.cli.shown import (
    all_finished,
    runs_of,
    show,
    show_failed,
    show_figure1,
    show_measured,
    without_seed,
)
from bisam.experiments.errors import RunError, unknown
from bisam.experiments.recipes.changes import pairs
from bisam.experiments.recipes.presets import started
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, write
from bisam.experiments.runs.machine import Machine, threads

if TYPE_CHECKING:
    from bisam.experiments.studies.study import Study

app = App(
    name="bisam",
    version=__version__,
    help="Sharpness-aware training: run the studies, train one recipe, report from run folders.",
    help_epilogue="Start with:  bisam run digits",
)

Out = Annotated[Path, Parameter(help="Folder that the run folders are in.")]
Changes = Annotated[
    tuple[str, ...], Parameter(name="--set", negative="", help="Change a field of all recipes: --set epochs=1.")
]
MachineFlags = Annotated[Machine, Parameter(name="*")]


@app.command(
    help_epilogue="Examples:  bisam run digits   |   bisam run digits --seeds 2 --epochs 5 --workers 1   |   "
    "bisam run table1 --data-dir data --dry-run   |   bisam run table1 --set epochs=1 --set limit=640"
)
def run(
    study: str,
    *,
    changes: Changes = (),
    seeds: Whole | None = None,
    epochs: Whole | None = None,
    workers: Whole | None = None,
    ray: str | None = None,
    gpus: float = 0,
    cpus: Whole = 1,
    retries: Whole = 3,
    dry_run: Annotated[bool, Parameter(negative="")] = False,
    machine: MachineFlags = Machine(),  # noqa: B008
    out: Out = Path("runs"),
) -> int:
    """Run a study: what is finished is kept, what was interrupted goes on from its last epoch.

    Args:
        study: Name of the study, see `bisam list`.
        changes: Changed fields of its recipes; other values are other runs, beside the study's own.
        seeds: Seeds per recipe; by default the study's own number.
        epochs: Epochs per run (where SGD gets twice as many, of the others); by default the study's own number.
        workers: Runs at a time, each in a process; by default one per core, or per GPU with --device cuda.
        ray: Run on a Ray cluster instead: local, auto or its address.
        gpus: GPUs of each run on the cluster; 0.25 puts four on one.
        cpus: CPUs of each run on the cluster.
        retries: How often a run on the cluster may be lost with its machine before it is given up.
        dry_run: Show what would run and how long it may take, from a few steps that are measured, and run nothing.
    """
    from bisam.experiments.measurements import MEASUREMENTS

    for name, value in (("seeds", seeds), ("epochs", epochs), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1, got {value}")
    if study in MEASUREMENTS or study == "figure1":
        flags: dict[str, Any] = {"--seeds": seeds, "--epochs": epochs, "--workers": workers, "--ray": ray}
        if study == "figure1":
            flags["--set"] = changes or None
        _refuse(f"{study} trains nothing", flags)
        return show_figure1(out / study) if study == "figure1" else _measure(study, changes, machine, out, dry_run)
    if ray is None:
        default = {"--gpus": gpus or None, "--cpus": cpus if cpus != 1 else None}
        _refuse("without --ray there is no cluster", {**default, "--retries": retries if retries != 3 else None})
    from bisam.experiments.studies.study import expand
    from bisam.experiments.training import loggers

    chosen = _study(study)
    recipes = expand(chosen.changed(epochs, changes), seeds or chosen.seeds, chosen.first_seed)
    for recipe in recipes:
        recipe.check_trainable()
    loggers.check(machine.log)
    if ray is None:
        if machine.nodes > 1:
            raise ValueError(
                f"--nodes {machine.nodes}: a study's runs are on one machine each; on many machines use --ray"
            )
        machine.fabric()  # says so now if the device is not here
    root = out / chosen.folder
    count = workers or machine.slots
    if dry_run:
        return _plan(chosen, recipes, root, machine, count)
    with Display(sum(recipe.epochs for recipe in recipes), len(recipes)) as display:
        try:
            if ray is None:
                from bisam.experiments.launch.processes import run_all

                outcomes = run_all(recipes, root, count, machine, display)
            else:
                from bisam.experiments.launch.ray import run_all as run_on_ray

                outcomes = run_on_ray(
                    recipes, root, machine, display, address=ray, gpus=gpus, cpus=cpus, retries=retries
                )
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
            display.stop()
            errors.print(
                f"interrupted: {display.finished} of {len(recipes)} runs are finished; the same command goes on"
            )
            return 130
    if any(outcome.result for outcome in outcomes):
        wanted = {replace(recipe, seed=0) for recipe in recipes}
        show(chosen, [run for run in all_finished(root) if without_seed(run) in wanted], out / chosen.name)
    return show_failed(outcomes)


def _refuse(why: str, flags: dict[str, Any]) -> None:
    """Say that flags which were given (are not None) have no effect."""
    given = [flag for flag, value in flags.items() if value is not None]
    if given:
        raise ValueError(f"{why}: leave {', '.join(given)} out")


def _plan(chosen: Study, recipes: list[Recipe], root: Path, machine: Machine, workers: int) -> int:
    """What `run` would do."""
    from bisam.experiments.launch.estimate import estimate
    from bisam.experiments.reports.groups import title

    threads(min(workers, len(recipes)))  # as in the processes that would run
    left = [recipe for recipe in recipes if not (Run.under(root, recipe).folder / "result.json").exists()]
    table = Table("dataset", "model", "method", "noise", "epochs", "gradients", "runs left", "time", box=None)
    total, problems = 0.0, dict[str, None]()
    for recipe in dict.fromkeys(replace(recipe, seed=0) for recipe in recipes):
        with console.status(f"a few steps of {recipe.model} on {recipe.dataset}"):
            cost = estimate(recipe, machine)
        runs = sum(replace(other, seed=0) == recipe for other in left)
        total += runs * (cost.seconds or 0.0)
        if cost.problem:
            problems[cost.problem] = None
        table.add_row(
            recipe.dataset,
            recipe.model,
            title(recipe),
            f"{100 * recipe.noise:g} %",
            f"{recipe.epochs}",
            f"{cost.gradients:.3g}",
            f"{runs} of {sum(replace(other, seed=0) == recipe for other in recipes)}",
            "?" if cost.seconds is None else duration(runs * cost.seconds),
        )
    console.print(table)
    for problem in problems:
        errors.print(f"bisam: no estimate: {problem}")
    shown = "?" if problems else duration(total / min(workers, max(1, len(left))))
    console.print(f"{len(left)} of {len(recipes)} runs of {chosen.name} are left, about {shown} in {workers} processes")
    return 0


@app.command(
    help_epilogue="Examples:  bisam train --method sam --noise 0.4 --rho 0.4   |   "
    "bisam train --optim bisam_log --rho 0.05 --epochs 20 --learning_rate 0.1"
)
def train(
    *,
    flags: Annotated[RecipeFlags, Parameter(name="*")] = RecipeFlags(),  # noqa: B008
    preset: str | None = None,
    machine: MachineFlags = Machine(),  # noqa: B008
    out: Out = Path("runs"),
) -> int:
    """Train one recipe; the flags are its fields, in the BiSAM authors' spelling too (--optim, --learning_rate).

    Args:
        preset: Settings to start from: paper, authors, imagenet, vit or bert; other flags change them.
    """
    import torch

    from bisam.experiments.training import loggers
    from bisam.experiments.training.metrics import TITLES
    from bisam.experiments.training.train import train as train_run

    recipe = started(preset, flags.given)
    recipe.check_trainable()
    loggers.check(machine.log)
    one = Run.under(out / "train", recipe)
    with Display(recipe.epochs, 1) as display:
        try:
            result = train_run(one, machine, lambda row: display.epoch(recipe, int(row["epoch"]), row["validation"]))
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # one is enough
            display.stop()
            errors.print(f"interrupted: {one.folder} is saved; the same command goes on from its last epoch")
            return 130
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise RunError(f"out of memory: a smaller --batch-size needs less ({str(error)[:200]})") from error
        display.done(recipe, None)
    console.print(
        f"test {TITLES[result['metric']]} {100 * result['test_best']:.1f} % at the best validation epoch "
        f"({result['best_epoch']:g}), {100 * result['test_last']:.1f} % at the last; {one.folder}",
        soft_wrap=True,
    )
    return 0


@app.command(name="list", help_epilogue="Example:  bisam list")
def list_studies() -> int:
    """List the studies, and the methods, data sets and models that `bisam train` takes."""
    from bisam.experiments import data
    from bisam.experiments.measurements import MEASUREMENTS
    from bisam.experiments.models.build import NAMES as MODELS
    from bisam.experiments.recipes.catalogue import METHODS
    from bisam.experiments.reports.groups import title
    from bisam.experiments.studies import STUDIES

    table = Table("study", "what", "runs", "methods", box=None, pad_edge=False, header_style="bold")
    for study in STUDIES.values():
        recipes = study.recipes(None)
        methods = list(dict.fromkeys(title(recipe) for recipe in recipes))
        shown = ", ".join(methods) if len(methods) < 6 else f"{len(methods)} methods"
        table.add_row(study.name, study.title, f"{len(recipes)} x {study.seeds} seeds", shown)
    table.add_row("figure1", "Figure 1: the bounds of the 0-1 loss", "a drawing", "")
    for measurement in MEASUREMENTS.values():
        table.add_row(measurement.name, measurement.title, "a measurement", "")
    console.print(table)
    for what, names in (("dataset", data.NAMES), ("model", MODELS)):
        table = Table(f"--{what}", "what", box=None, pad_edge=False, header_style="bold")
        for name, text in names.items():
            table.add_row(name, text)
        console.print("", table)
    console.print(f"\nbisam train --method NAME, with NAME one of {', '.join(METHODS)}, or an expression of them")
    return 0


@app.command(help_epilogue="Examples:  bisam methods   |   bisam methods --to docs/methods.md")
def methods(*, to: Path | None = None) -> int:
    """List the methods: how each is written, what it costs, what to set its radius to.

    Args:
        to: Markdown file to write, with the references, in place of the table on the terminal.
    """
    from bisam.experiments.recipes import catalogue, entries

    if to is not None:
        write(to, entries.page(catalogue.METHODS, catalogue.GAMES))
        console.print(f"{to}", soft_wrap=True)
        return 0
    wide = console.width >= 130  # else source, state and radius are below the expression
    table = Table(box=None, pad_edge=False, header_style="bold", caption=entries.CAPTION, caption_justify="left")
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


@app.command(
    help_epilogue="Examples:  bisam report digits   |   bisam report digits --to reports   |   "
    "bisam report table1 --set epochs=1"
)
def report(study: str, *, changes: Changes = (), out: Out = Path("runs"), to: Path | None = None) -> int:
    """Write report.md, report.csv, report.html and the figures from the run folders of a study, and print the table.

    Args:
        study: Name of the study, see `bisam list`.
        changes: As they were given to `bisam run`.
        to: Folder to write to; by default that of the study's runs.
    """
    from bisam.experiments.measurements import MEASUREMENTS

    if study in MEASUREMENTS:
        return show_measured(study, out, to or out / study, changes)
    if study == "figure1":
        return show_figure1(to or out / study)
    chosen = _study(study)
    show(chosen, runs_of(chosen, changes, out), to or out / chosen.name)
    return 0


@app.command(
    help_epilogue="Examples:  bisam plot figure1   |   bisam plot figure2 --to figure2.pdf   |   "
    "bisam plot flips digits --to flips.svg"
)
def plot(
    figure: str, study: str | None = None, *, changes: Changes = (), out: Out = Path("runs"), to: Path | None = None
) -> int:
    """Draw one figure, from run folders: PNG, PDF or SVG.

    Args:
        figure: figure1, a study (its first figure), or the name of a figure: accuracy, curves, flips, gradients, ...
        study: Whose runs the figure shows.
        changes: As they were given to `bisam run`.
        to: File to write; its ending says the format. By default FIGURE.png.
    """
    from bisam.experiments.measurements import MEASUREMENTS, report as measured
    from bisam.experiments.reports import figures
    from bisam.experiments.reports.drawing import save
    from bisam.experiments.studies import STUDIES

    file = to or Path(f"{figure}.png")
    if figure in MEASUREMENTS:
        drawings = measured(MEASUREMENTS[figure], out, pairs(changes, "rounds=5")).figures
        if not drawings:
            raise ValueError(f"{figure} has no figure: bisam report {figure} shows its table")
        drawing = next(iter(drawings.values()))
    elif figure in figures.RUNLESS:
        drawing = figures.draw(figure)
    elif figure in STUDIES and study is None:
        chosen = _study(figure)
        drawing = figures.draw(chosen.figures[0], runs_of(chosen, changes, out))
    elif figure in figures.WHAT:
        if study is None:
            raise ValueError(f"{figure} is of which runs? Name the study too: bisam plot {figure} digits")
        drawing = figures.draw(figure, runs_of(_study(study), changes, out))
    else:
        raise unknown("figure", figure, [*figures.WHAT, *STUDIES, *MEASUREMENTS])
    save(drawing, file)
    console.print(f"{file}", soft_wrap=True)
    return 0


def _measure(name: str, changes: tuple[str, ...], machine: Machine, out: Path, dry_run: bool) -> int:
    """Run a measurement, and report it."""
    from bisam.experiments.measurements import MEASUREMENTS, run as measure

    chosen = MEASUREMENTS[name]
    changed = pairs(changes, "rounds=5")
    if dry_run:
        parts = chosen.parts({**chosen.settings, **chosen.changed(changed)})
        console.print(f"{name} has {len(parts)} parts: {', '.join(parts)}")
        return 0
    with console.status("") as status:

        def tell(part: str, done: int, total: int) -> None:
            status.update(f"{name}: {part} ({done} of {total} parts are measured)")
            if part and not console.is_terminal:
                console.print(f"{done}/{total} parts: {part}", soft_wrap=True)

        try:
            folder = measure(chosen, changed, out, machine, tell)
        except KeyboardInterrupt:
            errors.print("interrupted: what is measured is kept; the same command goes on")
            return 130
    return show_measured(name, folder, folder)


def _study(name: str) -> Study:
    from bisam.experiments.measurements import MEASUREMENTS
    from bisam.experiments.studies import STUDIES

    if name not in STUDIES:
        raise unknown("study", name, [*STUDIES, *MEASUREMENTS, "figure1"])
    return STUDIES[name]


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
