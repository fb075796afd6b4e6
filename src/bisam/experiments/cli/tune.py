"""`bisam tune`: search for the settings of a recipe by validation score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Group, Parameter
from rich.table import Table
from rich.text import Text

from bisam.experiments.cli.flags import RecipeFlags, Whole
from bisam.experiments.cli.folders import check_data_dir, check_out
from bisam.experiments.cli.groups import LAUNCH, OUTPUT, RECIPE
from bisam.experiments.cli.idle import refuse_idle
from bisam.experiments.cli.options import Given, MachineFlags, Quiet, Verbose, flag, refuse_contradiction
from bisam.experiments.cli.progress import TrialsDisplay
from bisam.experiments.cli.terminal import console, errors
from bisam.experiments.cli.train import base_recipe
from bisam.experiments.runs.durations import seconds
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.signals import exit_code, ignore_further, past_tense

if TYPE_CHECKING:
    from bisam.experiments.recipes.recipe import Recipe
    from bisam.experiments.tuning.search import Search
    from bisam.experiments.tuning.trials import Trial

SEARCH = Group("Search", sort_key=0)
EXAMPLES = (
    "bisam tune --method bisam_log --noise 0.4 --trials 20",
    "bisam tune --method sam --search rho=0.01:1:log --search learning_rate=0.01:0.5:log --trials 50 --workers 2",
    "bisam tune --method sgd --sampler grid",
    'bisam tune --method "KSAM(32, SAM(L2({r})))" --search r=0.01:1:log --timeout 1h',
)


def tune(
    *,
    flags: Annotated[RecipeFlags, Parameter(name="*")] = RecipeFlags(),  # noqa: B008
    preset: Annotated[str | None, Parameter(group=RECIPE)] = None,
    config: Annotated[Path | None, Parameter(group=RECIPE)] = None,
    search: Annotated[tuple[str, ...], Parameter(negative="", group=SEARCH, show_default=False)] = (),
    trials: Annotated[Whole, Parameter(group=SEARCH)] = 50,
    seeds_per_trial: Annotated[Whole, Parameter(group=SEARCH)] = 1,
    sampler: Annotated[str, Parameter(group=SEARCH)] = "tpe",
    pruner: Annotated[str, Parameter(group=SEARCH)] = "median",
    timeout: Annotated[str | None, Parameter(group=LAUNCH)] = None,
    workers: Annotated[Whole | None, Parameter(group=LAUNCH)] = None,
    machine: MachineFlags = Machine(),  # noqa: B008
    out: Annotated[Path | None, Parameter(group=OUTPUT)] = None,
    quiet: Quiet = False,
    verbose: Verbose = False,
    given: Given = frozenset(),
) -> int:
    """Search for settings by validation score, and write the best recipe; test examples are never used.

    Each trial is a run (or several, of different seeds) that is trained and not tested. An interrupted search resumes
    with the same command.

    Args:
        preset: Settings to start from: paper, authors, imagenet, vit or bert; other flags change them.
        config: A recipe in a file to start from, TOML or JSON; other flags change it.
        search: What is searched, NAME=LOW:HIGH:log, NAME=LOW:HIGH, NAME=LOW:HIGH:STEP or NAME=VALUE,VALUE. NAME is a
            field of the recipe, or stands in braces in the expression of --method. By default rho from a tenth of the
            method's default to 20 times, or the weight decay of methods without rho.
        trials: Number of trials, those of earlier commands in this folder included.
        seeds_per_trial: Runs of a trial, each with another seed, from --seed on; their mean is the score.
        timeout: Time after which no further trial begins, in seconds or as in 1h30m. Those in progress are finished.
        workers: Trials at a time, each in a process; by default one per core, or per GPU with --device cuda.
        sampler: How values are chosen: tpe (by what was good before), random, or grid (all combinations).
        pruner: Which trials are stopped early: median (those below the median of the others after the same epoch), or
            none.
        out: Folder of the search; by default one in runs/tune with the name of the recipe.
    """
    from bisam.experiments.tuning.database import check_installed, opened
    from bisam.experiments.tuning.launch import run_trials
    from bisam.experiments.tuning.search import DATABASE, claimed
    from bisam.experiments.tuning.space import describe

    refuse_contradiction(quiet, verbose)
    for name, value in (("trials", trials), ("seeds_per_trial", seeds_per_trial), ("workers", workers)):
        if value is not None and value < 1:
            raise ValueError(f"{flag(name)} must be at least 1, got {value}")
    limit = None if timeout is None else _seconds(timeout)
    if machine.max_time is not None:
        raise ValueError("--max-time is for runs: --timeout is the time after which a search begins no further trial")
    if machine.parallel:
        name = "devices" if machine.devices > 1 else "nodes"
        raise ValueError(f"--{name} {getattr(machine, name)}: a trial uses one device; --workers is how many at a time")
    check_installed()
    started = described(flags, preset, config, search, sampler, pruner, seeds_per_trial)
    refuse_idle([started.base], machine, given, searched=frozenset(started.space))
    folder = out or Path("runs", "tune", started.base.slug)
    check_out(folder)
    most = min(trials, len(started.grid)) if sampler == "grid" else trials
    if not (folder / DATABASE).exists():
        _check(started.base, machine)
    with claimed(folder), opened(folder, started) as database:
        known = database.trials()
        with TrialsDisplay(most, started.base.unit, quiet=quiet, verbose=verbose) as display:
            display.known(known)
            display.line(f"searching {describe(started.space)}: {len(known)} of {most} trials have begun; {folder}")
            try:
                found = run_trials(started, folder, database, trials, workers or machine.slots, machine, display, limit)
            except KeyboardInterrupt as error:
                ignore_further()
                display.stop()
                best = f" ({display.best})" if display.best else ""
                done = f"{display.finished} of {most} trials are finished{best}"
                errors.print(f"{past_tense(error)}: {done}; the same command resumes the others")
                return exit_code(error)
        return _report(started, folder, found, database.importances())


def _report(search: Search, folder: Path, trials: Sequence[Trial], importances: Mapping[str, float]) -> int:
    """Print the best trials and write the report.

    Returns:
        The exit code: 1 if trials failed or none is complete, because all diverged; 2 if none has ended.
    """
    from bisam.experiments.cli.report_files import write_report
    from bisam.experiments.runs.files import to_csv, write
    from bisam.experiments.tuning import figures, report

    if not any(trial.ended for trial in trials):
        _show_failed(trials)
        return 2
    if (best := report.best_recipe(search, trials)) is not None:
        write(folder / report.BEST, best)
    header, rows = report.best_rows(search, trials, 10)
    if rows:
        table = Table(
            *header, title=report.title(search), caption="validation scores times 100; no test example is used"
        )
        for row in rows:
            table.add_row(*map(Text, row))
        console.print(table)
    console.print(report.answer(search, trials), soft_wrap=True, highlight=False)
    for line in report.cautions(search, trials):
        console.print(line, soft_wrap=True, highlight=False)
    if rows:
        console.print(f"With new seeds:\n{report.command(search, folder)}", soft_wrap=True, highlight=False)
    pictures = {f"{name}.png": figure for name, figure in figures.drawn(search, trials, importances).items()}
    text = report.markdown(search, folder, trials, importances, list(pictures))
    write_report(folder, text, {"trials.csv": to_csv(report.rows(search, trials))}, pictures)
    _show_failed(trials)
    return 1 if best is None or any(trial.state == "failed" for trial in trials) else 0


def _show_failed(trials: Sequence[Trial]) -> None:
    """Print one line for each reason why trials failed."""
    reasons: dict[str, list[int]] = {}
    for trial in trials:
        if trial.state == "failed":
            reasons.setdefault(trial.error or "", []).append(trial.number)
    for error, (first, *others) in reasons.items():
        more = f" and {len(others)} more" if others else ""
        errors.print(f"bisam: trial {first}{more} failed: {error}; the same command tries again")


def described(
    flags: RecipeFlags,
    preset: str | None,
    config: Path | None,
    texts: tuple[str, ...],
    sampler: str,
    pruner: str,
    seeds: int,
) -> Search:
    """The search that the flags describe.

    Raises:
        ValueError: a value is refused.
        RunError: the file of the recipe has a later version.
    """
    from bisam.experiments.cli.authors import translated
    from bisam.experiments.cli.flags import AuthorsFlags
    from bisam.experiments.recipes.presets import started
    from bisam.experiments.tuning.search import Search
    from bisam.experiments.tuning.space import default_space, filled, parse, placeholders

    fixed: dict[str, Any] = dict(flags.given)
    method = fixed.get("method")
    template = method if method is not None and "{" in method else None
    arguments = () if template is None else placeholders(template)
    space = parse(texts, arguments)
    if twice := [name for name in space if name in fixed and name not in arguments]:
        raise ValueError(f"{flag(twice[0])} and --search {twice[0]} are both given: leave one out")
    if template is not None:
        fixed["method"] = filled(template, {name: space[name].middle for name in arguments})
    base = base_recipe(preset, config)
    base = started(base, translated(base, fixed, AuthorsFlags()))
    return Search(base, space or default_space(base, sampler == "grid"), template, sampler, pruner, seeds)


def _check(recipe: Recipe, machine: Machine) -> None:
    """Check before the first trial that data, model, device and loggers are there."""
    from bisam.experiments.training import loggers
    from bisam.experiments.training.train import prepare

    loggers.check(machine.log)
    check_data_dir([recipe], machine)
    machine.fabric(recipe.precision)
    prepare(recipe, machine)


def _seconds(timeout: str) -> float:
    try:
        return seconds(timeout)
    except ValueError as error:
        raise ValueError(f"--timeout: {error}") from None
