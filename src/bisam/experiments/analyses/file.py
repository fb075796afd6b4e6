"""File: `analysis.json`, what was measured of the weights of a run.

    {"version": 1,
     "entries": [{"analysis": "sharpness", "version": 1,
                  "settings": {"split": "train", ..., "rho": 0.05, "steps": 20},
                  "of": "3f0c...",
                  "results": {"one": {"rise": 0.02, ...}, ...},
                  "seconds": 12.3, "device": "cpu", "bisam": ..., "torch": ..., "date": "2026-01-02T03:04:05Z"}],
     "checksum": "9a81..."}

An entry is used as long as it is of the same weights, which `of` identifies, and of the same version of its analysis.
Entries of analyses that this version of bisam does not know are kept. Numbers that are not finite are null.
"""

from __future__ import annotations

import json
import time
from calendar import timegm
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Required, TypedDict, cast

from bisam.experiments.analyses.catalogue import ANALYSES
from bisam.experiments.analyses.settings import FILE, SHARED, SPLITS, WEIGHTS, Settings
from bisam.experiments.errors import RunError
from bisam.experiments.runs.environment import environment
from bisam.experiments.runs.files import checksum, damaged, read_json

ANALYSIS = "analysis.json"
"""Name of the file."""

VERSION = 1
"""Version of the form of the file."""


class Entry(TypedDict, total=False):
    """The results of an analysis with one set of settings."""

    analysis: Required[str]
    version: Required[int]
    """The version of the analysis, see `Analysis.version`."""
    settings: Required[dict[str, Any]]
    of: Required[str]
    """Identifies the weights: a checksum of the run's result, or of the file of weights."""
    results: Required[dict[str, dict[str, Any]]]
    """As `to_dict` of each result gave it."""
    seconds: Required[float]
    device: Required[str]
    date: Required[str]
    """Time of the end in UTC, 2026-01-02T03:04:05Z."""
    bisam: str
    torch: str
    python: str
    hardware: str
    commit: str


def new_entry(
    name: str, settings: Mapping[str, Any], of: str, results: Mapping[str, Any], seconds: float, device: str
) -> Entry:
    """Return an entry that was computed here and now.

    Args:
        name: of the analysis.
        settings: on which it depends.
        of: identifies the weights.
        results: by name, as `to_dict` gave them.
        seconds: that it took.
        device: on which it was computed.
    """
    return cast(
        Entry,
        {
            "analysis": name,
            "version": ANALYSES[name].version,
            "settings": dict(settings),
            "of": of,
            "results": dict(results),
            "seconds": round(seconds, 3),
            "device": device,
            **environment(),
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        },
    )


def is_of(entry: Entry, of: str) -> bool:
    """Whether an entry is of these weights, and its results are what this version of bisam computes."""
    analysis = ANALYSES.get(entry["analysis"])
    if entry["of"] != of or analysis is None or analysis.version != entry["version"]:
        return False
    try:
        analysis.restored(entry["results"])
        analysis.numbers(entry["results"])
    except (AttributeError, LookupError, TypeError, ValueError):  # of another version
        return False
    return True


def content(entries: Iterable[Entry]) -> dict[str, Any]:
    """Return the content of the file."""
    values: dict[str, Any] = {"version": VERSION, "entries": list(entries)}
    return {**values, "checksum": checksum(values)}


def as_text(entries: Iterable[Entry]) -> str:
    """Return the content of the file as text."""
    return json.dumps(content(entries), indent=2, allow_nan=False) + "\n"


def read_entries(folder: Path) -> list[Entry]:
    """Return the entries in the file of a folder; none if there is no file.

    Raises:
        RunError: the file is damaged, or of a later version.
    """
    path = folder / ANALYSIS
    if (values := read_json(path)) is None:
        return []
    if isinstance(version := values.get("version"), int) and version > VERSION:
        raise RunError(
            f"{path} has version {version}, and this bisam knows version {VERSION}: use the one that wrote it"
        )
    try:
        fault = _fault(values)
    except RecursionError:  # of the checksum
        fault = "it is nested too deeply"
    if fault is not None:
        raise damaged(path, ValueError(fault))
    return cast("list[Entry]", values["entries"])


def _fault(values: Mapping[str, Any]) -> str | None:
    if values.get("checksum") != checksum({k: v for k, v in values.items() if k != "checksum"}):
        return "its checksum differs"
    entries = values.get("entries")
    if values.get("version") != VERSION or not isinstance(entries, list):
        return "it has no entries"
    for number, entry in enumerate(cast("list[Any]", entries), 1):
        if fault := _fault_of(entry):
            return f"entry {number} {fault}"
    return None


_KINDS: dict[str, type | tuple[type, ...]] = {
    "analysis": str,
    "version": int,
    "settings": dict,
    "of": str,
    "results": dict,
    "seconds": (int, float),
    "device": str,
    "date": str,
}


def _fault_of(entry: Any) -> str | None:
    if not isinstance(entry, dict):
        return "is no object"
    values = cast("dict[str, Any]", entry)
    if wrong := [name for name, kind in _KINDS.items() if not isinstance(values.get(name), kind)]:
        return f"has no {wrong[0]}"
    settings = cast("dict[str, Any]", values["settings"])
    if missing := [name for name in SHARED if name not in settings]:
        return f"has no setting {missing[0]}"
    if settings["split"] not in SPLITS or settings["weights"] not in (*WEIGHTS, FILE):
        return "has settings of another form"
    return None


def stem(entry: Entry) -> str:
    """Return the name of the figure of an entry, without suffix; other settings give another name."""
    values, defaults = entry["settings"], Settings()
    told = [f"{k}-{values[k]}" for k in SHARED if values[k] != getattr(defaults, k) and values[k] != FILE]
    own = [f"{k}-{v:g}" for k, v in values.items() if k not in SHARED and (k == "rho" or v != getattr(defaults, k))]
    return "-".join([entry["analysis"], *own, *told]).replace("_", "-")


def seconds_of(entry: Entry) -> float:
    """Return the time of an entry in seconds since 1970."""
    return float(timegm(time.strptime(entry["date"], "%Y-%m-%dT%H:%M:%SZ")))


def with_entry(entries: Sequence[Entry], entry: Entry) -> list[Entry]:
    """Return entries with a new one, in place of one of the same analysis and settings; those of other weights go."""

    def key(one: Entry) -> tuple[str, dict[str, Any]]:
        return one["analysis"], one["settings"]

    return [*(one for one in entries if one["of"] == entry["of"] and key(one) != key(entry)), entry]


def with_settings(entries: Iterable[Entry], name: str, settings: Mapping[str, Any]) -> Entry | None:
    """Return the entry of an analysis with these settings, or None."""
    own = dict(settings)
    return next((entry for entry in entries if entry["analysis"] == name and entry["settings"] == own), None)


def find(entries: Iterable[Entry], name: str, settings: Mapping[str, Any], of: str) -> Entry | None:
    """Return the entry of an analysis with these settings and of these weights, or None."""
    return with_settings((entry for entry in entries if is_of(entry, of)), name, settings)
