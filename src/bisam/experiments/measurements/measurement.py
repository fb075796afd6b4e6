"""Measurement: a result that needs no training run, measured part by part and kept in a folder.

    folder = run(MEASUREMENTS["table12"], {"rounds": "51"}, Path("runs"))
    print(report(MEASUREMENTS["table12"], folder).markdown)

runs/table12-cpu-1f0c22e9/
    measurement.json  name, device and settings; the folder's name ends in a fingerprint of the changed settings
    100-eager.json    the rows of one part, written when it is measured: an interrupted measurement resumes after it
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from filelock import FileLock, Timeout

from bisam.experiments.errors import RunError, to_find, unknown
from bisam.experiments.markdown import aligned, link
from bisam.experiments.measurements.timing import LIMIT, Load, Ratio, bracketed, conditions, highest, verdict
from bisam.experiments.runs.environment import environment
from bisam.experiments.runs.files import checksum, read_json, write
from bisam.experiments.runs.machine import Machine
from bisam.experiments.runs.provenance import MEASURED, line, where
from bisam.experiments.studies.papers import Exhibit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Settings = Mapping[str, Any]
Number = TypeVar("Number", int, float)
Row = Mapping[str, Any]
MACHINE = "machine"
"""Key of the `Machine` in the settings that `measure` gets from a measurement that reads data sets."""
Progress = Callable[[str, int, int], None]
"""`(part, done, total)`, called before each part, and at the end with "" as the part."""


@dataclass(frozen=True)
class Measurement:
    """A measurement in independent parts."""

    name: str
    title: str
    note: str
    """How to read the table: Markdown."""
    settings: Settings
    """Settings and their defaults: numbers, words or tuples of these; whole numbers are at least 1, or 0 by default."""
    parts: Callable[[Settings], list[str]]
    """From settings to the names of the parts; raises ValueError if a setting is out of range."""
    measure: Callable[[str, Settings, torch.device], list[dict[str, Any]]]
    """From a part, settings and device to its rows: dicts with equal keys and JSON values. Keys that begin with `_` are
    for figures, such as images, and not in the CSV file of a report."""
    columns: Mapping[str, Callable[[Row], str]]
    """Columns of the table: from the heading to a function from a row to the cell."""
    figures: Mapping[str, tuple[str, Callable[[list[Row]], Figure]]] = field(default_factory=dict)
    """By file name: caption, and function that draws it."""
    answer: Callable[[list[Row]], str] | None = None
    """From all rows to the sentence that opens the report: what was seen, with n and the verdict on each bar. None, or
    no rows of a measurement with parts: the report says how many parts there are."""
    tabled: Callable[[list[Row]], list[Row]] | None = None
    """From all rows to those of the table. Default: all of them."""
    summary: str = ""
    """One line for a list of measurements, where it differs from the title."""
    exhibit: Exhibit | None = None
    """The table or figure of a paper that it reproduces."""
    reads_data: bool = False
    """Whether it reads data sets: then the settings that `measure` gets have the machine, with their folder, as the
    entry `MACHINE`."""
    timed: bool = False
    """Whether it measures times, which other programs change: its rows then have the entries `load` and `cores`."""

    @property
    def drawn_only(self) -> bool:
        """Whether nothing is measured: it has no parts, and its figures are drawn from formulas."""
        return not self.parts(self.settings)

    def changed(self, texts: Mapping[str, str]) -> dict[str, Any]:
        """The settings that `texts` change, parsed.

        Raises:
            ValueError: a name is unknown, or a value has the wrong type or is out of range.
        """
        for name, text in texts.items():
            if not self.settings:
                raise ValueError(f"{self.name} has no settings: leave --set {name}={text} out")
            if name not in self.settings:
                raise unknown(f"setting of {self.name}", name, self.settings)
        values = {name: parsed(name, text, self.settings[name]) for name, text in texts.items()}
        values = {name: value for name, value in values.items() if value != self.settings[name]}
        self.parts({**self.settings, **values})
        return values


@dataclass(frozen=True)
class Report:
    """The content of a folder for display: the table as text and as numbers, and figures by file name."""

    title: str
    header: tuple[str, ...]
    cells: list[tuple[str, ...]]
    rows: list[Row]
    markdown: str
    figures: dict[str, Figure]


def run(
    measurement: Measurement,
    changed: Mapping[str, str],
    root: Path,
    machine: Machine = Machine(),  # noqa: B008
    progress: Progress | None = None,
) -> Path:
    """Measure the missing parts, and return the folder.

    Args:
        measurement: one of `MEASUREMENTS`.
        changed: settings other than the defaults, as text.
        root: parent of the folder.
        machine: where to measure; one device only.
        progress: called for each part.

    Raises:
        ValueError: a setting or the device is wrong.
        RunError: the folder is in use, damaged, or belongs to another measurement.
        OSError: the disk is full or read-only.
    """
    environment()  # record the commit now: another one may be checked out by the end
    values = measurement.changed(changed)
    if machine.parallel:
        raise ValueError(f"{measurement.name} is measured on one device: leave --devices and --nodes at 1")
    device = machine.fabric().device
    settings = {**measurement.settings, **values}
    parts = measurement.parts(settings)
    if not parts:
        return root / measurement.name
    folder = root / _slug(measurement, values, device)
    with _held(folder):
        _claim(folder, measurement, settings, device)
        given = {**settings, MACHINE: machine} if measurement.reads_data else settings
        left = [part for part in parts if _read(folder, part) is None]
        for i, part in enumerate(left, len(parts) - len(left)):
            if progress is not None:
                progress(part, i, len(parts))
            rows = measurement.measure(part, given, device)
            content: dict[str, Any] = {"part": part, "environment": _environment(device, settings), "rows": rows}
            content["checksum"] = checksum(content)
            write(folder / _file(part), json.dumps(content, indent=2, allow_nan=False) + "\n")
    if progress is not None:
        progress("", len(parts), len(parts))
    return folder


def report(measurement: Measurement, place: Path, changed: Mapping[str, str] | None = None) -> Report:
    """The report of a measurement, from its files.

    Args:
        measurement: one of `MEASUREMENTS`.
        place: a folder that `run` returned, or its root: then the latest folder with the default settings, or else
            the latest one.
        changed: settings of the folder to report, if `place` is a root.

    Raises:
        ValueError: there is no such measurement.
        RunError: a file is damaged.
    """
    if measurement.drawn_only:
        folder, settings = place, {**measurement.settings, **measurement.changed(changed or {})}
    else:
        folder, settings = _found(measurement, place, changed)
    names = measurement.parts(settings)
    parts = [content for part in names if (content := _read(folder, part)) is not None]
    if names and not parts:
        raise ValueError(f"no part of {measurement.name} is measured in {folder}: run `bisam run {measurement.name}`")
    rows: list[Row] = [row for content in parts for row in content["rows"]]
    header = tuple(measurement.columns)
    try:
        tabled = rows if measurement.tabled is None else measurement.tabled(rows)
        cells = [tuple(cell(row) for cell in measurement.columns.values()) for row in tabled]
        figures = {file: draw(rows) for file, (_, draw) in measurement.figures.items()}
        places = _provenance(parts)
        answer = "" if (names and not rows) or measurement.answer is None else measurement.answer(rows)
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise RunError(
            f"{folder} holds rows that this version cannot read ({error!r}): delete it to measure again"
        ) from error
    missing = len(names) - len(parts)
    unfinished = f"**Unfinished.** Not measured yet: {missing} of {len(names)} parts." if missing else ""
    shown = [f"![{caption}]({file})" for file, (caption, _) in measurement.figures.items()]
    blocks = [
        f"# {measurement.title}",
        f"{unfinished} {answer or f'{len(parts)} parts are measured; nothing is tested.'}".strip(),
        *shown[:1],
        aligned(header, cells) if header else "",
        measurement.note,
        _OLDER if measurement.timed and not all("load" in row for row in rows) else "",
        *shown[1:],
        f"Settings: {', '.join(f'{name} {_shown(value)}' for name, value in settings.items())}." if settings else "",
        f"Files: {link('report.csv', 'report.csv')}." if rows else "",
        "\n".join(places),
    ]
    markdown = "\n\n".join(block for block in blocks if block) + "\n"
    numbers: list[Row] = [{key: value for key, value in row.items() if not key.startswith("_")} for row in rows]
    return Report(measurement.title, header, cells, numbers, markdown, figures)


def parsed(name: str, text: str, default: Any) -> Any:
    """A setting parsed to the type of its default."""
    if isinstance(default, tuple):
        items = [item.strip() for item in text.split(",")]
        if not all(items):
            raise ValueError(f"setting {name} is empty, or has an empty item: {text!r}")
        return tuple(dict.fromkeys(parsed(name, item, default[0]) for item in items))
    kind: type = type(default)
    try:
        value = kind(text)
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"setting {name} must be {what}, got {text!r}") from None
    if kind is int and value < (least := min(default, 1)):
        raise ValueError(f"setting {name} must be at least {least}, got {value}")
    return value


def values_for(name: str, entries: Sequence[str], known: Iterable[str], default: Number) -> dict[str, Number]:
    """The value of a setting for each key: the entry "128" is for all keys, "wrn28_10=8" for one.

    Args:
        name: of the setting, for messages.
        entries: its entries.
        known: the keys.
        default: the value without an entry for all keys; its type is that of the values.

    Raises:
        ValueError: an entry has another key, or no value.
    """
    keys, values = list(known), dict[str, Number]()
    for entry in entries:
        key, _, text = entry.rpartition("=")
        if key and key not in keys:
            raise unknown(f"key of setting {name}", key, keys)
        values[key] = parsed(name, text, default)
    return {key: values.get(key, values.get("", default)) for key in keys}


def _shown(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _slug(measurement: Measurement, changed: Settings, device: torch.device) -> str:
    # Only changed settings, so that adding a setting later changes no name.
    text = json.dumps(dict(changed), sort_keys=True)
    return f"{measurement.name}-{device.type}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _file(part: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.") + ".json"


@contextmanager
def _held(folder: Path) -> Generator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):  # the system drops it when a process is killed
            for leftover in folder.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            yield
    except Timeout:
        raise RunError(f"{folder} is in use by another process: let it finish, or give another --out") from None


def _claim(folder: Path, measurement: Measurement, settings: Settings, device: torch.device) -> None:
    path = folder / "measurement.json"
    if (found := read_json(path)) is None:
        identity = {"measurement": measurement.name, "device": device.type, "settings": settings}
        write(path, json.dumps(identity, indent=2) + "\n")
    elif found.get("measurement") != measurement.name or _settings(measurement, path, found) != settings:
        raise RunError(f"{folder} belongs to another measurement: move it away, or give another --out")


def _settings(measurement: Measurement, path: Path, identity: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that `_claim` wrote at `path`; settings added by later versions have their defaults."""
    given = identity.get("settings")
    if not isinstance(given, dict) or not all(
        name in measurement.settings and _alike(value, measurement.settings[name]) for name, value in given.items()
    ):
        raise RunError(f"{path} is damaged, or of a later version: delete {path.parent} to measure again")
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}
    return {**measurement.settings, **values}


