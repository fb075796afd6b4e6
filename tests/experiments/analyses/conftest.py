"""A run that is trained once, of which each test gets a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch

from bisam.experiments.analyses.settings import Settings
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.train import train

RECIPE = Recipe(method="sam", noise=0.4, epochs=2, batch_size=32, limit=96, label_smoothing=0.1, ema=0.5)
MACHINE = Machine(log=())
FEW = Settings(examples=40, steps=3, batch_size=16)


@pytest.fixture(scope="session")
def _trained(tmp_path_factory) -> Run:
    torch.set_num_threads(1)
    run = Run.under(tmp_path_factory.mktemp("trained"), RECIPE)
    train(run, MACHINE)
    return run


@pytest.fixture
def copied(_trained, tmp_path) -> Callable[[str], Run]:
    """A function that copies the run to a new folder of the given name."""

    def copy(name: str) -> Run:
        run = Run.under(tmp_path / name, RECIPE)
        shutil.copytree(_trained.folder, run.folder)
        return run

    return copy


@pytest.fixture
def run(copied) -> Run:
    return copied("digits")
