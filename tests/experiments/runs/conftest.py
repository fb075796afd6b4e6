"""A run that was interrupted after its second epoch, and the same run without the interruption."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train

RECIPE = Recipe(method="LookSAM(0.4, k=3)", noise=0.4, epochs=3, batch_size=32, limit=96)
MACHINE = Machine(log=())


@pytest.fixture(scope="session")
def _trained(tmp_path_factory) -> tuple[Run, Run]:
    torch.set_num_threads(1)
    whole, broken = (Run.under(tmp_path_factory.mktemp(name), RECIPE) for name in ("whole", "broken"))
    train(whole, MACHINE)

    def interrupt(row):
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(broken, MACHINE, interrupt)
    return whole, broken


@pytest.fixture
def whole(_trained) -> Run:
    """Not to be changed."""
    return _trained[0]


@pytest.fixture
def copied(_trained, tmp_path) -> Callable[[str], Run]:
    """A function that copies the interrupted run to a new folder of the given name."""

    def copy(name: str) -> Run:
        run = Run.under(tmp_path / name, RECIPE)
        shutil.copytree(_trained[1].folder, run.folder)
        return run

    return copy


@pytest.fixture
def broken(copied) -> Run:
    return copied("broken")


@pytest.fixture
def done(_trained, tmp_path) -> Run:
    """A copy of the finished run."""
    run = Run.under(tmp_path / "done", RECIPE)
    shutil.copytree(_trained[0].folder, run.folder)
    return run


def flipped(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)