def _alike(value: Any, default: Any) -> bool:
    """Whether a setting that was read has the type of its default."""
    if isinstance(default, tuple):
        return isinstance(value, list) and bool(value) and all(_alike(item, default[0]) for item in value)
    return type(value) is type(default) or (type(default) is float and type(value) is int)


def _read(folder: Path, part: str) -> dict[str, Any] | None:
    """The stored content of a part, or None."""
    path = folder / _file(part)
    try:
        content = read_json(path)
        if content is None:
            return None
        if content.get("part") != part:
            raise ValueError(f"it is not of {part}")
        if content.pop("checksum", None) not in (None, checksum(content)):  # 0.1 wrote none
            raise ValueError("its checksum differs")
        rows, made = content.get("rows"), content.get("environment")
        if not isinstance(made, dict) or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it has no rows, or not where they were made")
    except (RecursionError, ValueError, RunError) as error:
        reason = error.__cause__ or error
        raise RunError(f"{path} is damaged ({reason}): delete it to measure it again; other parts are kept") from error
    return content


def _found(measurement: Measurement, place: Path, changed: Mapping[str, str] | None) -> tuple[Path, dict[str, Any]]:
    """The folder to report from, and its settings."""
    wanted = {**measurement.settings, **measurement.changed(changed or {})}
    files = [place / "measurement.json", *sorted(place.glob(f"{measurement.name}-*/measurement.json"))]
    found: list[tuple[bool, float, Path, dict[str, Any]]] = []
    damaged: RunError | None = None
    for path in files:
        try:
            identity = read_json(path)
            if identity is None or identity.get("measurement") != measurement.name:
                continue
            settings = _settings(measurement, path, identity)
        except RunError as error:  # of one of several folders
            damaged = damaged or error
            continue
        if changed and settings != wanted:
            continue
        latest = max(file.stat().st_mtime for file in path.parent.glob("*.json"))
        found.append((settings == measurement.settings, latest, path.parent, settings))
    if not found and damaged is not None:
        raise damaged
    if not found:
        raise ValueError(
            f"no {measurement.name} is measured in {place}: "
            + to_find(f"bisam run {measurement.name}", measurement.name, place)
        )
    *_, folder, settings = max(found, key=lambda entry: entry[:2])
    return folder, settings


