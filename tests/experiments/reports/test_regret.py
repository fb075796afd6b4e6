"""Regret: the optimum of a grid, regrets at multiples of it, and their comparison, against sums by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import figures, regret as regrets
from bisam.experiments.reports.groups import grouped
from bisam.experiments.reports.radii import lines, plain_lines
from bisam.experiments.runs.folder import Finished
from bisam.experiments.studies.study import Regret

BASE = Recipe(model="mlp", label_smoothing=0.1, epochs=3)
GRID = Regret("bisam_log", "sam", 2.0, (0.5, 1.4, 2.0))
RADII = (0.14, 0.2, 0.28, 0.4)


def run(method, rho, seed, score, noise=0.0, headline="last", **more):
    recipe = replace(BASE, method=method, rho=rho, noise=noise, seed=seed, **more)
    result = {"test_last": score, "test_best": 1 - score, "validation_best": 0.5, "headline": headline}
    return Finished(recipe, result, [{"epoch": 1, "validation": 0.5, "train_loss": 1.0}])


def grid(method, scores, seeds=(0, 1, 2), noise=0.0, radii=RADII):
    """Runs whose score is that of the radius plus a thousandth for each seed."""
    return [
        run(method, rho, seed, score + seed / 1000, noise)
        for rho, score in zip(radii, scores, strict=True)
        for seed in seeds
    ]


def test_the_optimum_has_the_largest_mean_and_a_tie_goes_to_the_smaller_radius():
    (line,) = lines(grouped(grid("sam", (0.6, 0.9, 0.9, 0.7))))
    assert (line.optimum, line.at_end, line.key) == (0.2, False, "sam")
    (line,) = lines(grouped(grid("sam", (0.6, 0.7, 0.8, 0.9))))
    assert (line.optimum, line.at_end) == (0.4, True)
    assert line.times(2, 0.2) == 0.4
    assert line.times(1.4, 0.2) == 0.28
    assert line.times(1.4, 0.28) == 0.4  # 0.392, which the grid has rounded
    assert line.times(2, 0.4) is None


def test_the_optimum_of_an_unfinished_grid_is_over_common_seeds():
    """Seed 9 is easy, and only one radius has it."""
    runs = [*grid("sam", (0.8, 0.9, 0.7, 0.6)), run("sam", 0.4, 9, 1.0), run("sam", 0.4, 10, 1.0)]
    (line,) = lines(grouped(runs))
    assert line.optimum == 0.2


def test_the_score_is_the_headline():
    runs = [run("sam", rho, 0, score, headline="best") for rho, score in zip(RADII, (0.6, 0.9, 0.8, 0.7), strict=True)]
    (line,) = lines(grouped(runs))
    assert line.optimum == 0.14
    assert line.scores(0.14) == {0: pytest.approx(40.0)}


def test_regrets_are_differences_of_the_same_seed():
    runs = grid("sam", (0.6, 0.9, 0.8, 0.5))
    found = {one.factor: one for one in regrets.costs(grouped(runs), GRID)}
    assert found.keys() == {1.4, 2.0}  # half of the optimum is not in the grid
    assert dict(found[2.0].regrets) == pytest.approx({0: 40.0, 1: 40.0, 2: 40.0})
    assert dict(found[1.4].regrets) == pytest.approx({0: 10.0, 1: 10.0, 2: 10.0})
    assert found[2.0].found


def test_optima_of_another_study_are_used_as_they_are():
    runs = [*grid("sam", (0.6, 0.9, 0.8, 0.5)), *grid("bisam_log", (0.6, 0.9, 0.8, 0.5))]
    given = replace(GRID, optima={("sam", 0.0): 0.14, ("bisam_log", 0.0): 0.2})
    found = {(one.line.key, one.factor): one for one in regrets.costs(grouped(runs), given)}
    assert (found["sam", 2.0].optimum, found["bisam_log", 2.0].optimum) == (0.14, 0.2)
    assert found["sam", 2.0].regrets[0] == pytest.approx(-20.0)
    assert not found["sam", 2.0].found


def measured(noises=(0.0, 0.4), n=8, random=0):
    """Runs at given optima, with noise of their own; the control's regret is the larger one."""
    draw, runs, expected = np.random.default_rng(random), [], {}
    for noise in noises:
        fall = {"sam": 0.2, "bisam_log": 0.2 - 0.5 * noise}
        scores = {method: draw.normal(0.9, 0.01, (n, 4)) for method in fall}
        for method, amount in fall.items():
            scores[method][:, 2:] -= amount
            runs += [
                run(method, rho, seed, scores[method][seed, i], noise)
                for i, rho in enumerate((0.1, 0.2, 0.28, 0.4))
                for seed in range(n)
            ]
        ours, theirs = (100 * (s[:, 1] - s[:, 3]) for s in (scores["bisam_log"], scores["sam"]))
        expected[noise] = ours - theirs
    optima = {(method, noise): 0.2 for method in ("sam", "bisam_log") for noise in noises}
    return runs, expected, replace(GRID, optima=optima)


