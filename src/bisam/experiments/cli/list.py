"""`bisam list`: the studies, measurements, data sets, models and methods."""

from __future__ import annotations

from rich.table import Table

from bisam.experiments.cli.terminal import console

EXAMPLES = "Example:  bisam list"


def list_all() -> int:
    """List the studies and measurements, and the data sets, models and methods that `bisam train` takes."""
    from bisam.experiments import data
    from bisam.experiments.cli.subjects import SUBJECTS
    from bisam.experiments.models.build import NAMES as MODELS
    from bisam.experiments.recipes.catalogue import METHODS

    table = Table("study", "title", "runs", "methods", box=None, pad_edge=False, header_style="bold")
    for name, subject in SUBJECTS.items():
        table.add_row(name, *subject.listed())
    console.print(table)
    for what, names in (("dataset", data.NAMES), ("model", MODELS)):
        table = Table(f"--{what}", "description", box=None, pad_edge=False, header_style="bold")
        for name, text in names.items():
            table.add_row(name, text)
        console.print("", table)
    console.print(f"\nbisam train --method NAME, with NAME one of {', '.join(METHODS)}, or an expression of them")
    return 0
