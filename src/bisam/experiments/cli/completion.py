"""Completion: the names that the shell offers behind flags, from list.json, so that nothing is imported for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypedDict

FILE = Path(__file__).with_name("list.json")


class Entries(TypedDict):
    """The content of list.json, which `bisam list` prints."""

    groups: dict[str, list[tuple[str, str, str, str]]]
    """Studies and measurements by where they come from: name, title, runs, methods."""
    datasets: dict[str, str]
    models: dict[str, str]
    methods: list[str]


def written() -> Entries:
    """Return the content of list.json."""
    return json.loads(FILE.read_text(encoding="utf-8"))


def studies(_: Any) -> list[tuple[str, str]]:
    """Studies and measurements, with their titles."""
    return [(name, title) for rows in written()["groups"].values() for name, title, *_ in rows]


def datasets(_: Any) -> list[tuple[str, str]]:
    """Data sets, with their descriptions; those that stand for many are left to the user."""
    return [(name, text) for name, text in written()["datasets"].items() if name.islower()]


def models(_: Any) -> list[tuple[str, str]]:
    """Networks, with their descriptions; those that stand for many are left to the user."""
    return [(name, text) for name, text in written()["models"].items() if name.islower()]


def methods(_: Any) -> list[str]:
    """Methods of the catalogue."""
    return written()["methods"]
