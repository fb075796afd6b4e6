"""Subjects: what `bisam run`, `report`, `plot` and `list` work on: studies and measurements, by name."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bisam.experiments.cli.measurement import MeasurementSubject
from bisam.experiments.cli.options import Launch
from bisam.experiments.cli.study import StudySubject
from bisam.experiments.errors import unknown
from bisam.experiments.measurements import MEASUREMENTS
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies import STUDIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Subject(Protocol):
    """The interface of studies and measurements to the commands."""

    @property
    def name(self) -> str:
        """Its name on the command line."""
        ...

    def listed(self) -> tuple[str, str, str]:
        """Title, number of runs or kind, and methods, for `bisam list`."""
        ...

    def check(self, launch: Launch, machine: Machine, given: frozenset[str]) -> None:
        """Refuse flags that have no effect, before anything runs."""
        ...

    def plan(self, launch: Launch, machine: Machine, out: Path) -> int:
        """Print what `run` would do; return the exit code."""
        ...

    def run(self, launch: Launch, machine: Machine, out: Path) -> int:
        """Run what is missing, and report; return the exit code."""
        ...

    def report(self, changes: tuple[str, ...], out: Path, to: Path | None) -> int:
        """Report from what is in `out`; return the exit code."""
        ...

    def archive(self, changes: tuple[str, ...], out: Path, to: Path) -> int:
        """Write what is finished in `out` to one file; return the exit code."""
        ...

    def figure(self, name: str | None, changes: tuple[str, ...], out: Path) -> Figure:
        """A figure by its name, by default the first one."""
        ...


SUBJECTS: dict[str, Subject] = {
    **{name: StudySubject(study) for name, study in STUDIES.items()},
    **{name: MeasurementSubject(measurement) for name, measurement in MEASUREMENTS.items()},
}
"""By name, in the order of `bisam list`."""


def subject(name: str) -> Subject:
    """A subject by its name.

    Raises:
        ValueError: the name is unknown.
    """
    if name not in SUBJECTS:
        raise unknown("study", name, SUBJECTS, "bisam list")
    return SUBJECTS[name]
