"""A measurement as a subject of `bisam run`, `report`, `plot` and `list`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.measure import Measurement as Width
from rich.table import Table
from rich.text import Text

from bisam.experiments.cli.options import Launch, flag
from bisam.experiments.cli.report_files import write_report
from bisam.experiments.cli.terminal import console, errors
from bisam.experiments.measurements import Measurement, report as report_of, run as measure
from bisam.experiments.measurements.timing import Load
from bisam.experiments.recipes.changes import pairs
from bisam.experiments.runs.files import to_csv
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.signals import exit_code, ignore_further, past_tense

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CHANGE = "rounds=5"
_DRAWN = frozenset({"set", "out", "dry_run", "estimate"})
_MEASURED = _DRAWN | {"device", "devices", "nodes"}
_DATA = frozenset({"data_dir", "download"})


@dataclass(frozen=True)
class MeasurementSubject:
    """A measurement on the command line."""

    measurement: Measurement

    @property
    def name(self) -> str:
        """The measurement's name."""
        return self.measurement.name

    def listed(self) -> tuple[str, str, str]:
        """Title, kind and methods, for `bisam list`."""
        one = self.measurement
        return one.summary or one.title, "a drawing" if one.drawn_only else "a measurement", ""

    def check(self, launch: Launch, machine: Machine, given: frozenset[str]) -> None:
        """Say which flags have no effect on this measurement, so that one command line fits all studies.

        Raises:
            ValueError: a change of a setting is wrong.
        """
        self.measurement.changed(pairs(launch.changes, _CHANGE))
        one = self.measurement
        does = "is drawn from formulas" if one.drawn_only else "trains nothing"
        takes = _DRAWN if one.drawn_only else _MEASURED | _DATA if one.reads_data else _MEASURED
        if idle := sorted(given - takes):
            errors.print(f"bisam: {self.name} {does}: without effect are {', '.join(map(flag, idle))}")

    def plan(self, launch: Launch, machine: Machine, out: Path) -> int:
        """Print the parts that `run` would measure."""
        one = self.measurement
        parts = one.parts({**one.settings, **one.changed(pairs(launch.changes, _CHANGE))})
        console.print(
            f"{self.name} has {len(parts)} parts: {', '.join(parts)}" if parts else f"{self.name} has no parts"
        )
        return 0

    def run(self, launch: Launch, machine: Machine, out: Path) -> int:
        """Measure the parts that are missing, and report."""
        if self.measurement.timed and (warning := Load.now().warning):
            errors.print(f"bisam: {warning}")
        with console.status("") as status:

            def tell(part: str, done: int, total: int) -> None:
                status.update(f"{self.name}: {part} ({done} of {total} parts are measured)")
                if part and not console.is_terminal:
                    console.print(f"{done}/{total} parts: {part}", soft_wrap=True)

            try:
                folder = measure(self.measurement, pairs(launch.changes, _CHANGE), out, machine, tell)
            except KeyboardInterrupt as error:
                ignore_further()
                errors.print(f"{past_tense(error)}: measured parts are kept; the same command measures the others")
                return exit_code(error)
        return self._report(folder, folder, {})

    def report(self, changes: tuple[str, ...], out: Path, to: Path | None) -> int:
        """Print the table, and write the report."""
        return self._report(out, to or out / self.name, pairs(changes, _CHANGE))

    def archive(self, changes: tuple[str, ...], out: Path, to: Path) -> int:
        """Refuse: there is nothing to leave out.

        Raises:
            ValueError: always.
        """
        raise ValueError(f"{self.name} trains nothing: its folder has no checkpoints, and can be kept as it is")

    def figure(self, name: str | None, changes: tuple[str, ...], out: Path) -> Figure:
        """Its figure.

        Raises:
            ValueError: it has none, or none of that name.
        """
        if name is not None:
            raise ValueError(f"{self.name} trains nothing and has no figure {name}: bisam report {self.name}")
        drawings = report_of(self.measurement, out, pairs(changes, _CHANGE)).figures
        if not drawings:
            raise ValueError(f"{self.name} has no figure: bisam report {self.name} shows its table")
        return next(iter(drawings.values()))

    def _report(self, place: Path, to: Path, changed: dict[str, str]) -> int:
        found = report_of(self.measurement, place, changed)
        if found.header:
            table = Table(*found.header, title=found.title)
            for row in found.cells:
                table.add_row(*(Text(cell.replace("**", "")) for cell in row))
            # At its own width: cells that are cut or folded letter by letter would be of no use.
            width = Width.get(console, console.options.update(max_width=1000), table).maximum
            Console(width=max(width, console.width)).print(table)
        write_report(to, found.markdown, {"report.csv": to_csv(found.rows) if found.rows else ""}, found.figures)
        return 0