def _environment(device: torch.device, settings: Settings) -> dict[str, Any]:
    name = f"{device}, {torch.cuda.get_device_name(device)}" if device.type == "cuda" else str(device)
    made = {**environment(), "device": name, **conditions()}
    return made | {"threads": settings.get("threads", made["threads"])}


def _provenance(parts: Iterable[Mapping[str, Any]]) -> list[str]:
    """Provenance of the numbers: one line for each environment.

    Args:
        parts: content of their files.
    """
    places: dict[str, list[Mapping[str, Any]]] = {}
    for one in parts:
        places.setdefault(where(one["environment"], MEASURED), []).append(one)
    return [
        line(place, [str(one["environment"].get("date", "unknown")) for one in group], _loads(group))
        for place, group in places.items()
    ]


def _loads(parts: Sequence[Mapping[str, Any]]) -> str:
    """The load of other programs, or in older files that of the machine at the end of each part."""
    if seen := [Load(row["load"], row["cores"]) for one in parts for row in one["rows"] if "load" in row]:
        return f", {highest(seen)}"
    loads = sorted(float(load) for one in parts if (load := one["environment"].get("load")) is not None)
    return f", load {loads[0]:.1f} to {loads[-1]:.1f}" if loads else ""


READING = (
    "with its 95 % interval in brackets (of the sign test). The interval tells how exact this run is, not how other "
    "processes or machines differ. A bar is met if the whole interval meets it, missed if no part of it does, and else "
    f"undecided; if the load of other programs was above {LIMIT:g} per core, there is no verdict"
)
"""The explanation of a ratio in a table, after the word "median"."""
_OLDER = (
    "Measured by an earlier version, without the intervals and the load of other programs: in parentheses are the "
    "quartiles of the ratios, and a verdict is that of the median alone."
)


