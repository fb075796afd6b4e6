"""`bisam list`: the studies, measurements, data sets, models and methods."""

from __future__ import annotations

from rich.table import Table

from bisam.experiments.cli.terminal import console

EXAMPLES = "Example:  bisam list"


def list_all() -> int:
    """List the studies and measurements, and the data sets, models and methods that `bisam train` takes."""
    from bisam.experiments import data
    from bisam.experiments.cli.subjects import SUBJECTS
    from bisam.experiments.measurements import MEASUREMENTS
    from bisam.experiments.models.build import NAMES as MODELS
    from bisam.experiments.recipes.catalogue import METHODS
    from bisam.experiments.studies import GROUPS

    table = Table("study", "title", "runs", "methods", box=None, pad_edge=False, header_style="bold")
    groups = {group: [study.name for study in studies] for group, studies in GROUPS.items()}
    for group, names in {**groups, "measurements": list(MEASUREMENTS)}.items():
        table.add_row("", f"[bold]{group}[/bold]")
        for name in names:
            table.add_row(name, *SUBJECTS[name].listed())
    console.print(table)
    for what, names in (("dataset", data.NAMES), ("model", MODELS)):
        table = Table(f"--{what}", "description", box=None, pad_edge=False, header_style="bold")
        for name, text in names.items():
            table.add_row(name, text)
        console.print("", table)
    console.print(f"\nbisam train --method NAME, with NAME one of {', '.join(METHODS)}, or an expression of them")
    return 0
