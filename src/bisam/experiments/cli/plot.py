"""`bisam plot`: one figure of a study or a measurement."""

from __future__ import annotations

from pathlib import Path

from bisam.experiments.cli.options import Changes, Out
from bisam.experiments.cli.terminal import console
from bisam.experiments.errors import unknown

EXAMPLES = (
    "Examples:  bisam plot figure1   |   bisam plot figure2 --to figure2.pdf   |   "
    "bisam plot flips digits --to flips.svg"
)


def plot(
    figure: str, study: str | None = None, *, changes: Changes = (), out: Out = Path("runs"), to: Path | None = None
) -> int:
    """Draw one figure, from run folders: PNG, PDF or SVG.

    Args:
        figure: A study or measurement (its first figure), or the name of a figure: accuracy, curves, flips, ...
        study: Study whose runs the figure shows.
        changes: The same values as for `bisam run`.
        to: File to write; its suffix gives the format. By default FIGURE.png.
    """
    from bisam.experiments.cli.subjects import SUBJECTS, subject
    from bisam.experiments.reports import figures, predictor_plot
    from bisam.experiments.reports.drawing import save

    of_studies = [*figures.CAPTIONS, predictor_plot.NAME]
    if study is None and figure in SUBJECTS:
        drawing = SUBJECTS[figure].figure(None, changes, out)
    elif figure in of_studies:
        if study is None:
            raise ValueError(f"{figure} shows runs of a study. Name the study too: bisam plot {figure} digits")
        drawing = subject(study).figure(figure, changes, out)
    elif figure in SUBJECTS:
        raise ValueError(f"{figure} shows its own runs: leave {study} out, or name a figure: bisam plot flips {study}")
    else:
        raise unknown("figure", figure, [*of_studies, *SUBJECTS])
    file = to or Path(f"{figure}.png")
    save(drawing, file)
    console.print(f"{file}", soft_wrap=True)
    return 0
