"""A search in this process: see `tests.support.searches`."""

from __future__ import annotations

import pytest


@pytest.fixture
def trained(monkeypatch):
    """Trains by a formula, and lists what was trained; workers are threads, and nothing waits for the disk."""
    pytest.importorskip("cyclopts")
    pytest.importorskip("optuna")
    from bisam.experiments.tuning import launch
    from tests.support import searches

    found = []
    monkeypatch.setattr(launch, "open_pool", searches.threads)
    monkeypatch.setattr(
        launch, "validate", lambda run, machine, on_epoch: searches.formula(run, machine, on_epoch, found)
    )
    with searches.without_waiting_for_the_disk(monkeypatch):
        yield found
