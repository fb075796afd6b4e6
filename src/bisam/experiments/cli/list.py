"""`bisam list`: the studies, measurements, data sets, models and methods.

It is printed from list.json beside this file, which `entries` gives and a test compares: making the recipes of all
studies takes seconds, and needs torch.
"""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from bisam.experiments.cli.completion import Entries, written
from bisam.experiments.cli.terminal import console

EXAMPLES = ("bisam list",)


def list_all() -> int:
    """List the studies and measurements, and the data sets, models and methods that `bisam train` takes."""
    found = written()
    table = Table("study", "title", "runs", "methods", box=None, pad_edge=False, header_style="bold")
    for group, rows in found["groups"].items():
        table.add_row("", Text(group, "bold"))
        for row in rows:
            table.add_row(*row)
    console.print(table)
    for what, names in (("dataset", found["datasets"]), ("model", found["models"])):
        table = Table(f"--{what}", "description", box=None, pad_edge=False, header_style="bold")
        for name, text in names.items():
            table.add_row(name, text)
        console.print("", table)
    console.print(
        f"\nbisam train --method NAME, with NAME one of {', '.join(found['methods'])}, or an expression of them"
    )
    return 0


def entries() -> Entries:
    """Return the content of list.json, from the studies, data sets, models and methods themselves."""
    from bisam.experiments import data
    from bisam.experiments.cli.subjects import SUBJECTS
    from bisam.experiments.measurements import MEASUREMENTS
    from bisam.experiments.models.build import NAMES as MODELS
    from bisam.experiments.recipes.catalogue import METHODS
    from bisam.experiments.studies import GROUPS

    groups = {group: [study.name for study in studies] for group, studies in GROUPS.items()}
    return {
        "groups": {
            group: [(name, *SUBJECTS[name].listed()) for name in names]
            for group, names in {**groups, "measurements": list(MEASUREMENTS)}.items()
        },
        "datasets": dict(data.NAMES),
        "models": dict(MODELS),
        "methods": list(METHODS),
    }
