"""Files: text and tables that are written atomically and read with an error that names the remedy."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bisam.experiments.errors import RunError


def write(path: Path, content: str | bytes) -> None:
    """Write a file atomically: to a temporary file in the same folder, which is then renamed.

    Raises:
        OSError: the disk is full or read-only; a file that was at `path` is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, or None if there is no file.

    Raises:
        RunError: the file is damaged.
    """
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(values, dict):
        raise damaged(path, ValueError("it is not an object"))
    return values


def read_rows(path: Path) -> list[dict[str, float]]:
    """Return the rows of a CSV file of numbers.

    Raises:
        RunError: the file is missing or damaged.
    """
    try:
        return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(io.StringIO(path.read_text()))]
    except (OSError, ValueError, TypeError) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> RunError:
    """Return the error for a damaged file of a run folder, with the reason and the remedy."""
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    return RunError(f"{path} is damaged ({reason}): delete {path.parent} to run it again; other runs are not affected")
