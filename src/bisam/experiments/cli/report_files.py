"""Report files: a report as Markdown, CSV, HTML and figures in one folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from bisam.experiments.cli.terminal import console
from bisam.experiments.runs.files import write


def write_report(
    to: Path,
    markdown: str,
    csv: str,
    figures: Mapping[str, bytes],
    tables: Mapping[str, str] = {},
) -> None:
    """Write report.md, report.html, the figures and, if there are rows, CSV files, and print their names.

    Args:
        to: folder.
        markdown: the report, which names the figures by their files.
        csv: its rows, or "" if there are none.
        figures: content by file name.
        tables: rows of further CSV files by file name, or "" if there are none.
    """
    from bisam.experiments.reports import pages

    write(to / "report.md", markdown)
    tables = {name: rows for name, rows in {"report.csv": csv, **tables}.items() if rows.strip()}
    write(to / "report.html", pages.html(markdown, figures))
    for file, content in {**tables, **figures}.items():
        write(to / file, content)
    names = ["report.md", *tables, "report.html", *figures]
    console.print(f"{to}/: {', '.join(names)}", soft_wrap=True)