def test_the_primary_comparison_is_a_paired_t_test_adjusted_over_the_noise_levels():
    runs, expected, spec = measured()
    compared = regrets.compare(regrets.costs(grouped(runs), spec), spec, range(8))
    primary = [one for one in compared if one.primary]
    assert [one.cost.line.place.noise for one in primary] == [0.0, 0.4]
    assert {one.cost.factor for one in primary} == {2.0}
    values = []
    for one in primary:
        sample = expected[one.cost.line.place.noise]
        test = stats.ttest_1samp(sample, 0.0)
        low, high = test.confidence_interval()
        got = one.difference
        assert (got.mean, got.low, got.high, got.p) == pytest.approx((sample.mean(), low, high, test.pvalue))
        values.append(test.pvalue)
    smallest, largest = sorted(values)
    holm = {smallest: min(1.0, 2 * smallest), largest: max(min(1.0, 2 * smallest), largest)}
    assert [one.adjusted for one in primary] == pytest.approx([holm[p] for p in values])
    others = [one for one in compared if not one.primary]
    assert {(one.cost.factor, one.family) for one in others} == {(0.5, 4), (1.4, 4)}


def test_seeds_that_were_not_registered_have_no_part_in_the_primary_comparison():
    runs, expected, spec = measured()
    compared = regrets.compare(regrets.costs(grouped(runs), spec), spec, range(5))
    for one in compared:
        sample = expected[one.cost.line.place.noise]
        assert one.difference.pairs == (5 if one.primary else 8)
        if one.primary:
            assert one.difference.mean == pytest.approx(sample[:5].mean())


def test_the_section_says_what_is_decided_and_what_not():
    runs, _, spec = measured()
    text = regrets.section(grouped(runs), spec, range(8))
    assert "BiSAM (-log) forgives more" in text
    assert "the difference is not decided" in text
    assert "| 40 % | 2 (primary) | BiSAM (-log) | SAM |" in text
    assert "has 8 of its 60 seeds, and nothing is decided" in regrets.section(grouped(runs), spec, range(60))


def test_a_grid_is_exploratory_and_names_optima_at_its_ends():
    runs = [*grid("sam", (0.6, 0.9, 0.8, 0.5)), *grid("bisam_log", (0.9, 0.8, 0.7, 0.6))]
    text = regrets.section(grouped(runs), GRID, range(3))
    assert "All comparisons on this page are exploratory." in text
    assert "The optimum is at an end of the grid for BiSAM (-log) (0 %)" in text
    assert "| 0.14 (at an end) |" in text


def test_the_rows_of_the_file_have_all_regrets_and_comparisons():
    runs, _, spec = measured()
    rows = regrets.rows(grouped(runs), spec, range(8))
    assert len(rows) == 12 + 6  # two methods, two levels of noise, three factors
    assert sum(row["primary"] for row in rows) == 2


def test_no_run_at_a_multiple_is_said():
    assert "No method has runs" in regrets.section(grouped([run("sam", 0.2, 0, 0.9)]), GRID, range(3))


def test_the_figure_has_a_column_for_each_level_and_plain_training_at_its_best_decay():
    runs = [one for noise in (0.0, 0.4) for one in grid("sam", (0.6, 0.9, 0.8, 0.5), noise=noise)]
    runs += [one for noise in (0.0, 0.4) for one in grid("asam", (0.6, 0.9, 0.8, 0.5), (0, 1), noise, (1.4, 2, 2.8, 4))]
    for decay, score in ((1e-3, 0.8), (2e-3, 0.85), (4e-3, 0.7)):
        runs += [run("sgd", None, seed, score, weight_decay=decay, epochs=6) for seed in range(3)]
    (line,) = plain_lines(grouped(runs))
    assert line.optimum == 2e-3
    figure = figures.draw("radii", runs)
    axes = [ax for ax in figure.axes if ax.lines]
    assert len(axes) == 4
    labels = {line.get_label() for line in axes[0].lines}
    assert {"SAM", "ASAM (rho / 10)", "SGD (weight decay 0.002)"} <= labels


def test_the_figure_marks_the_optimum_of_the_study():
    runs = grid("sam", (0.6, 0.9, 0.8, 0.5))
    (line,) = lines(grouped(runs))
    assert line.marked({("sam", 0.0): 0.14}) == 0.14
    assert line.marked({("sam", 0.4): 0.14}) == line.marked({}) == 0.2
    for regret, optimum in ((GRID, 0.2), (replace(GRID, optima={("sam", 0.0): 0.14}), 0.14)):
        ax = figures.draw("radii", runs, regret).axes[0]
        (large,) = (
            one
            for one in ax.lines
            if one.get_markersize() == 8 and one.get_markerfacecolor() != "white" and len(one.get_xdata())
        )
        assert list(large.get_xdata()) == [optimum]


def test_the_figure_needs_several_radii():
    with pytest.raises(ValueError, match="there is no run for radii"):
        figures.draw("radii", [run("sam", 0.2, 0, 0.9)])
