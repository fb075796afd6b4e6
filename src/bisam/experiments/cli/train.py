"""`bisam train`: train one recipe."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from bisam.experiments.cli.flags import AuthorsFlags, RecipeFlags
from bisam.experiments.cli.idle import CONDITIONS, refuse_idle
from bisam.experiments.cli.options import Given, MachineFlags, Out, refuse_archive
from bisam.experiments.cli.progress import Display
from bisam.experiments.cli.terminal import console, errors
from bisam.experiments.errors import RunError, is_out_of_memory, reason
from bisam.experiments.runs.machine import Machine

if TYPE_CHECKING:
    from bisam.experiments.runs.results import Result

EXAMPLES = (
    "Examples:  bisam train --method sam --noise 0.4 --rho 0.4   |   "
    "bisam train --optim bisam_log --rho 0.05 --epochs 20 --learning_rate 0.1"
)


def train(
    *,
    flags: Annotated[RecipeFlags, Parameter(name="*")] = RecipeFlags(),  # noqa: B008
    preset: str | None = None,
    authors: Annotated[AuthorsFlags, Parameter(name="*", group="The BiSAM authors' flags")] = AuthorsFlags(),  # noqa: B008
    machine: MachineFlags = Machine(),  # noqa: B008
    out: Out = Path("runs"),
    given: Given = frozenset(),
) -> int:
    """Train one recipe; the flags are its fields, and those of the BiSAM authors' script (--optim, --learning_rate).

    Args:
        preset: Settings to start from: paper, authors, imagenet, vit or bert; other flags change them.
    """
    from bisam.experiments.cli.authors import notes, translated
    from bisam.experiments.recipes.presets import started
    from bisam.experiments.runs.folder import Run
    from bisam.experiments.training import loggers
    from bisam.experiments.training.metrics import TITLES
    from bisam.experiments.training.train import train as train_run

    refuse_archive(out)
    recipe = started(preset, translated(preset, flags.given, authors))
    refuse_idle([recipe], machine, given)
    in_files = CONDITIONS["loaders"].holds(recipe, machine)
    for note in notes(recipe, authors, in_files):
        errors.print(f"bisam: {note}")
    if authors.threads is not None and in_files:
        machine = replace(machine, loaders=authors.threads)
    recipe.check_trainable()
    loggers.check(machine.log)
    one = Run.under(out / "train", recipe)
    with Display([recipe]) as display:
        try:
            result = train_run(
                one, machine, lambda row: display.epoch(recipe, recipe.completed(row), row["validation"])
            )
        except KeyboardInterrupt:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C must not end the message
            display.stop()
            errors.print(f"interrupted: {one.folder} is saved; the same command resumes after its last completed epoch")
            return 130
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise RunError(f"out of memory: a smaller --batch-size needs less ({reason(error)})") from error
        display.done(recipe, None)
    metric = result.get("metric", "accuracy")
    console.print(f"test {TITLES.get(metric, metric)} {_scores(result)}; {one.folder}", soft_wrap=True)
    if (diverged := result.get("diverged")) is not None:
        errors.print(f"bisam: the training diverged: the loss is not finite from epoch {diverged} on; {one.folder}")
    return 0


def _scores(result: Result) -> str:
    """Both test scores of a run, the headline first."""
    from bisam.experiments.runs.results import headline

    ties, examples = result.get("validation_ties", 1), result.get("validation_examples", 0)
    tied = f", the latest of {ties} that tie" if ties > 1 else ""
    best = f"{100 * result['test_best']:.1f} % at the best validation epoch ({result['best_epoch']}{tied})"
    last = f"{100 * result['test_last']:.1f} % at the last epoch"
    if headline(result) == "best":
        return f"{best}, the headline; {last}"
    return f"{last}, the headline because validation has only {examples:,} examples; {best}"