def flat(key: str, r: Ratio) -> dict[str, float | None]:
    """A ratio as entries of a row: the median, its quartiles, and the interval of the median."""
    quartiles = {f"{key}_low": r.low, f"{key}_high": r.high}
    return {key: r.median, **quartiles, f"{key}_median_low": r.median_low, f"{key}_median_high": r.median_high}


def verdicts(results: Sequence[str]) -> str:
    """How often each verdict was given, as words: "9 met, 1 undecided"."""
    counts = {one: results.count(one) for one in ("met", "missed", "undecided", "no verdict under load")}
    return ", ".join(f"{count} {one}" for one, count in counts.items() if count)


def with_load(load: Load) -> dict[str, float | None]:
    """The entries of a row for the load of other programs."""
    return {"load": load.highest, "cores": load.cores}


def with_interval(row: Row, key: str, digits: int = 3) -> str:
    """The cell of a ratio that `flat` stored in a row; a row of an earlier version has no interval, but quartiles."""
    if f"{key}_median_low" not in row:
        return f"{row[key]:.{digits}f} ({row[f'{key}_low']:.{digits}f} to {row[f'{key}_high']:.{digits}f})"
    return f"{row[key]:.{digits}f} {bracketed(*_interval(row, key), digits)}"


def met(row: Row, key: str, bar: float) -> str:
    """The verdict on a ratio that `flat` stored in a row: whether it is at most its bar; see `timing.verdict`."""
    if f"{key}_median_low" not in row:
        return "met" if row[key] <= bar else "missed"
    return verdict(*_interval(row, key), Load(row["load"], row["cores"]), bar)


def _interval(row: Row, key: str) -> tuple[float | None, float | None]:
    return row[f"{key}_median_low"], row[f"{key}_median_high"]
