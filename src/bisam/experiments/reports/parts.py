"""Parts: the sections of a study's report beside its table, each with its CSV files and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.figure import Figure

from bisam.experiments.analyses.file import Entry
from bisam.experiments.errors import RunError
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import (
    analyses,
    ascents,
    choice,
    figures,
    flips,
    predictor_plot,
    predictors,
    regret,
)
from bisam.experiments.reports.groups import grouped
from bisam.experiments.reports.predictors import Comparison, Measured
from bisam.experiments.runs.files import to_csv
from bisam.experiments.runs.folder import Finished
from bisam.experiments.studies.study import Analyses, Study


@dataclass(frozen=True)
class Part:
    """A part of a report.

    Attributes:
        text: Markdown, or "" for none.
        files: rows of CSV files by file name, or "" for none.
        pictures: figures by file name.
        captions: of the pictures.
        answer: a sentence on what was found, for the first paragraph of the report, or "".
    """

    text: str = ""
    files: Mapping[str, str] = field(default_factory=dict[str, str])
    pictures: Mapping[str, Figure] = field(default_factory=dict[str, Figure])
    captions: Mapping[str, str] = field(default_factory=dict[str, str])
    answer: str = ""


def parts(
    study: Study,
    runs: Sequence[Finished],
    entries: Mapping[Recipe, Sequence[Entry]],
    faults: Sequence[RunError],
    folder: str,
) -> list[Part]:
    """The parts that a study's runs have, in the order of the page.

    Args:
        study: the study.
        runs: finished runs, in the order of the table.
        entries: what `bisam analyse` measured of them.
        faults: files of analyses that cannot be used.
        folder: where `bisam analyse` can measure the others, or "" where it cannot.
    """
    return [
        _predictors(study, runs, entries),
        _figures(study, runs),
        _regret(study, runs),
        _choice(study, runs),
        Part(
            ascents.section(found := ascents.compared(runs, study.registered), runs),
            {"ascents.csv": to_csv(ascents.rows(runs))},
            answer=ascents.answer(found, runs),
        ),
        Part("", {"flips.csv": to_csv(flips.rows(flips.flips(grouped(runs), study.baselines)))}),  # text: by the table
        Part(analyses.section(runs, entries, faults, folder), {"analysis.csv": to_csv(analyses.rows(runs, entries))}),
    ]


def compared(
    runs: Sequence[Finished], entries: Mapping[Recipe, Sequence[Entry]], own: Analyses
) -> tuple[list[Comparison], list[Measured], list[str]]:
    """The comparisons of measures with the test error, the measured runs, and those that are not measured."""
    found, unmeasured = predictors.measured(runs, entries, own)
    return predictors.compare(predictors.levels(found), own.primary, own.control), found, unmeasured


def _predictors(study: Study, runs: Sequence[Finished], entries: Mapping[Recipe, Sequence[Entry]]) -> Part:
    if (own := study.analyses) is None:
        return Part()
    comparisons, found, unmeasured = compared(runs, entries, own)
    text = predictors.section(comparisons, unmeasured, study.seeds)
    files = {"measures.csv": to_csv(predictors.run_rows(found))}
    if not comparisons:
        return Part(text, files)
    files["correlations.csv"] = to_csv(predictors.rows(comparisons))
    name = f"{predictor_plot.NAME}.png"
    picture = predictor_plot.predictors(comparisons, own.shown)
    said = predictors.answer(comparisons, study.seeds)
    return Part(text, files, {name: picture}, {name: predictor_plot.CAPTION}, said)


def _regret(study: Study, runs: Sequence[Finished]) -> Part:
    if (own := study.regret) is None:
        return Part()
    groups, seeds = grouped(runs), range(study.first_seed, study.first_seed + study.seeds)
    files = {"regret.csv": to_csv(regret.rows(groups, own, seeds))}
    return Part(regret.section(groups, own, seeds), files, answer=regret.answer(groups, own, seeds))


def _choice(study: Study, runs: Sequence[Finished]) -> Part:
    if not study.tunes:
        return Part()
    return Part(choice.section(runs), {"choices.csv": to_csv(choice.rows(runs))}, answer=choice.answer(runs))


def _figures(study: Study, runs: Sequence[Finished]) -> Part:
    drawn = [name for name in dict.fromkeys((*study.figures, "curves")) if figures.usable(name, runs)]
    return Part(
        pictures={f"{name}.png": figures.draw(name, runs, study.regret) for name in drawn},
        captions={f"{name}.png": figures.CAPTIONS[name] for name in drawn},
    )
