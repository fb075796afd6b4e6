"""The report of the ascents: comparisons on the same networks, what is registered, tables and the figure."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from scipy.stats import ttest_rel

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import ascents, figures
from bisam.experiments.reports.significance import holm
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.results import ASCENTS, BY_ASCENT, QUANTITIES
from bisam.experiments.studies import STUDIES
from bisam.experiments.studies.study import Primary

SMOOTHED = Recipe(method="sam", epochs=4, label_smoothing=0.1, measured_epochs=2, measured="ascents")
PLAIN = replace(SMOOTHED, label_smoothing=0.0)
LEVELS = {"cross_entropy": 0.1, "smoothed": 0.2, "tanh": 0.1, "log": 0.11, "log_5": 0.16}
NOISE = (0.0, 0.004, -0.003, 0.001, 0.006)


def value(quantity: str, ascent: str, seed: int) -> float:
    """A share for each seed; the differences between ascents vary with the seed, except tanh's, which is 0."""
    wobble = 0.0 if ascent == "tanh" else NOISE[(seed + ASCENTS.index(ascent)) % 5]
    base = NOISE[(seed + ASCENTS.index("cross_entropy")) % 5]
    return LEVELS[ascent] + (base if ascent == "tanh" else wobble) + (0.3 if quantity == "worst" else 0.0)


def network(recipe: Recipe, seed: int) -> Finished:
    """A run that has measured after epochs 2 and 4; half of its examples are wrong at first, and none at last."""
    rows = []
    for epoch in range(1, 5):
        row = {"epoch": float(epoch), **dict.fromkeys(BY_ASCENT, math.nan)}
        if epoch % 2 == 0:
            row["ascents_error"] = 0.5 if epoch == 2 else 0.0
            for quantity in QUANTITIES:
                for ascent in ASCENTS:
                    row[f"{quantity}_by_{ascent}"] = value(quantity, ascent, seed) / (1 if epoch == 4 else 2)
        rows.append(row)
    return Finished(replace(recipe, seed=seed), {"test_best": 0.5, "diverged": None}, rows)


RUNS = [network(recipe, seed) for recipe in (SMOOTHED, PLAIN) for seed in range(5)]
REGISTERED = Primary("words", where={"label_smoothing": 0.1}, seeds=range(5))


def test_the_comparisons_are_paired_t_tests_of_the_last_mark_on_the_same_networks():
    found = ascents.compared(RUNS)
    assert [(one.recipe, one.quantity, one.ascent) for one in found] == [
        (recipe, quantity, ascent)
        for recipe in (SMOOTHED, PLAIN)
        for quantity in ("flips", "worst")
        for ascent in ASCENTS[1:]
    ]
    for one in found:
        pairs = [[value(one.quantity, a, seed) for seed in range(5)] for a in (one.ascent, "cross_entropy")]
        assert one.difference.mean == pytest.approx(sum(pairs[0]) / 5 - sum(pairs[1]) / 5)
        if one.ascent != "tanh":
            expected = ttest_rel(*pairs)
            assert one.difference.p == pytest.approx(expected.pvalue)
            low, high = expected.confidence_interval()
            assert (one.difference.low, one.difference.high) == pytest.approx((low, high))
        else:  # equal in all networks: no test, but counted
            assert math.isnan(one.difference.p)
            assert math.isnan(one.adjusted)
        assert one.family == 8
    flips = [one for one in found if one.quantity == "flips"]
    counted = holm([1.0 if one.ascent == "tanh" else one.difference.p for one in flips])
    for one, adjusted in zip(flips, counted, strict=True):
        assert one.ascent == "tanh" or one.adjusted == adjusted


def test_the_registered_comparison_is_a_family_of_its_own_with_its_own_seeds():
    more = [*RUNS, network(SMOOTHED, 9)]
    (one,) = [one for one in ascents.compared(more, REGISTERED) if one.primary]
    assert (one.recipe, one.quantity, one.ascent, one.family) == (SMOOTHED, "flips", "log", 1)
    assert one.difference.pairs == 5  # seed 9 was not registered
    assert one.adjusted == one.difference.p
    others = [other for other in ascents.compared(more, REGISTERED) if not other.primary]
    assert {other.family for other in others if other.quantity == "flips"} == {7}
    assert {other.family for other in others if other.quantity == "worst"} == {8}
    assert not any(one.primary for one in ascents.compared(more))


