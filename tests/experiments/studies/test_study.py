"""Studies as wholes: what they run, and what they keep."""

from __future__ import annotations

import multiprocessing as mp
from dataclasses import replace

import pytest

from bisam.experiments import studies
from bisam.experiments.launch import processes
from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Run, finished
from bisam.experiments.runs.machine import Machine
from bisam.experiments.studies.study import expand
from bisam.experiments.training.train import train
from tests.support.doubles import Silent

SHORT = Recipe(method="bisam_log", noise=0.4, rho=0.4, epochs=3, batch_size=256)
SGD = replace(SHORT, method="sgd", rho=None)
NO_RHO = {method for method, entry in METHODS.items() if entry.rho is None}


def test_a_study_keeps_finished_runs_reports_failures_and_goes_on(tmp_path):
    recipes = [replace(recipe, epochs=1) for recipe in (SGD, replace(SHORT, method="sam"), SHORT)]
    done, damaged, fresh = (Run.under(tmp_path, recipe) for recipe in recipes)
    kept = train(done)
    damaged.folder.mkdir(parents=True)
    (damaged.folder / "checkpoint.pt").write_bytes(b"garbage")
    progress = Silent()
    outcomes = processes.run_all(recipes, tmp_path, workers=2, machine=Machine(), progress=progress)
    assert [outcome.recipe for outcome in outcomes] == recipes
    assert outcomes[0].result == kept
    assert "checkpoint.pt is damaged" in outcomes[1].error
    assert outcomes[2].result == fresh.result
    assert set(progress.ended) == set(recipes)
    assert (recipes[2], 1) in progress.epochs
    assert (recipes[0], 1) not in progress.epochs


@pytest.mark.slow
def test_a_killed_worker_costs_no_run(tmp_path):
    recipes = [replace(recipe, epochs=30, batch_size=64) for recipe in (SGD, replace(SHORT, method="sam"), SHORT)]

    class Killer(Silent):
        def epoch(self, recipe, epoch, validation):
            if not self.epochs:
                mp.active_children()[0].kill()
            super().epoch(recipe, epoch, validation)

    progress = Killer()
    outcomes = processes.run_all(recipes, tmp_path, workers=2, machine=Machine(), progress=progress)
    assert [(outcome.recipe, outcome.error) for outcome in outcomes] == [(recipe, None) for recipe in recipes]
    assert len(list(finished(tmp_path))) == 3


def test_the_digits_study_is_what_it_says():
    study = studies.STUDIES["digits"]
    recipes = study.recipes(None)
    assert study.seeds == 5
    assert {(r.method, r.noise) for r in recipes} == {
        (method, noise) for method in ("sgd", "sam", "bisam_log", "bisam_tanh", "asam") for noise in (0.0, 0.4)
    }
    assert len({r.epochs for r in recipes if r.method != "sgd"}) == 1
    assert all(r.epochs == 2 * recipes[1].epochs for r in recipes if r.method == "sgd")
    assert len(expand(recipes, 5)) == len(set(expand(recipes, 5))) == 50


def test_the_methods_study_runs_every_method():
    recipes = studies.STUDIES["methods"].recipes(None)
    assert {recipe.method for recipe in recipes} == set(METHODS) - {"sam_ce"}  # it is SAM where labels are not smoothed
    assert all(recipe.rho is not None for recipe in recipes if recipe.method not in NO_RHO)
    trials = studies.STUDIES["methods-rho"].recipes(None)
    assert all(any(same == recipe for same in trials) for recipe in recipes if recipe.method not in NO_RHO)
