"""Predictors: levels, comparisons, their words and their figure, from runs whose numbers are known."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("matplotlib")

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.correlations import stronger
from bisam.experiments.reports.drawing import rendered
from bisam.experiments.reports.predictor_plot import predictors
from bisam.experiments.reports.predictors import Measured, compare, levels, rows, run_rows, section
from bisam.experiments.reports.significance import holm
from tests.experiments.reports.test_reports import run

RADII = (0.2, 0.4, 0.8)
CONFIGURATIONS = [
    *(Recipe(method=method, rho=rho, noise=0.4, epochs=3) for method in ("sam", "bisam_log") for rho in RADII),
    *(Recipe(method="sgd", learning_rate=rate, noise=0.4, epochs=6) for rate in (0.03, 0.1, 0.3)),
]


def measured(seeds: int = 4, noises=(0.0, 0.4), recipes=tuple(CONFIGURATIONS)) -> list[Measured]:
    """Runs whose error grows by configuration: "good" follows it, "bad" is random, and "flat" is constant."""
    random, found = np.random.default_rng(0), []
    for noise in noises:
        for seed in range(seeds):
            for i, recipe in enumerate(recipes):
                error = 0.01 * i + 0.002 * random.normal() + 0.1
                values = {"bad": random.normal(), "flat": 1.0, "good": 10 * error + 0.01 * random.normal()}
                one = replace(recipe, noise=noise, seed=200 + seed)
                found.append(Measured(run(one, 1.02 - error), values))
    return found


def test_levels_have_all_configurations_and_their_seeds_in_order():
    clean, noisy = levels(measured())
    assert (clean.title, noisy.title) == ("label noise 0 %", "label noise 40 %")
    assert list(noisy.recipes) == [replace(recipe, seed=0) for recipe in CONFIGURATIONS]
    assert noisy.methods == ["SAM"] * 3 + ["BiSAM (-log)"] * 3 + ["SGD"] * 3
    assert noisy.seeds == (200, 201, 202, 203)
    assert noisy.left_out == ()
    one = measured()[-1]
    assert noisy.error[-1, -1] == pytest.approx(1 - one.run.result["test_last"], abs=1e-12)
    assert noisy.measures["good"][-1, -1] == one.values["good"]
    assert list(noisy.measures) == ["bad", "flat", "good"]


def test_what_is_not_complete_is_left_out_with_the_reason():
    runs = measured(noises=(0.4,))
    last = runs.pop()  # of the last seed
    diverged = replace(runs[0].run.recipe, seed=201)
    for i, one in enumerate(runs):
        if one.run.recipe == diverged:
            runs[i] = replace(one, run=run(diverged, diverged=2))
        if one.run.recipe == replace(CONFIGURATIONS[4], seed=202):
            runs[i] = replace(one, values={**one.values, "good": math.inf})
        if one.run.recipe == replace(CONFIGURATIONS[5], seed=202):
            runs[i] = replace(one, values={key: value for key, value in one.values.items() if key != "bad"})
    (level,) = levels(runs)
    assert level.seeds == (200, 201, 202)
    assert [CONFIGURATIONS.index(recipe) for recipe in level.recipes] == [1, 2, 3, 6, 7, 8]
    assert level.left_out == (
        "SAM (rho 0.2) (diverged with seed 201)",
        "BiSAM (-log) (rho 0.4) (no good with seed 202)",
        "BiSAM (-log) (rho 0.8) (no bad with seed 202)",
        "seed 203 (not all of its runs are finished)",
    )
    assert "Left out: SAM (rho 0.2) (diverged with seed 201); " in section(compare([level], "good", "bad"))
    assert last.run.recipe.seed == 203
    assert levels([]) == levels([runs[0], runs[len(CONFIGURATIONS) + 1]]) == []  # no seed has both configurations


def test_comparisons_are_the_primary_ones_first_with_two_families():
    found = compare(levels(measured()), primary="good", control="bad")
    assert [(one.level.title, one.measure, one.primary, one.control) for one in found] == [
        (level, measure, measure == "good", measure == "bad")
        for level in ("label noise 0 %", "label noise 40 %")
        for measure in ("good", "bad", "flat")
    ]
    for primary in (True, False):
        family = [one for one in found if one.primary == primary]
        expected = holm([one.found.p for one in family])
        assert [one.adjusted for one in family] == pytest.approx(expected, nan_ok=True)
    good, bad, flat = found[:3]
    assert good.decided
    assert good.predicts
    assert good.stronger == stronger(good.found.each, bad.found.each)
    assert not bad.decided
    assert math.isnan(bad.stronger.mean)
    assert not flat.decided
    assert math.isnan(flat.adjusted)


def test_the_words_follow_from_the_numbers():
    text = section(compare(levels(measured()), primary="good", control="bad"))
    table = [line for line in text.splitlines() if line.startswith("| label")]
    assert [line.split(" | ")[1] for line in table] == ["good (primary)", "bad (control)", "flat"] * 2
    assert table[0].endswith("| 4 × 9 |")
    assert table[2] == "| label noise 0 % | flat | – | – | – | – | – | – | 0 × 9 |"
    assert "nan" not in text
    assert "The registered comparison, good: label noise 0 %: +" in text
    assert "(decided: the larger it is, the larger the test error)" in text
    assert "adjusted together: none of 4 is decided. Undecided: label noise 0 %: bad, flat; label noise 40 %: b" in text
    listed = r"criteria: label noise 0 %: good \(\+[\d.]+\); label noise 40 %: good \(\+[\d.]+\)\."
    assert re.search(listed, text)
    assert re.search(r"good: label noise 0 %: \+[\d.]+ \[\+[\d.]+, \+[\d.]+\], p \\< 0.001, adjusted p \\< 0.0", text)
    random = section(compare(levels(measured()), primary="bad", control="flat"))
    assert random.count("(undecided)") == 2
    assert "adjusted together: 2 of 4 are decided (label noise 0 %: good (+" in random
    assert "Undecided: label noise 0 %: flat; label noise 40 %: flat." in random
    assert ", p = 0." in random
    assert "No measure predicts the test error by all three criteria" in random  # a constant control cannot be beaten


def test_the_words_say_where_methods_alone_differ():
    """Within each method the order of the measure is reversed."""
    runs = measured()
    for i, one in enumerate(runs):
        k = i % len(CONFIGURATIONS)
        runs[i] = replace(one, values={"good": 10.0 * (k // 3) - k % 3, "bad": one.values["bad"]})
    found = compare(levels(runs), primary="good", control="bad")
    assert all(one.decided and not one.predicts for one in found if one.primary)
    text = section(found)
    where = "label noise 0 %: good; label noise 40 %: good"
    assert f"Decided correlations that have the opposite sign within methods: {where}." in text
    assert "No measure predicts the test error" in text


def test_one_level_has_no_column_of_its_own():
    text = section(compare(levels(measured(noises=(0.4,))), primary="good", control="bad"))
    assert "label noise" not in text
    assert "| good (primary) | +" in text
    assert "The registered comparison, good: +" in text


def test_with_fewer_seeds_than_were_fixed_nothing_is_decided():
    found = compare(levels(measured()), primary="good", control="bad")
    seeds = len(found[0].level.seeds)
    whole, interim = section(found, seeds=seeds), section(found, seeds=seeds + 1)
    assert "Interim" not in whole
    assert "The registered comparison" in whole
    assert f"*Interim*: {seeds} of the {seeds + 1} seeds that were fixed before the first run." in interim
    assert "The registered comparison" not in interim
    assert "predicts" not in interim


def test_one_seed_has_no_interval_and_nothing_is_said_to_predict():
    text = section(compare(levels(measured(seeds=1)), primary="good", control="bad"))
    assert "[+" not in text
    assert "nan" not in text
    assert "No measure predicts" in text
    assert "so there is nothing to correlate" in section([])


def test_rows_hold_the_numbers():
    runs = measured()
    found = compare(levels(runs), primary="good", control="bad")
    table = rows(found)
    assert [(row["noise"], row["measure"], row["kind"]) for row in table[:3]] == [
        (0.0, "good", "primary"),
        (0.0, "bad", "control"),
        (0.0, "flat", "exploratory"),
    ]
    assert table[0]["spearman_low"] == found[0].found.spearman.low
    assert (table[0]["seeds"], table[0]["configurations"]) == (4, 9)
    each = run_rows(runs)
    assert len(each) == len(runs)
    assert each[0]["good"] == runs[0].values["good"]
    assert each[0]["configuration"] == "SAM (rho 0.2)"
    assert each[0]["test_error"] == pytest.approx(1 - runs[0].run.result["test_last"])


def test_the_figure_shows_each_run_and_each_mean():
    found = compare(levels(measured()), primary="good", control="bad")
    figure = predictors(found, ("good", "none", "bad"))
    assert len(figure.axes) == 4  # a measure that nobody took is left out
    assert figure.axes[0].get_title().startswith("good\n+")
    points = [line for line in figure.axes[0].get_lines() if line.get_marker() == "."]
    assert sum(len(line.get_xdata()) for line in points) == 4 * 9
    means = [line for line in figure.axes[0].get_lines() if line.get_marker() != "."]
    assert [line.get_label() for line in means] == ["SAM", "BiSAM (-log)", "SGD"]
    level = found[0].level
    assert means[0].get_xdata() == pytest.approx(level.measures["good"][:, :3].mean(0))
    assert means[0].get_ydata() == pytest.approx(100 * level.error[:, :3].mean(0))
    assert figure.get_size_inches()[0] == pytest.approx(6.9)
    assert rendered(figure).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="there are none"):
        predictors(found, ("none",))
