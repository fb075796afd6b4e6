"""Shown: reports of studies and measurements, on the terminal and as files."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement as Width
from rich.table import Column, Table
from rich.text import Text

from bisam.experiments.cli.progress import console, errors
from bisam.experiments.errors import RunError
from bisam.experiments.recipes.changes import pairs
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Finished, finished, to_csv, write

if TYPE_CHECKING:
    from bisam.experiments.launch.outcomes import Outcome
    from bisam.experiments.studies.study import Study


def runs_of(chosen: Study, changes: tuple[str, ...], out: Path) -> list[Finished]:
    """The finished runs of a study; where there is none of its own, shorter trials that lie in its folder."""
    runs, wanted = all_finished(out / chosen.folder), set(chosen.changed(None, changes))
    found = [run for run in runs if without_seed(run) in wanted]
    if not found and runs and not changes:
        methods = {recipe.method for recipe in wanted}
        found = [run for run in runs if run.recipe.method in methods]
        if found:
            errors.print(f"bisam: no run of {chosen.name} as it is: these are trials with other settings")
    if not found:
        again = " ".join(["bisam run", chosen.name, *(f"--set {change}" for change in changes)])
        raise ValueError(f"no finished run of {chosen.name} there: run `{again}` first, or give its --out")
    return found


def all_finished(root: Path) -> list[Finished]:
    """The finished runs in `root`; of damaged ones it says what is wrong."""
    runs: list[Finished] = []
    for run in finished(root):
        if isinstance(run, RunError):
            errors.print(f"bisam: left out: {run}")
        else:
            runs.append(run)
    return runs


def without_seed(run: Finished) -> Recipe:
    """What its study asked for."""
    return replace(run.recipe, seed=0)


def show(study: Study, runs: list[Finished], to: Path) -> None:
    """Table on the terminal, report.md, report.csv, report.html and figures in `to`."""
    from bisam.experiments.reports import figures, tables
    from bisam.experiments.reports.drawing import rendered

    rows = tables.summary(runs, study.baselines)
    header = tables.header(rows, brief=console.width < 130)
    columns = (Column(name, no_wrap=name == "name", overflow="fold") for name in header)
    table = Table(*columns, title=study.title, caption=tables.CAPTION)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        new = following is not None and any(following[key] != row[key] for key in ("dataset", "model", "noise"))
        table.add_row(*(Text(cell) for cell in tables.cells(row, header)), end_section=new)
    console.print(table)
    drawn = [name for name in study.figures if figures.usable(name, runs)]
    pictures = {f"{name}.png": rendered(figures.draw(name, runs)) for name in drawn}
    what = {f"{name}.png": figures.WHAT[name] for name in drawn}
    text = tables.markdown(study.title, runs, what, study.note, study.baselines)
    _written(to, text, to_csv(rows), pictures)


def show_failed(outcomes: Sequence[Outcome]) -> int:
    """A line for each reason why runs failed or did not start, and the exit code: 2 where none could start."""

    def reason(outcome: Outcome) -> tuple[str, bool]:
        return outcome.error or "", outcome.started

    failed = sorted((outcome for outcome in outcomes if outcome.error), key=reason)
    for (error, started), same in itertools.groupby(failed, key=reason):
        first, *others = same
        more = f" and {len(others)} more" if others else ""
        which = f"{first.recipe.slug}, seed {first.recipe.seed}{more}"
        errors.print(f"bisam: {which} {'failed' if started else 'did not start'}: {error}")
    if not failed:
        return 0
    return 1 if any(outcome.started for outcome in outcomes) else 2


def _written(to: Path, markdown: str, csv: str, pictures: dict[str, bytes]) -> None:
    from bisam.experiments.reports import pages

    write(to / "report.md", markdown)
    if csv:
        write(to / "report.csv", csv)
    write(to / "report.html", pages.html(markdown, pictures))
    for file, content in pictures.items():
        write(to / file, content)
    names = ["report.md", *(["report.csv"] if csv else []), "report.html", *pictures]
    console.print(f"{to}/: {', '.join(names)}", soft_wrap=True)


def show_measured(name: str, place: Path, to: Path, changes: tuple[str, ...] = ()) -> int:
    """A measurement's table on the terminal, and its report in `to`."""
    from bisam.experiments.measurements import MEASUREMENTS, report as measured
    from bisam.experiments.reports.drawing import rendered

    result = measured(MEASUREMENTS[name], place, pairs(changes, "rounds=5"))
    table = Table(*result.header, title=result.title)
    for row in result.cells:
        table.add_row(*(Text(cell.replace("**", "")) for cell in row))
    # At its own width: cells that are cut or folded letter by letter would be of no use.
    width = Width.get(console, console.options.update(max_width=1000), table).maximum
    Console(width=max(width, console.width)).print(table)
    pictures = {file: rendered(figure) for file, figure in result.figures.items()}
    _written(to, result.markdown, to_csv(result.rows), pictures)
    return 0


def show_figure1(to: Path) -> int:
    """Figure 1, which needs no runs."""
    from bisam.experiments.reports import figures
    from bisam.experiments.reports.drawing import rendered

    what = figures.WHAT["figure1"]
    text = f"# Figure 1\n\n{what}.\n\n![{what}](figure1.png)\n"
    _written(to, text, "", {"figure1.png": rendered(figures.draw("figure1"))})
    return 0
