"""Report files: a report as Markdown, CSV, HTML and figures in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from bisam.experiments.cli.terminal import console
from bisam.experiments.runs.files import write

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_report(
    to: Path,
    markdown: str,
    tables: Mapping[str, str],
    figures: Mapping[str, Figure],
) -> None:
    """Write report.md, report.html, the figures and, if there are rows, CSV files, and print their names.

    Beside report.md the figures are PNG files; in report.html they are SVG, in the colours of the page.

    Args:
        to: folder.
        markdown: the report, which names the figures by their files.
        tables: rows of CSV files by file name, or "" if there are none.
        figures: by file name, of PNG files.
    """
    from bisam.experiments.reports import pages
    from bisam.experiments.reports.drawing import rendered

    write(to / "report.md", markdown)
    tables = {name: rows for name, rows in tables.items() if rows.strip()}
    write(to / "report.html", pages.html(markdown, {name: rendered(one, "svg") for name, one in figures.items()}))
    pictures = {name: rendered(one) for name, one in figures.items()}
    for file, content in {**tables, **pictures}.items():
        write(to / file, content)
    names = ["report.md", *tables, "report.html", *figures]
    console.print(f"{to}/: {', '.join(names)}", soft_wrap=True)
