"""Environment: versions, hardware and commit, which are written into each result."""

from __future__ import annotations

import os
import platform
import subprocess
from functools import cache
from pathlib import Path

import torch

from bisam import __version__


@cache
def environment() -> dict[str, str]:
    """Return the versions, the hardware and the commit of this process; the commit is looked up once."""
    return {
        "bisam": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "hardware": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "commit": commit(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def commit() -> str:
    """Return the commit of this package, or "unknown" if it is not in its own repository."""
    package = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        if package != Path(git("rev-parse", "--show-toplevel")).resolve() / "src" / "bisam":
            return "unknown"  # installed somewhere inside another project's repository
        return git("describe", "--always", "--dirty", "--abbrev=12")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
