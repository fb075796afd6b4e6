"""Settings that a study of tuning has chosen, and what stands in their place before."""

from __future__ import annotations

import pytest

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.tuned import Settings, with_setting

BEFORE = {("sam", 0.0): 0.1, ("sam", 0.4): 0.2, ("asam", 0.0): 1.0, ("asam", 0.4): 2.0}


def test_a_chosen_setting_replaces_the_one_before():
    settings = Settings("trials", BEFORE, "guesses", {("sam", 0.4): 0.8})
    assert (settings["sam", 0.4], settings["sam", 0.0], settings["asam", 0.4]) == (0.8, 0.1, 2.0)


def test_the_note_says_what_is_not_chosen_yet():
    assert Settings("trials", BEFORE, "guesses").note() == (
        " **Not tuned yet**: all methods. Until `bisam run trials` is finished, these settings are guesses."
    )
    some = Settings("trials", BEFORE, "guesses", {("sam", 0.0): 0.2, ("asam", 0.0): 4.0, ("sam", 0.4): 0.8})
    assert "**Not tuned yet**: asam (0.4)." in some.note()
    assert Settings("trials", BEFORE, "guesses", BEFORE).note() == ""


def test_a_setting_that_no_recipe_has_is_refused():
    with pytest.raises(ValueError, match=r"settings of trials that no recipe has: \[\('sam', 0.3\)\]"):
        Settings("trials", BEFORE, "guesses", {("sam", 0.3): 0.2})


def test_a_setting_is_a_radius_or_the_weight_decay_of_a_method_without_one():
    assert with_setting(Recipe(), "asam", 2.0) == Recipe(method="asam", rho=2.0)
    assert with_setting(Recipe(), "sgd", 0.01) == Recipe(method="sgd", weight_decay=0.01)
    assert with_setting(Recipe(), "mesa", 0.01) == Recipe(method="mesa", weight_decay=0.01)
