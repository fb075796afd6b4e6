"""The report of a study: its tables on the terminal, and its files."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.table import Column, Table
from rich.text import Text

from bisam.experiments.analyses.file import Entry
from bisam.experiments.cli.report_files import write_report
from bisam.experiments.cli.terminal import console, errors
from bisam.experiments.markdown import aligned, escaped, link
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.recipes.versions import VERSION
from bisam.experiments.reports import analyses, legends, predictors, tables
from bisam.experiments.reports.answer import Wanted, unmarked
from bisam.experiments.reports.groups import grouped, names, place as at, places
from bisam.experiments.reports.parts import compared, parts
from bisam.experiments.runs.archive import Source
from bisam.experiments.runs.files import to_csv
from bisam.experiments.runs.folder import Finished
from bisam.experiments.studies.study import Study


def report(study: Study, runs: list[Finished], left_out: list[str], place: Source, to: Path) -> None:
    """Print the tables of a study, and write its report.

    Args:
        study: the study.
        runs: finished runs, in the order of the table.
        left_out: files of finished runs that cannot be used, each with the reason.
        place: where the runs are.
        to: folder of the report.
    """
    reported = of_runs(study, runs)
    wanted = Wanted(len(study.recipes(None)), study.seeds) if reported is study else None
    study = reported
    entries, faults = analyses.read(runs)
    for fault in faults:
        if place.archived:
            raise place.fault(fault)
        errors.print(f"bisam: skipped: {fault}")
    rows = tables.summary(runs, study.baselines, study.registered)
    _print_table(study, runs, rows)
    if words := tables.brief_of_diverged(runs):
        errors.print(f"bisam: {words}")
    _print_predictors(study, runs, entries)
    found = parts(study, runs, entries, faults, "" if place.archived else f"{place.folder / study.folder}")
    tables_of = {"report.csv": to_csv(rows), **{n: text for part in found for n, text in part.files.items()}}
    said = [part.answer for part in found if part.answer]
    answer = tables.opening(runs, study.baselines, study.registered, said, wanted, tunes=study.tunes)
    if wanted is None:
        answer = f"{OTHER_SETTINGS} {answer}"
    console.print(unmarked(answer), highlight=False)
    text = tables.markdown(
        study.title,
        runs,
        {name: caption for part in found for name, caption in part.captions.items()},
        study.note,
        study.baselines,
        left_out,
        study.assumptions,
        [part.text for part in found if part.text],
        study.registered,
        linked([name for name, content in tables_of.items() if content.strip()], runs, place, to),
        answer,
    )
    pictures = {name: picture for part in found for name, picture in part.pictures.items()}
    write_report(to, text, tables_of, pictures)


def of_runs(study: Study, runs: Iterable[Finished]) -> Study:
    """The study as its report has it: without what was registered for it if no run has the settings of the study.

    `bisam run digits --epochs 1` trains other runs than those that the comparison of `digits` was registered for.
    """
    own = set(study.recipes(None))
    if any(replace(run.recipe, seed=0, version=VERSION) in own for run in runs):
        return study
    regret = None if study.regret is None else replace(study.regret, optima={})
    return replace(study, primary=None, regret=regret)


OTHER_SETTINGS = (
    "**Other settings:** these runs have other settings than the study. What is registered for the study is not tested "
    "here, and all comparisons are exploratory."
)


def linked(files: Sequence[str], runs: Sequence[Finished], place: Source, to: Path) -> str:
    """The section with links to the files of a report and to its runs, in Markdown.

    Args:
        files: names of CSV files.
        runs: finished runs.
        place: where they are: of an archive the file is linked, of a folder each run, unless the report is far from it,
            as a page that is published without the runs.
        to: folder of the report.
    """

    def relative(path: Path) -> str:
        return Path(os.path.relpath(path.absolute(), to.absolute())).as_posix()

    blocks = ["## Files", f"Numbers: {', '.join(link(file, file) for file in files)}."]
    if place.archived:
        blocks.append(f"Runs: {link(place.given.name, relative(place.given))}.")
        return "\n\n".join(blocks)
    if relative(place.folder).count("../") > _NEAR:
        return "\n\n".join(blocks)
    groups = grouped(runs)
    called, titles = names(groups), places(groups)
    lines = [
        (
            escaped(", ".join(part for part in (titles[at(recipe)], called[recipe]) if part)),
            " ".join(link(f"{run.recipe.seed}", relative(run.folder)) for run in group if run.folder is not None),
        )
        for recipe, group in groups.items()
    ]
    return "\n\n".join([*blocks, aligned(("runs", "seeds"), lines)])


_NEAR = 2  # folders up, from which on runs are not linked


def _print_table(study: Study, runs: Sequence[Finished], rows: Sequence[tables.Row]) -> None:
    narrow = console.width < 150
    header = tables.header(rows, brief=narrow)
    heads = {name: "diff." if name == "difference" and narrow else name for name in header}
    columns = (Column(heads[name], no_wrap=name == "name", overflow="fold") for name in header)
    table = Table(*columns, title=study.title, caption=legends.caption(runs))
    marks, recipes = tables.marks_of(runs, study.assumptions), list(grouped(runs))
    for recipe, row, following in zip(recipes, rows, [*rows[1:], None], strict=True):
        new = following is not None and any(following[key] != row[key] for key in ("dataset", "model", "noise"))
        cells = marks.beside(recipe, header, tables.cells(row, header), told=marks.subjects)
        table.add_row(*map(Text, cells), end_section=new)
    console.print(table)
    for mark, value, kind, _ in marks.rows():
        console.print(f"{mark} {value}: {kind}", highlight=False)


def _print_predictors(study: Study, runs: Sequence[Finished], entries: Mapping[Recipe, Sequence[Entry]]) -> None:
    comparisons = [] if study.analyses is None else compared(runs, entries, study.analyses)[0]
    if not comparisons:
        return
    table = Table(*predictors.BRIEF, title=predictors.TITLE)
    for one, following in zip(comparisons, [*comparisons[1:], None], strict=True):
        end = following is not None and following.level is not one.level
        table.add_row(*map(Text, predictors.brief(one)), end_section=end)
    console.print(table)
