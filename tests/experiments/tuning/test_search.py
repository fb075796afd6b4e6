"""A search: what is tried, pruned, resumed and refused. A formula stands for training, and threads for workers."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest

pytest.importorskip("cyclopts")
pytest.importorskip("optuna")

from bisam.experiments.errors import DataError, RunError
from bisam.experiments.launch.workers import Killed
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.tuning import launch
from bisam.experiments.tuning.database import DATABASE, opened
from bisam.experiments.tuning.search import Search, claimed, differences
from bisam.experiments.tuning.space import parse
from bisam.experiments.tuning.trials import WORST, ranked
from tests.support import searches
from tests.support.searches import Watch, searched

BASE = Recipe(method="sam", epochs=3)
RHO = parse(["rho=0.001:1:log"])


pytestmark = pytest.mark.usefixtures("trained")


def values(trials):
    return [(trial.number, trial.state, dict(trial.values), trial.scores) for trial in trials]


def test_the_score_is_the_mean_over_the_seeds_of_a_trial(tmp_path, trained):
    search = Search(replace(BASE, seed=3), RHO, pruner="none", seeds=2)
    trials = searched(search, tmp_path / "a", 3)
    assert [trial.number for trial in trials] == [0, 1, 2]
    assert trials[0].values == {"rho": 0.05}  # the recipe as it is given
    assert trained == [(trial.values["rho"], seed) for trial in trials for seed in (3, 4)]
    recipes = search.runs(trials[1].values)
    assert trials[1].scores == tuple(searches.score(recipe, 3) for recipe in recipes)
    assert trials[1].score == pytest.approx(sum(trials[1].scores) / 2)
    best = ranked(trials)[0]
    assert best.score == max(trial.score for trial in trials)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {DATABASE, "trials", ".lock"}
    assert (tmp_path / "a" / "trials" / recipes[0].slug / "seed-3" / "metrics.csv").exists()


def test_an_interrupted_search_ends_as_one_that_was_not(tmp_path):
    search = Search(replace(BASE, epochs=2), RHO)
    straight = searched(search, tmp_path / "a", 8)

    def stop(number):
        if number == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(search, tmp_path / "b", 8, Watch(stop))
    resumed = searched(search, tmp_path / "b", 8)
    assert values(resumed) == values(straight)
    assert any(trial.state == "pruned" for trial in resumed)
    assert searched(search, tmp_path / "b", 8, watch := Watch()) == resumed  # nothing is left
    assert watch.begun == []


def test_a_trial_that_was_interrupted_goes_on_in_its_folder(tmp_path, trained):
    search = Search(BASE, RHO, pruner="none")

    class Killer(Watch):
        def epoch(self, trial, seed, completed, validation):
            if (trial.number, completed) == (1, 2):
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(search, tmp_path / "a", 2, Killer())
    with claimed(tmp_path / "a"), opened(tmp_path / "a", search) as database:
        assert [trial.state for trial in database.trials()] == ["complete", "unfinished"]
    watch = Watch()
    trials = searched(search, tmp_path / "a", 2, watch)
    assert (watch.begun, [trial.state for trial in trials]) == ([1], ["complete", "complete"])


def test_a_lost_storage_is_made_again_from_the_same_trials(tmp_path):
    search = Search(BASE, RHO)
    before = searched(search, tmp_path / "a", 3)
    (tmp_path / "a" / DATABASE).unlink()
    assert values(searched(search, tmp_path / "a", 3)) == values(before)


def test_bad_trials_are_pruned_after_a_third_of_their_epochs_and_after_five_trials(tmp_path, trained):
    search = Search(replace(BASE, epochs=6), parse(["rho=0.05,0.07,0.1,0.14,0.2,0.001,0.101"]), sampler="grid", seeds=2)
    trials = searched(search, tmp_path / "a", 9)
    assert [trial.state for trial in trials] == ["complete"] * 5 + ["pruned", "complete"]
    assert list(trials[5].reported) == [1, 2]
    assert (0.001, 1) not in trained  # the second seed of the pruned trial
    assert len(trained) == 13


def test_a_trial_that_diverges_is_the_worst_and_is_said(tmp_path, trained):
    search = Search(BASE, parse(["rho=0.1,2"]), sampler="grid", seeds=2)
    good, bad = searched(search, tmp_path / "a", 9)
    assert (bad.state, bad.diverged, bad.score) == ("diverged", 2, WORST)
    assert trained == [(0.1, 0), (0.1, 1), (2.0, 0)]  # not another seed
    assert ranked([bad, good]) == [good]


def test_a_grid_tries_all_combinations_once(tmp_path, trained):
    search = Search(BASE, parse(["rho=0.05,0.1", "batch_size=32:96:32"]), sampler="grid", pruner="none")
    searched(search, tmp_path / "a", 4)
    trials = searched(search, tmp_path / "a", 50)
    tried = [(trial.values["rho"], trial.values["batch_size"]) for trial in trials]
    assert tried == [(rho, size) for rho in (0.05, 0.1) for size in (32, 64, 96)]
    assert len(trained) == 6


@pytest.mark.parametrize("workers", [1, 2])
def test_the_same_recipe_is_trained_once(tmp_path, trained, workers):
    search = Search(BASE, parse(["rho=0.05,0.1"]), sampler="random", pruner="none")
    trials = searched(search, tmp_path / "a", 6, workers=workers)
    assert len(trials) == 6
    assert sorted(trained) == [(0.05, 0), (0.1, 0)]
    for trial in trials:
        assert trial.scores == (searches.score(search.recipe(trial.values), 3),)
    assert sum(trial.repeats is None for trial in trials) == 2


def test_a_trial_that_fails_costs_the_others_nothing_and_is_tried_again(tmp_path, monkeypatch):
    search = Search(BASE, parse(["rho=0.05,0.1,0.2"]), sampler="grid")
    broken = [True]

    def fails(run, machine, on_epoch):
        if broken[0] and run.recipe.rho == 0.1:
            raise ValueError("no such\nthing")
        return searches.formula(run, machine, on_epoch)

    monkeypatch.setattr(launch, "validate", fails)
    trials = searched(search, tmp_path / "a", 3)
    assert [trial.state for trial in trials] == ["complete", "failed", "complete"]
    assert trials[1].error == "no such thing"
    broken[0] = False
    trials = searched(search, tmp_path / "a", 3, watch := Watch())
    assert ([trial.state for trial in trials], watch.begun) == (["complete"] * 3, [1])


def test_a_search_whose_trials_all_fail_stops(tmp_path, monkeypatch):
    def fails(run, machine, on_epoch):
        raise ValueError("broken")

    monkeypatch.setattr(launch, "validate", fails)
    trials = searched(Search(BASE, RHO), tmp_path / "a", 50)
    assert [trial.state for trial in trials] == ["failed"] * 3

    def lacks(run, machine, on_epoch):
        raise DataError("cifar10 is missing")

    monkeypatch.setattr(launch, "validate", lacks)
    with pytest.raises(ValueError, match="cifar10 is missing"):
        searched(Search(BASE, RHO), tmp_path / "b", 50)


@pytest.mark.parametrize(("deaths", "state"), [(1, "complete"), (2, "failed")])
def test_a_trial_whose_process_is_killed_is_resumed_once(tmp_path, monkeypatch, deaths, state):
    left = [-9] * deaths

    class Deadly(searches.Threads):
        def messages(self):
            for worker, message in super().messages():
                if worker.job.number == 1 and left:
                    self.workers.remove(worker)
                    message = Killed(left.pop())
                yield worker, message

    @contextmanager
    def deadly(serve, count):
        yield Deadly(serve, count)

    monkeypatch.setattr(launch, "open_pool", deadly)
    search = Search(BASE, parse(["rho=0.05,0.1"]), sampler="grid")
    trials = searched(search, tmp_path / "a", 2, watch := Watch())
    assert ([trial.state for trial in trials], watch.begun) == (["complete", state], [0, 1, 1])
    if state == "failed":
        assert trials[1].error.startswith("its process was killed 2 times, probably because memory is short")


def test_no_trial_begins_after_the_timeout(tmp_path):
    search = Search(BASE, RHO)
    assert searched(search, tmp_path / "a", 50, timeout=0.0) == []
    assert len(searched(search, tmp_path / "a", 2, timeout=1000.0)) == 2


def test_another_search_in_the_folder_is_refused_by_what_differs(tmp_path):
    search = Search(BASE, RHO)
    searched(search, tmp_path / "a", 1)
    others = {
        "--search rho is 0.001:1:log there and 0.001:2:log here": replace(search, space=parse(["rho=0.001:2:log"])),
        "--search mu is not searched there and 1,2 here": replace(
            search, base=replace(BASE, method="bisam_log"), space=parse(["rho=0.001:1:log", "mu=1,2"])
        ),
        "learning_rate is 0.1 there and 0.2 here": replace(search, base=replace(BASE, learning_rate=0.2)),
        "seeds_per_trial is 1 there and 2 here": replace(search, seeds=2),
        "sampler is tpe there and random here": replace(search, sampler="random"),
        "pruner is median there and none here": replace(search, pruner="none"),
    }
    for message, other in others.items():
        with pytest.raises(RunError, match="belongs to another search") as refused:
            searched(other, tmp_path / "a", 1)
        assert message in str(refused.value)


def test_a_folder_that_is_in_use_or_of_something_else_is_refused(tmp_path):
    search = Search(BASE, RHO)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.txt").write_text("")
    with pytest.raises(RunError, match="has files of something else"):
        searched(search, tmp_path / "b", 1)
    with claimed(tmp_path / "a"), pytest.raises(RunError, match="in use by another process"):
        searched(search, tmp_path / "a", 1)


def test_a_damaged_storage_is_one_line(tmp_path):
    search = Search(BASE, RHO)
    searched(search, tmp_path / "a", 1)
    (tmp_path / "a" / DATABASE).write_text("this is no database, and is long enough to be read as one" * 30)
    with pytest.raises(RunError, match=r"optuna.db cannot be used \(file is not a database\): .* move this file away"):
        searched(search, tmp_path / "a", 1)


def test_a_search_is_known_by_its_json_also_if_recipes_have_more_fields_since():
    here = Search(BASE, RHO).to_dict()
    there = json.loads(json.dumps(here))
    assert there == here
    del there["recipe"]["clip"]
    assert differences(here, there) == []
    there["recipe"]["clip"] = 1.0
    assert differences(here, there) == ["clip is 1.0 there and None here"]
