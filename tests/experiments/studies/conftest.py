"""Fixtures of the tests of studies."""

from __future__ import annotations

import pytest

from bisam.experiments.launch import processes
from bisam.experiments.launch.outcomes import Outcome
from bisam.experiments.runs.folder import Run
from bisam.experiments.training.train import train


@pytest.fixture
def here(monkeypatch):
    """Runs of a study one after the other in this process."""

    def run_all(recipes, root, workers, machine, progress, analyses=None, stack=None):
        outcomes = []
        for recipe in recipes:
            outcomes.append(Outcome(recipe, train(Run.under(root, recipe), machine)))
            progress.done(recipe, None)
        return outcomes

    monkeypatch.setattr(processes, "run_all", run_all)
