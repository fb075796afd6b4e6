"""Analyses in reports: tables of what `bisam analyse` measured, as mean ± standard deviation over the seeds.

Numbers of different settings are never averaged: runs that were analysed on other examples or weights are in a table of
their own, and another radius or number of steps has columns of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import floor, isnan, log10, nan
from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING, Any

from bisam.experiments.analyses.catalogue import ANALYSES, Column
from bisam.experiments.analyses.file import Entry, is_of, read_entries, with_settings
from bisam.experiments.analyses.settings import FILE, SHARED
from bisam.experiments.errors import DamagedError, RunError
from bisam.experiments.markdown import escaped, table
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.groups import Groups, grouped, names, place, places
from bisam.experiments.runs.files import checksum
from bisam.experiments.runs.folder import Finished, Run, read_recipe
from bisam.experiments.runs.provenance import RESULT, line, where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]

SPLITS = {
    "train": "training examples, with the label noise of the run and without augmentation",
    "validation": "validation examples",
    "test": "test examples",
}
WEIGHTS = {
    "best": "with the weights of the best validation epoch",
    "last": "with the weights of the last epoch",
    "ema": "with the average of the weights",
    FILE: "with the weights of a file",
}
_OWN = {"rho": "rho {:g}", "steps": "{} steps"}


@dataclass(frozen=True)
class Head:
    """A column of a table of analyses.

    Attributes:
        title: its name, with the settings that other columns of the same number do not share.
        column: which number.
        analysis: of which analysis.
        settings: with which settings.
    """

    title: str
    column: Column
    analysis: str
    settings: Mapping[str, Any]

    def is_in(self, entries: Iterable[Entry]) -> bool:
        """Whether the analysis was made with these settings, among the entries of a run."""
        return with_settings(entries, self.analysis, self.settings) is not None

    def value(self, entries: Iterable[Entry]) -> float:
        """The number in the entries of a run; nan if it is not there or not finite."""
        entry = with_settings(entries, self.analysis, self.settings)
        return nan if entry is None else self.column.value(entry["results"])


@dataclass(frozen=True)
class Sheet:
    """Entries on the same examples and weights, and the columns of their table.

    Attributes:
        settings: the shared settings.
        entries: those of each run, by any key of a run.
        heads: the columns.
        own: the other settings, where all columns that have them agree.
    """

    settings: Mapping[str, Any]
    entries: Mapping[Any, Sequence[Entry]]
    heads: tuple[Head, ...]
    own: Mapping[str, Any]

    @property
    def said(self) -> str:
        """The settings in words."""
        s = self.settings
        own = [_OWN[name].format(value) for name, value in self.own.items()]
        parts = (
            f"on at most {s['examples']:,} {SPLITS[s['split']]}, in batches of {s['batch_size']}",
            WEIGHTS[s["weights"]],
            *own,
            f"seed {s['seed']}",
        )
        return ", ".join(parts)


def sheets(entries: Mapping[Any, Sequence[Entry]]) -> list[Sheet]:
    """The tables for the entries of some runs: one for each combination of shared settings.

    Args:
        entries: those of each run, by any key of a run.
    """
    found: dict[tuple[Any, ...], dict[Any, list[Entry]]] = {}
    for run, some in entries.items():
        for entry in some:
            shared = tuple(entry["settings"][name] for name in SHARED)
            found.setdefault(shared, {}).setdefault(run, []).append(entry)
    return [_sheet(dict(zip(SHARED, shared, strict=True)), some) for shared, some in found.items()]


def _sheet(settings: Mapping[str, Any], entries: Mapping[Any, Sequence[Entry]]) -> Sheet:
    every = [entry for some in entries.values() for entry in some]
    heads: list[Head] = []
    values: dict[str, list[Any]] = {}
    for name, analysis in ANALYSES.items():
        variants = list({str(e["settings"]): e["settings"] for e in every if e["analysis"] == name}.values())
        variants.sort(key=lambda one: [one[own] for own in analysis.settings])
        differ = [own for own in analysis.settings if len({one[own] for one in variants}) > 1]
        for one in variants if analysis.columns else ():
            more = ", ".join(_OWN[own].format(one[own]) for own in differ)
            heads += [Head(f"{c.title} ({more})" if more else c.title, c, name, one) for c in analysis.columns]
            for own in analysis.settings:
                values.setdefault(own, []).append(one[own])
    agreed = {own: some[0] for own, some in values.items() if len(set(some)) == 1}
    return Sheet(settings, entries, tuple(heads), agreed)


def read(runs: Iterable[Finished]) -> tuple[dict[Recipe, list[Entry]], list[RunError]]:
    """The entries of the runs that have some of their present weights, by recipe and seed; and files that are damaged.

    Args:
        runs: read from folders.
    """
    found, faults = dict[Recipe, list[Entry]](), list[RunError]()
    for run in runs:
        if run.folder is None:
            continue
        try:
            entries = [one for one in read_entries(run.folder) if is_of(one, checksum(run.result))]
        except RunError as error:
            faults.append(error)
            continue
        if entries:
            found[run.recipe] = entries
    return found, faults


DRAWN = tuple(name for name, analysis in ANALYSES.items() if analysis.draw is not None)
"""The analyses that have a figure."""


def draw(name: str, folder: Path) -> Figure:
    """The figure of the latest entry of an analysis.

    Args:
        name: one of `DRAWN`.
        folder: of a run, or of what was found of the weights in a file.

    Raises:
        ValueError: there is no such entry.
        RunError: a file is damaged.
    """
    of, entries = None, read_entries(folder)
    if (folder / "recipe.json").exists():
        result = Run(folder, read_recipe(folder)).result
        of = "" if result is None else checksum(result)
    usable = [e for e in entries if e["analysis"] == name and is_of(e, e["of"] if of is None else of)]
    if not usable:
        raise ValueError(f"{folder} has no {name}: measure it with `bisam analyse {folder} --what {name}`")
    analysis = ANALYSES[name]
    assert analysis.draw is not None
    return analysis.draw(analysis.restored(usable[-1]["results"]))


def rows(runs: Sequence[Finished], entries: Mapping[Recipe, Sequence[Entry]]) -> list[Row]:
    """One row for each recipe, setting and number, for a CSV file.

    Args:
        runs: finished runs, in the order of the report.
        entries: see `read`.
    """
    groups = grouped(runs)
    called, found = names(groups), list[Row]()
    for sheet in sheets(entries):
        for recipe, group in groups.items():
            for head in sheet.heads:
                values = _values(head, sheet, group)
                if not values:
                    continue
                own = {name: head.settings.get(name, "") for name in _OWN}
                about = {
                    "name": called[recipe],
                    "dataset": recipe.dataset,
                    "model": recipe.model,
                    "noise": recipe.noise,
                }
                row: Row = {**about, **sheet.settings, **own, "analysis": head.analysis, "measure": head.column.title}
                spread = stdev(values) if len(values) > 1 else nan
                found.append({**row, "mean": mean(values), "std": spread, "n": len(values), "recipe": recipe.slug})
    return found


def section(
    runs: Sequence[Finished], entries: Mapping[Recipe, Sequence[Entry]], faults: Sequence[RunError], root: str
) -> str:
    """The section of a report in Markdown; empty if no run was analysed.

    Args:
        runs: finished runs, in the order of the report.
        entries: see `read`.
        faults: see `read`.
        root: folder of the runs, for the command that analyses the others; empty if nothing can.
    """
    if not entries and not faults:
        return ""
    groups, lacking = grouped(runs), len(runs) - len(entries)
    blocks = ["## Analysis"]
    blocks += [
        f"Measured after training by `bisam analyse`, for {len(entries)} of {len(runs)} finished runs: mean ± standard "
        "deviation over n seeds; a cell of fewer seeds has their number in parentheses. Numbers of different settings "
        "are never averaged." + (f" `bisam analyse {root}` measures the other {lacking}." if lacking and root else "")
    ]
    explained = set[str]()
    for sheet in sheets(entries):
        if sheet.heads:
            blocks += [_sentence(sheet.said), *_tables(groups, sheet, explained)]
    if faults:
        said = [
            f"{e.path.parent.name}/{e.path.name} ({e.reason})" if isinstance(e, DamagedError) else f"{e}"
            for e in faults
        ]
        blocks += [f"Left out, because they cannot be used: {'; '.join(map(escaped, said))}."]
    return "\n\n".join([*blocks, *provenance(entries)])


def _tables(groups: Groups, sheet: Sheet, explained: set[str]) -> list[str]:
    """A table for each analysis; rows of the same settings are together.

    Args:
        groups: runs by recipe.
        sheet: what is shown.
        explained: analyses whose columns were explained before; those of this sheet are added.
    """
    called, titles, found = names(groups), places(groups), list[str]()
    for name in dict.fromkeys(head.analysis for head in sheet.heads):
        heads = [head for head in sheet.heads if head.analysis == name]
        told = [own for own in ANALYSES[name].settings if own not in sheet.own]
        lines: list[tuple[str, ...]] = []
        for settings in {str(head.settings): head.settings for head in heads}.values():
            row = [head for head in heads if head.settings == settings]
            for recipe, group in groups.items():
                if n := sum(row[0].is_in(sheet.entries.get(run.recipe, ())) for run in group):
                    first = [*(f"{settings[own]:g}" for own in told), titles[place(recipe)]]
                    cells = (cell(_values(head, sheet, group), head.column.percent, n) for head in row)
                    lines.append((*first[: None if len(titles) > 1 else -1], called[recipe], *cells, f"{n}"))
        shown = ANALYSES[name].columns
        columns = [f"{column.title} (%)" if column.percent else column.title for column in shown]
        title = ANALYSES[name].title
        found.append(f"**{title[0].upper()}{title[1:]}**")
        found.append(table((*told, *([""] if len(titles) > 1 else []), "method", *columns, "n"), lines))
        if name not in explained:
            about = [f"{column.title}: {column.about}" for column in shown if column.about]
            found.append(_sentence("; ".join(about)))
            explained.add(name)
    return found


def written(head: Head) -> str:
    """The title of a column with its unit."""
    return f"{head.title} (%)" if head.column.percent else head.title


def cell(values: Sequence[float], percent: bool, n: int) -> str:
    """Mean ± standard deviation: three significant digits of the mean, or more for one of the standard deviation.

    Without values it is a dash.

    Args:
        values: of some seeds.
        percent: whether they are shares of 1 to show in per cent.
        n: number of seeds of the row; another number of values is added.
    """
    if not values or isnan(values[0]):
        return "–"
    values = [100 * value for value in values] if percent else values
    centre, spread = mean(values), stdev(values) if len(values) > 1 else 0.0
    if centre and abs(centre) < 1e-3 and not percent:
        texts = [f"{centre:.2e}", f"{spread:.1e}"]
    else:
        digits = 2 if percent else max(2 - _exponent(centre), -_exponent(spread) if spread else 0, 0)
        texts = [f"{number:.{min(digits, 6)}f}" for number in (centre, spread)]
    fewer = f" ({len(values)})" if len(values) != n else ""
    return (" ± ".join(texts[: len(values)]) + fewer).replace("-", "−")


def _exponent(value: float) -> int:
    return floor(log10(abs(value))) if value else 0


def _values(head: Head, sheet: Sheet, group: Sequence[Finished]) -> list[float]:
    found = [head.value(sheet.entries.get(run.recipe, ())) for run in group]
    return [value for value in found if not isnan(value)]


def provenance(entries: Mapping[Any, Sequence[Entry]]) -> list[str]:
    """Where and when the numbers were made: one line of Markdown for each environment."""
    every = [entry for some in entries.values() for entry in some]
    dates: dict[str, list[str]] = {}
    for entry in every:
        dates.setdefault(where(entry, RESULT), []).append(entry["date"])
    return [escaped(f"Analysis: {line(place, some)}") for place, some in sorted(dates.items())]


def _sentence(text: str) -> str:
    return escaped(f"{text[0].upper()}{text[1:]}.")
