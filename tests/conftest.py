"""Shared fixtures: a seed for each test, one thread for each worker, and where the data is."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def data() -> Path:
    """The development data, or skip."""
    folder = Path(os.environ.get("BISAM_DATA", Path(__file__).parent.parent.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data at {folder}: set BISAM_DATA")
    return folder


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