def test_with_fewer_networks_than_registered_nothing_is_decided():
    whole, few = (ascents.compared(runs, REGISTERED) for runs in (RUNS, [r for r in RUNS if r.recipe.seed < 4]))
    assert any(one.decided for one in whole)
    assert not any(one.decided for one in few)
    text = ascents.section(few, [r for r in RUNS if r.recipe.seed < 4])
    assert "interim, 4 of 5 networks: nothing is decided before all are there" in text


def test_a_network_that_has_diverged_leaves_no_test():
    broken = network(SMOOTHED, 5)
    broken.metrics[-1].update(dict.fromkeys(BY_ASCENT, math.nan))
    found = ascents.compared([*RUNS, broken])
    assert all(math.isnan(one.difference.p) for one in found if one.recipe == SMOOTHED)
    assert "not finite (6)" in ascents.section(found, [*RUNS, broken])
    assert figures.draw("ascents", [*RUNS, broken])


def test_the_tables_have_each_ascent_for_each_kind_of_networks():
    text = ascents.section(ascents.compared(RUNS, REGISTERED), RUNS)
    assert "**SAM, no label noise, label smoothing 0.1** (n = 5; error at the weights 0.00 ± 0.00 %)" in text
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    plain, log = (next(line for line in lines if line[0] == name) for name in ("cross-entropy", "BiSAM (-log)"))
    assert plain[2:6] == ["10.16 ± 0.35", "–", "–", "–"]
    assert log[2] == "11.16 ± 0.35"
    assert log[3].startswith("+1.00 [")
    assert log[4].endswith("(primary)")
    tanh = next(line for line in lines if line[0] == "BiSAM (tanh)")
    assert tanh[3:6] == ["+0.00 all equal (5)", "–", "–"]
    assert len([line for line in lines if line[0] == "SAM, no label noise, no label smoothing"]) == 5
    assert "Of 7 exploratory comparisons of the flips" in text
    assert text.count("Primary comparison, flips of BiSAM (-log) minus those of cross-entropy") == 1
    assert "figure 2, would be +2.03: outside the interval" in text  # a fifth of 10.16
    assert ascents.section([], [Finished(replace(SMOOTHED, measured="ball"), {}, [])]) == ""


def test_the_rows_have_each_mark():
    rows = ascents.rows(RUNS)
    assert len(rows) == 2 * 2 * len(ASCENTS)
    assert {row["epoch"] for row in rows} == {2, 4}
    row = next(r for r in rows if r["epoch"] == 2 and r["ascent"] == "log")
    assert row["flips_mean"] == pytest.approx(0.1116 / 2)
    assert row["error_mean"] == 0.5
    assert ascents.rows([]) == []


def test_the_figure_has_the_marks_and_says_when_the_data_are_fitted():
    axes = figures.draw("ascents", RUNS).axes
    assert len(axes) == 6
    lines = {line.get_label(): line for line in axes[0].get_lines()}
    assert set(ascents.NAMES.values()) < set(lines)
    assert lines["BiSAM (-log)"].get_xdata().tolist() == [2, 4]
    assert lines["BiSAM (-log)"].get_ydata() == pytest.approx([5.58, 11.16])
    assert lines["99 % of the examples are fitted"].get_xdata() == [4, 4]
    rise = {line.get_label(): line for line in axes[2].get_lines()}["cross-entropy"]
    assert rise.get_ydata()[-1] == pytest.approx(40.16)
    with pytest.raises(ValueError, match="there is no run for ascents"):
        figures.draw("ascents", [])


def test_the_study_registers_one_of_its_recipes():
    study = STUDIES["adversary"]
    assert study.registered.seeds == range(300, 305)
    where = study.registered.where
    assert len([r for r in study.recipes(None) if all(getattr(r, k) == v for k, v in where.items())]) == 1
    for name in ("adversary", "adversary-sgd"):
        recipes = STUDIES[name].recipes(None)
        assert {(r.noise, r.label_smoothing) for r in recipes} == {(0.0, 0.1), (0.0, 0.0), (0.4, 0.1), (0.4, 0.0)}
        assert {(r.measured, r.measured_epochs, r.epochs) for r in recipes} == {("ascents", 10, 40)}
