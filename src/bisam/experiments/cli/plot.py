"""`bisam plot`: one figure of a study, of a measurement, or of an analysis of a run."""

from __future__ import annotations

from pathlib import Path

from bisam.experiments.cli.folders import check_file
from bisam.experiments.cli.options import Changes, Config, In, StudyName, with_file
from bisam.experiments.cli.terminal import console
from bisam.experiments.errors import unknown
from bisam.experiments.runs.archive import is_archive

EXAMPLES = (
    "bisam plot figure1",
    "bisam plot figure2 --to figure2.pdf",
    "bisam plot flips digits --to flips.svg",
    "bisam plot landscape RUN --to landscape.pdf",
)


def plot(
    figure: str,
    study: StudyName | None = None,
    *,
    changes: Changes = (),
    config: Config = None,
    out: In = Path("runs"),
    to: Path | None = None,
) -> int:
    """Draw one figure, from run folders: PNG, PDF or SVG.

    Args:
        figure: A study or measurement (its first figure), or the name of a figure: accuracy, ascents, ball, curves,
            figure2, flips, gradients, grid, predictors, radii, radius, time; or an analysis of a run: landscape,
            sharpness, zero-one, flips, spectrum, margins, feature-margins, calibration, rank, gradient, corruptions.
        study: Study whose runs the figure shows, the folder of the analysed run, or for `time` the report.csv of a
            study whose runs are not at hand.
        changes: The same values as for `bisam run`.
        config: The same file as for `bisam run`.
        to: File to write; its suffix gives the format. By default FIGURE.png.
    """
    from bisam.experiments.cli.subjects import SUBJECTS, subject
    from bisam.experiments.reports import analyses, figures, predictor_plot, scatter
    from bisam.experiments.reports.drawing import format_of, save

    if to is not None:
        format_of(to)
        check_file(to, f"{figure}.png")
    changes = with_file(config, changes)
    of_studies = [*figures.CAPTIONS, predictor_plot.NAME]
    run = None if study is None or study in SUBJECTS else Path(study)
    if run is not None and is_archive(run):
        remedy = "unpack it with tar, and give the folder of a run"
        if figure in of_studies:
            remedy = f"write `bisam plot {figure} STUDY --out {run}`"
        raise ValueError(f"{run} is an archive of runs: {remedy}")
    if run is not None and run.suffix == ".csv":
        if figure != "time":
            raise ValueError(
                f"{run} is a table, of which only time is drawn: name a study, and give the --out of its runs"
            )
        drawing = scatter.of_rows(run)
    elif run is not None and figure in analyses.DRAWN and (run.exists() or figure not in figures.CAPTIONS):
        drawing = analyses.draw(figure, run)
    elif study is None and figure in SUBJECTS:
        drawing = SUBJECTS[figure].figure(None, changes, out)
    elif figure in of_studies:
        if study is None:
            raise ValueError(f"{figure} shows runs of a study. Name the study too: bisam plot {figure} digits")
        drawing = subject(study).figure(figure, changes, out)
    elif figure in SUBJECTS:
        raise ValueError(f"{figure} shows its own runs: leave {study} out, or name a figure: bisam plot flips {study}")
    elif figure in analyses.DRAWN:
        raise ValueError(f"{figure} shows an analysis of a run. Give its folder too: bisam plot {figure} RUN")
    else:
        raise unknown("figure", figure, [*of_studies, *SUBJECTS, *analyses.DRAWN], "bisam plot --help")
    file = to or Path(f"{figure}.png")
    save(drawing, file)
    console.print(f"{file}", soft_wrap=True)
    return 0
