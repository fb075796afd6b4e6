"""`bisam report`: the report of a study or a measurement, from its folders."""

from __future__ import annotations

from pathlib import Path

from bisam.experiments.cli.folders import check_folder
from bisam.experiments.cli.options import Changes, Config, In, StudyName, with_file

EXAMPLES = (
    "bisam report digits",
    "bisam report digits --to reports",
    "bisam report table1 --set epochs=1",
)


def report(
    study: StudyName,
    *,
    changes: Changes = (),
    config: Config = None,
    out: In = Path("runs"),
    to: Path | None = None,
) -> int:
    """Write report.md, report.csv, report.html and the figures from the run folders of a study, and print the table.

    Where runs were analysed (`bisam analyse`), the report has their numbers, which are in analysis.csv too.

    Args:
        study: Name of the study or measurement, see `bisam list`.
        changes: The same values as for `bisam run`.
        config: The same file as for `bisam run`.
        to: Folder to write to; by default that of the study's runs, or one of its name beside the archive.
    """
    from bisam.experiments.cli.subjects import subject

    chosen = subject(study)
    if to is not None:
        check_folder(to)
    return chosen.report(with_file(config, changes), out, to)
