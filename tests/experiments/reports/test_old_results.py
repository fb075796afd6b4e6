"""Runs of earlier versions of the recipes in a report: which rows they are, and what they are compared with."""

from __future__ import annotations

from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from bisam.experiments.recipes import versions
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import figures, legends, tables
from bisam.experiments.reports.groups import arranged, grouped, names
from bisam.experiments.runs.folder import Finished

NOW = versions.VERSION
STUDY = [Recipe(method=method, noise=noise, epochs=2) for noise in (0.0, 0.4) for method in ("sgd", "sam", "bisam_log")]


def run(recipe: Recipe, score: float) -> Finished:
    rows = [{"epoch": epoch, "train_loss": 1.0, "flipped": 5.0, "validation": score} for epoch in (1, 2)]
    result = {
        **dict.fromkeys(("test_best", "test_last", "validation_best"), score),
        **dict.fromkeys(("seconds_per_epoch", "relative_time", "gradients_per_step", "forwards_per_step"), 1.0),
        "best_epoch": 1,
        "finished": "2026-01-02T03:04:05Z",
    }
    return Finished(recipe, result, rows)


def runs(*wanted: int) -> list[Finished]:
    """Two seeds of each recipe in each version; those of earlier ones are worse by 20 points."""
    recipes = [replace(recipe, seed=seed, version=one) for one in wanted for recipe in STUDY for seed in (0, 1)]
    return arranged(
        [run(r, 0.9 + 0.01 * r.seed - 0.2 * (r.version < NOW) + 0.02 * (r.method == "sam")) for r in recipes],
        STUDY,
        ("sam",),
    )


def test_old_rows_are_below_those_of_the_present_version_and_say_it():
    called = names(grouped(runs(2, NOW)))
    each = [f"{name} (version {one})" for one in (NOW, 2) for name in ("SAM", "SGD", "BiSAM (-log)")]
    assert list(called.values()) == 2 * each
    assert [recipe.noise for recipe in called] == [0.0] * 6 + [0.4] * 6


def test_a_row_is_compared_with_its_own_version_only():
    for row in tables.summary(runs(2, NOW)):
        if row["baseline"]:
            assert row["baseline"].partition("(version")[2] == row["name"].partition("(version")[2]
            assert row["difference_mean"] == pytest.approx(-0.02, abs=1e-12)


def test_the_page_says_which_rows_are_old_and_what_has_changed_since():
    why = versions.CHANGES[NOW].why
    text = tables.markdown("title", runs(2, NOW), {})
    said = next(block for block in text.split("\n\n") if block.startswith("**Old results:**"))
    assert text.index(said) < text.index("| method |")
    assert "12 of 24 runs have recipe version 2 (rows with that version in their name" in said
    assert said.endswith(f"not those of version {NOW}: since then {why}.")
    figures.draw("accuracy", runs(2, NOW))


def test_a_page_of_old_runs_alone_says_so_once():
    found = runs(2)
    assert legends.older(grouped(found)).startswith("**Old results:** 12 of 12 runs have recipe version 2 (all rows).")
    assert not any("version" in name for name in names(grouped(found)).values())


def test_a_page_of_the_present_version_says_nothing():
    assert legends.older(grouped(runs(NOW))) == ""
    assert "Old results" not in tables.markdown("title", runs(NOW), {})


def test_only_what_concerns_the_old_rows_is_told():
    """Version 2 changed ESAM alone."""
    esam, sam = (run(Recipe(method=method, version=1), 0.9) for method in ("esam", "sam"))
    both = legends.older(grouped([esam]))
    assert versions.CHANGES[2].why in both
    assert versions.CHANGES[3].why in both
    assert versions.CHANGES[2].why not in legends.older(grouped([sam]))
