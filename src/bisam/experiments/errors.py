"""Errors that the command line prints in one line, and their parts."""

from __future__ import annotations

import errno
import pickle
import re
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path
from textwrap import shorten


def unknown(kind: str, name: str, known: Iterable[str], see: str = "") -> ValueError:
    """Return the error for a name that is not in `known`, with the most similar ones: of a family its first members.

    Args:
        kind: what is named.
        name: what was given.
        known: the names that there are.
        see: a command that shows them, where they are too many for a message.
    """
    names, lower = list(dict.fromkeys(known)), name.lower()
    family = lower if see and len(lower) > 1 else f"{lower}_"
    near = [n for n in names if n.lower() == lower] or [n for n in names if n.lower().startswith(family)][:3]
    near = near or get_close_matches(name, names, 1) or get_close_matches(lower, names, 1)
    *others, last = map(repr, near or [""])
    meant = f", did you mean {', '.join(others)}{' or ' * bool(others)}{last}?" if near else ""
    if see:
        rest = f" Try {see}" if near else f": try {see}"
    else:
        rest = f"{' Available' if near else ', available'}: {', '.join(names)}"
    return ValueError(f"unknown {kind} {name!r}{meant}{rest}")


def to_find(command: str, name: str, out: Path) -> str:
    """Return what to do where no result of a study or measurement was found.

    Args:
        command: makes the results.
        name: of the study or measurement.
        out: where they were looked for.
    """
    if out.is_dir() and out.absolute().name == name:
        return f"--out is the folder that the folder {name} is in: give --out {out.parent}"
    missing = "" if out.exists() else f"; {out} does not exist"
    return f"run `{command}` first, or give the --out of its runs{missing}"


def reason(error: BaseException) -> str:
    """Return the message of an error on one line, in at most 300 characters."""
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__, 300)


def reason_not_loaded(error: Exception) -> str:
    """Return why `torch.load(weights_only=True)` failed, on one line.

    Torch's own message proposes `weights_only=False`, which would run code that is in the file.
    """
    if isinstance(error, pickle.UnpicklingError) or "weights_only" in str(error):
        return "it is damaged, or holds objects other than tensors, numbers, texts and containers of these"
    return reason(error)


_NO_MEMORY = (
    "can't allocate memory",  # torch's allocator for the CPU
    "not enough memory",  # the same on Windows
    "could not create a memory object",  # oneDNN
    "could not create a primitive",  # oneDNN, which does not tell its other reasons apart
    "out of memory",  # CUDA outside torch's allocator, MPS
    "ALLOC_FAILED",  # cuBLAS and cuDNN
    "std::bad_alloc",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means that the memory of the machine or of a device does not suffice."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if not isinstance(error, RuntimeError):
        return False
    import torch  # not at the top: each command imports this module before its flags are read

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)


_REMEDIES = {
    "Free space, or write elsewhere (--out or --to)": (errno.ENOSPC, errno.EDQUOT),
    "It cannot be written there: write elsewhere (--out or --to), or change the permissions": (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
    ),
    "Something else has its name: move it away, or write elsewhere (--out or --to)": (
        errno.EISDIR,
        errno.ENOTDIR,
        errno.EEXIST,
    ),
    "Raise the limit (ulimit -n), or use fewer --workers and --loaders": (errno.EMFILE, errno.ENFILE),
    "Give a shorter name": (errno.ENAMETOOLONG,),
    "The network or a remote disk does not answer: try again": (
        errno.ETIMEDOUT,
        errno.ECONNREFUSED,
        errno.EHOSTUNREACH,
    ),
}


def of_system(error: OSError) -> str:
    """Return what failed in an error of the operating system, on one line, and what can be done about it."""
    remedy = next((words for words, codes in _REMEDIES.items() if error.errno in codes), None)
    what = f"{error.filename}: " if error.filename else ""
    return f"{what}{reason(error).rstrip('.')}. {f'{remedy}; finished' if remedy else 'Finished'} runs are unchanged"


_DISTRIBUTIONS = {  # of packages that are imported by another name
    "PIL": "pillow",
    "curvlinops": "curvlinops-for-pytorch",
    "markdown_it": "markdown-it-py",
    "sklearn": "scikit-learn",
}


def missing_package(error: BaseException) -> str | None:
    """Return which package is not installed and how to install it, on one line; None for another error."""
    if isinstance(error, ImportError) and "pip install" in str(error):
        return reason(error)
    if not isinstance(error, ModuleNotFoundError) or error.name is None:
        return None
    package = error.name.partition(".")[0]
    if package == "bisam":
        return None
    name = _DISTRIBUTIONS.get(package, package).replace("_", "-").lower()
    try:
        found = [re.match(rf"{re.escape(name)}\b(?!-).*extra == ['\"](\w+)", one) for one in requires("bisam") or ()]
        extras = {match[1] for match in found if match} - {"dev"}
        extra = "experiments" if "experiments" in extras else min(extras, default=None)
    except PackageNotFoundError:  # bisam is used without being installed
        extra = None
    what = name if extra is None else f'"bisam[{extra}]"'
    return f"{package} is not installed: pip install {what}"


class DataError(ValueError):
    """A data set is missing, damaged or unknown; the message names the files to provide."""


class RunError(Exception):
    """A run folder cannot be used; the message says why and gives the remedy."""


class OutOfTimeError(RunError):
    """The time that the user gives the command is over; what was trained until then is saved."""


class InUseError(RunError):
    """Another process has the folder."""


class CopyError(RunError):
    """A run folder has the recipe and seed of another one, which is counted in its place."""


class DamagedError(RunError):
    """A file of a run folder is not as it was written.

    Args:
        path: the file.
        reason: why it cannot be used.
        remedy: what to do about it.
    """

    def __init__(self, path: Path, reason: str, remedy: str) -> None:
        super().__init__(path, reason, remedy)
        self.path, self.reason, self.remedy = path, reason, remedy

    def __str__(self) -> str:
        return f"{self.path} is damaged ({self.reason}): {self.remedy}"


class StoppedError(Exception):
    """The caller of a run has ended it after a completed epoch, which is saved; the message is the reason."""


class RunWarning(RuntimeWarning):
    """Something about a run that its user should know, and that does not stop it."""


def show_warnings_in_one_line() -> None:
    """Make this process print a `RunWarning` as the command line prints an error, without a place in the code."""
    warnings.formatwarning = _format_warning


_USUAL = warnings.formatwarning


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    if issubclass(category, RunWarning):
        return f"bisam: {' '.join(str(message).split())}\n"
    return _USUAL(message, category, filename, lineno, line)
