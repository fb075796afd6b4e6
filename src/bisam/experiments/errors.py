"""Errors that the command line prints in one line, and their parts."""

from __future__ import annotations

import errno
import pickle
import warnings
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from textwrap import shorten


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """Return the error for a name that is not in `known`, with the most similar one."""
    names = list(known)
    near = get_close_matches(name, names, 1) or [n for n in names if n.lower() == name.lower()]
    hint = f"did you mean {near[0]!r}? Available: " if near else "available: "
    return ValueError(f"unknown {kind} {name!r}, {hint}{', '.join(names)}")


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


class DataError(ValueError):
    """A data set is missing, damaged or unknown; the message names the files to provide."""


class RunError(Exception):
    """A run folder cannot be used; the message says why and gives the remedy."""


class InUseError(RunError):
    """Another process has the folder."""


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
