"""Shared fixtures: a seed for each test, one thread for each worker, and where the data is."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell has started pytest in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)  # else the commands that tests interrupt go on
DATA = Path(os.environ.pop("BISAM_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
"""The development data. Commands do not find it by themselves: on every machine a test sees what it gives."""


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def data() -> Path:
    """The development data, or skip."""
    if not DATA.is_dir():
        pytest.skip(f"no data at {DATA}: set BISAM_DATA")
    return DATA


@pytest.fixture
def bisam(monkeypatch, capsys):
    """The command in this process: (exit code, output, errors)."""

    cli = pytest.importorskip("bisam.experiments.cli")

    def call(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["bisam", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return stop.value.code, captured.out, captured.err

    return call
