"""`bisam train`: train one recipe."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bisam.experiments.cli.flags import AuthorsFlags, RecipeFlags
from bisam.experiments.cli.folders import check_data_dir, check_file, check_out
from bisam.experiments.cli.groups import AUTHORS, RECIPE
from bisam.experiments.cli.idle import CONDITIONS, refuse_idle
from bisam.experiments.cli.options import Given, MachineFlags, Out, Quiet, Verbose, refuse_contradiction
from bisam.experiments.cli.progress import Display
from bisam.experiments.cli.terminal import console, errors, silent
from bisam.experiments.errors import OutOfTimeError, RunError, is_out_of_memory, reason
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.signals import exit_code, ignore_further, past_tense

if TYPE_CHECKING:
    from bisam.experiments.recipes.recipe import Recipe
    from bisam.experiments.runs.folder import Run
    from bisam.experiments.runs.results import Result

EXAMPLES = (
    "bisam train --method sam --noise 0.4 --rho 0.4",
    "bisam train --optim bisam_log --rho 0.05 --epochs 20 --learning_rate 0.1",
    "bisam train --config RUN/recipe.json --seed 1",
    "bisam train --weights RUN --learning-rate 0.01",
)


def train(
    *,
    flags: Annotated[RecipeFlags, Parameter(name="*")] = RecipeFlags(),  # noqa: B008
    preset: Annotated[str | None, Parameter(group=RECIPE)] = None,
    config: Annotated[Path | None, Parameter(group=RECIPE)] = None,
    save_config: Annotated[Path | None, Parameter(group=RECIPE)] = None,
    authors: Annotated[AuthorsFlags, Parameter(name="*", group=AUTHORS)] = AuthorsFlags(),  # noqa: B008
    machine: MachineFlags = Machine(),  # noqa: B008
    out: Out = Path("runs"),
    quiet: Quiet = False,
    verbose: Verbose = False,
    given: Given = frozenset(),
) -> int:
    """Train one recipe, which is all settings of a run: each flag sets one of its fields.

    The flags of the BiSAM authors' script (--optim, --learning_rate) work too.

    The exit code is 1 if the run has diverged: its loss or its weights are not finite.

    Args:
        preset: Settings to start from: paper, authors, imagenet, vit or bert; other flags change them.
        config: A recipe in a file to start from, TOML or JSON, such as a run's recipe.json; other flags change it.
        save_config: Write the recipe to this file, .toml or .json, for --config, and train nothing.
    """
    from bisam.experiments.cli.authors import notes, translated
    from bisam.experiments.recipes.config import text
    from bisam.experiments.recipes.presets import started
    from bisam.experiments.runs.files import write
    from bisam.experiments.runs.folder import Run

    refuse_contradiction(quiet, verbose)
    check_out(out)
    base = base_recipe(preset, config)
    recipe = started(base, translated(base, flags.given, authors))
    refuse_idle([recipe], machine, given)
    with silent(not machine.is_main_process):
        recipe = _with_pinned_weights(recipe, machine, out)
        if save_config is not None:
            check_file(save_config, "recipe.toml", "--save-config")
            write(save_config, text(recipe, save_config))
            again = f"bisam train --config {shlex.quote(str(save_config))}"
            console.print(f"{save_config}: {again}", soft_wrap=True, highlight=False)
            return 0
        in_files = CONDITIONS["loaders"].holds(recipe, machine)
        for note in notes(recipe, authors, in_files):
            errors.print(f"bisam: {note}")
        if authors.threads is not None and in_files:
            machine = replace(machine, loaders=authors.threads)
        return _trained_or_known(Run.under(out / "train", recipe), machine, quiet, verbose)


def _trained_or_known(run: Run, machine: Machine, quiet: bool, verbose: bool) -> int:
    """Train a run that is not finished, and print its result; return the exit code."""
    from bisam.experiments.runs.results import TITLES

    if (result := run.known_result()) is None:
        try:
            result = _trained(run, machine, quiet, verbose)
        except (KeyboardInterrupt, OutOfTimeError) as error:
            ignore_further()
            what = "--max-time is over" if isinstance(error, OutOfTimeError) else past_tense(error)
            errors.print(f"{what}: {run.folder} is saved; the same command resumes after its last completed epoch")
            return 130 if isinstance(error, OutOfTimeError) else exit_code(error)
    else:
        console.print("finished before: nothing is left to train")
    metric = result.get("metric", "accuracy")
    console.print(f"test {TITLES.get(metric, metric)} {_scores(result)}; {run.folder}", soft_wrap=True)
    message, diverged = result.get("message"), result.get("diverged")
    if message is None and diverged is not None:  # results of earlier versions have none
        message = f"the loss is not finite from epoch {diverged} on"
    if message is not None:
        said = f"{'ended early: ' if 'stopped' in result else ''}{message}"
        if diverged is None:
            console.print(said, soft_wrap=True)
        else:
            errors.print(f"bisam: {said}; {run.folder}")
    return 0 if diverged is None else 1


def _trained(run: Run, machine: Machine, quiet: bool, verbose: bool) -> Result:
    """Train a run, and show its progress."""
    from bisam.experiments.training import loggers
    from bisam.experiments.training.train import train as train_run

    recipe = run.recipe
    recipe.check_trainable()
    check_data_dir([recipe], machine)
    loggers.check(machine.log)
    with Display([recipe], quiet=quiet, verbose=verbose) as display:
        try:
            result = train_run(
                run,
                machine,
                lambda row: display.advanced(recipe, recipe.completed(row), row["validation"]),
                display.line,
                display.step,
            )
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(f"out of memory: a smaller --batch-size needs less ({reason(error)})") from error
        display.done(recipe, None)
    return result


def base_recipe(preset: str | None, config: Path | None) -> Recipe:
    """The recipe that the flags change.

    Raises:
        ValueError: both a preset and a file are given, or one of them is refused.
    """
    from bisam.experiments.recipes import presets
    from bisam.experiments.recipes.config import read
    from bisam.experiments.recipes.recipe import Recipe

    if config is None:
        return Recipe() if preset is None else presets.preset(preset)
    if preset is not None:
        raise ValueError(f"--preset {preset} and --config {config} are both a recipe to start from: leave one out")
    return read(config)


def _with_pinned_weights(recipe: Recipe, machine: Machine, out: Path) -> Recipe:
    """The recipe with a checksum of its initial weights; as it is if there is a run of it from an earlier version."""
    from bisam.experiments.models.initial import pinned
    from bisam.experiments.runs.folder import Run

    earlier = Run.under(out / "train", recipe).folder
    found = replace(recipe, weights=pinned(recipe.weights, machine.data_dir))
    if found != recipe and (earlier / "recipe.json").is_file():
        errors.print(
            f"bisam: {earlier} is of an earlier version, and its recipe has no checksum of {recipe.weights}: it is "
            "resumed; give another --out if the file has changed since"
        )
        return recipe
    return found


def _scores(result: Result) -> str:
    """Both test scores of a run, the headline first."""
    from bisam.experiments.runs.results import headline

    ties, examples = result.get("validation_ties", 1), result.get("validation_examples", 0)
    tied = f", the latest of {ties} that tie" if ties > 1 else ""
    best = f"{100 * result['test_best']:.1f} % at the best validation epoch ({result['best_epoch']}{tied})"
    last = f"{100 * result['test_last']:.1f} % at the last epoch"
    if headline(result) == "best":
        return f"{best}, the headline; {last}"
    few = f"validation has only {examples:,} example{'s' if examples != 1 else ''}" if examples else "none is held out"
    return f"{last}, the headline because {few}; {best}"
