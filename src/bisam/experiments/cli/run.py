"""`bisam run`: run a study or a measurement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from bisam.experiments.cli.folders import check_out
from bisam.experiments.cli.groups import LAUNCH
from bisam.experiments.cli.options import Given, Launch, MachineFlags, Out, StudyName
from bisam.experiments.runs.machine import Machine

EXAMPLES = (
    "bisam run digits",
    "bisam run digits --seeds 2 --epochs 5 --workers 1",
    "bisam run table1 --data-dir data --dry-run",
    "bisam run table1 --set epochs=1 --set limit=640",
    "bisam run digits --config RUN/recipe.json",
)


def run(
    study: StudyName,
    *,
    launch: Annotated[Launch, Parameter(name="*", group=LAUNCH)] = Launch(),  # noqa: B008
    machine: MachineFlags = Machine(),  # noqa: B008
    out: Out = Path("runs"),
    given: Given = frozenset(),
) -> int:
    """Run a study or a measurement: finished runs are kept, interrupted ones resume after their last completed epoch.

    Args:
        study: Name of the study or measurement, see `bisam list`.
    """
    from bisam.experiments.cli.subjects import subject

    check_out(out)
    chosen = subject(study)
    chosen.check(launch, machine, given)
    return chosen.plan(launch, machine, out) if launch.dry_run else chosen.run(launch, machine, out)
