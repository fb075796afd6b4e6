"""Files: text and tables that are written atomically and durably, and read with an error that names the remedy."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from textwrap import shorten
from typing import Any

from bisam.experiments.errors import DamagedError, RunError, reason


def write(path: Path, content: str | bytes, *, keep: Path | None = None, make_folder: bool = True) -> None:
    """Write a file atomically and durably: to a temporary file in the same folder, which is then renamed.

    The content is on the disk before the file has its name, and the name is when the function returns: neither the end
    of the process nor a power failure leaves a part of a file, or loses one that was written.

    Args:
        path: file to write.
        content: its whole content.
        keep: name that a file at `path` gets before it is replaced; a process that ends in between leaves no file at
            `path`, and both under other names.
        make_folder: create the folder if it does not exist.

    Raises:
        OSError: the disk is full or read-only; a file that was at `path` is unchanged.
    """
    if make_folder:
        make_folders(path.parent)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        if keep is not None:
            with suppress(FileNotFoundError):
                path.replace(keep)
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None:  # named for the file that was asked for
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    _sync_folder(path.parent)


def make_folders(folder: Path) -> None:
    """Create a folder and its parents durably; those that exist are unchanged."""
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in missing:
        _sync_folder(one.parent)


def _sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk, where the system can do that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows opens no folders
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that sync no folders
            raise
    finally:
        os.close(descriptor)


def checksum(values: Any) -> str:
    """Return a checksum of JSON values, which does not depend on the order of keys or on white space."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def to_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows with the same keys as CSV text."""
    out = io.StringIO()
    writer = csv.DictWriter(out, fieldnames=list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def read_bytes(path: Path) -> bytes | None:
    """Return the content of a file, or None if there is no file.

    Raises:
        RunError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:  # no damage: nothing is to be deleted
        raise RunError(f"{path} cannot be read ({reason(error)}): give yourself the permission to read it") from error
    except OSError as error:
        raise damaged(path, error) from error


def read_json(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file, whose numbers are all finite, or None if there is no file.

    Raises:
        RunError: the file is damaged or cannot be read.
    """
    if (content := read_bytes(path)) is None:
        return None
    try:
        values = json.loads(content.decode(), parse_constant=_finite, parse_float=_finite)
    except RecursionError as error:
        raise damaged(path, ValueError("it is nested too deeply")) from error
    except ValueError as error:
        raise damaged(path, error) from error
    if not isinstance(values, dict):
        raise damaged(path, ValueError("it is not an object"))
    return values


def _finite(text: str) -> float:
    if not isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def read_rows(path: Path, *, blanks: bool = False) -> list[dict[str, float]]:
    """Return the rows of a CSV file of numbers.

    Args:
        path: the file.
        blanks: whether a cell may be empty; its row has no entry for it.

    Raises:
        RunError: the file is missing, damaged or cannot be read.
    """
    try:
        if (content := read_bytes(path)) is None:
            raise ValueError("it is missing")
        rows = csv.DictReader(io.StringIO(content.decode(), newline=""), strict=True)
        return [{k: float(v) for k, v in row.items() if v or not blanks} for row in rows]
    except (ValueError, TypeError, csv.Error) as error:
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DamagedError:
    """Return the error for a damaged file of a run folder, with the reason and the remedy that loses least."""
    match path.name:
        case "recipe.json":
            remedy = f"{'delete this file, and ' if path.exists() else ''}the same command writes it again"
        case "result.json" | "metrics.csv" if path.with_name("checkpoint.pt").is_file():
            remedy = "delete result.json beside it" if path.name == "metrics.csv" else "delete this file"
            remedy = f"{remedy}, and the same command writes it again from the checkpoint"
        case "stats.csv":
            remedy = "delete this file; the run is not affected, but has no statistics of the epochs so far"
        case "analysis.json":
            remedy = "delete this file, and `bisam analyse` computes it again"
        case _:
            remedy = "delete its folder to run it again"
    return DamagedError(path, _reason(path, error), f"{remedy}; other runs are not affected")


def _reason(path: Path, error: Exception) -> str:
    """Return the message of an error on one line; of a long one its begin, and of an expression its end too."""
    text = " ".join(str(error).split())
    if path.name != "recipe.json" or isinstance(error, OSError):
        return shorten(reason(error), 100)
    return f"{text[:80]} [...] {text[-200:]}" if len(text) > 300 else reason(error)
