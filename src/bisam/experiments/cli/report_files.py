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
    """Write report.md, report.html, the figures and, if there are rows, report.csv, and print their names.

    Args:
        to: folder.
        markdown: the report, which names the figures by their files.
        csv: its rows, or "" if there are none.
        figures: content by file name.
        tables: further CSV files, by file name.
    """
    from bisam.experiments.reports import pages

    write(to / "report.md", markdown)
    if csv:
        write(to / "report.csv", csv)
    write(to / "report.html", pages.html(markdown, figures))
    for file, content in {**tables, **figures}.items():
        write(to / file, content)
    names = ["report.md", *(["report.csv"] if csv else []), *tables, "report.html", *figures]
    console.print(f"{to}/: {', '.join(names)}", soft_wrap=True)
