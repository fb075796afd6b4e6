"""Comparisons of a page: families, registered comparisons, and what is decided."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from scipy import stats

from bisam.experiments.reports import tables
from bisam.experiments.reports.differences import adjusted, compare, differences, primary_comparisons
from bisam.experiments.reports.groups import grouped
from bisam.experiments.reports.significance import holm
from bisam.experiments.runs.files import to_csv
from bisam.experiments.studies import STUDIES
from bisam.experiments.studies.study import Primary, Study
from tests.experiments.reports.test_reports import LOG, SAM, run, seeded

TANH, ASAM, CE = (replace(SAM, method=method) for method in ("bisam_tanh", "asam", "sam_ce"))
BASE = (0.90, 0.94, 0.92, 0.91, 0.93)
SHIFTS = {
    LOG: (0.010, 0.012, 0.011, 0.009, 0.013),
    TANH: (0.002, 0.011, -0.001, 0.004, 0.003),
    ASAM: (-0.01, 0.01, 0.0, 0.02, -0.02),
}


def page(noises=(0.4,), seeds=range(5), first=0) -> list:
    """SAM and three methods with known differences, in several settings."""
    scores = {SAM: BASE, **{recipe: [a + b for a, b in zip(BASE, of, strict=True)] for recipe, of in SHIFTS.items()}}
    return [
        run(replace(recipe, noise=noise, seed=first + i), values[i])
        for noise in noises
        for recipe, values in scores.items()
        for i in seeds
    ]


def test_all_comparisons_of_a_page_are_a_family():
    found = differences(grouped(page((0.0, 0.4))), ("sam",))
    assert len(found) == 6
    p = [stats.ttest_1samp(SHIFTS[replace(recipe, noise=0.4)], 0).pvalue for recipe in found]
    assert [one.difference.p for one in found.values()] == pytest.approx(p, rel=1e-6)
    assert [one.adjusted for one in found.values()] == pytest.approx(holm(p), rel=1e-6)
    assert {one.family for one in found.values()} == {6}
    assert [one.decided for one in found.values()] == [True, False, False] * 2
    one = found[LOG]
    assert one.detectable == (one.difference.detectable(0.05), one.difference.detectable(0.05 / 6))


def test_an_interval_without_0_decides_nothing_by_itself():
    shifts = (0.004, 0.011, 0.001, 0.004, 0.003)
    runs = [*page(), *seeded(replace(LOG, mu=3.0), *(a + b for a, b in zip(BASE, shifts, strict=True)))]
    found = differences(grouped(runs), ("sam",))[replace(LOG, mu=3.0)]
    assert found.difference.p < 0.06
    one = replace(found, difference=replace(found.difference, low=0.001, high=0.009), adjusted=0.08)
    assert one.difference.excludes_zero
    assert not one.decided


def test_comparisons_without_a_test_count_and_are_undecided():
    """Otherwise whether they are equal would decide how strictly the others are tested."""
    equal = seeded(CE, *BASE)
    single = [run(replace(LOG, rho=0.8), 0.5)]
    diverged = seeded(replace(TANH, rho=0.8), *BASE)
    diverged[0] = replace(diverged[0], result={**diverged[0].result, "test_best": math.nan})
    found = differences(grouped([*page(), *equal, *single, *diverged]), ("sam",))
    assert {one.family for one in found.values()} == {6}
    for recipe in (CE, replace(LOG, rho=0.8), replace(TANH, rho=0.8)):
        one = found[recipe]
        assert math.isnan(one.adjusted)
        assert all(map(math.isnan, one.detectable))
        assert not one.decided
    smallest = found[LOG]
    assert smallest.adjusted == pytest.approx(6 * smallest.difference.p)
    runs = [*page(), *equal, *single, *diverged]
    rows = {row["name"]: tables.cells(row, ("difference", "p (Holm)", "detectable")) for row in tables.summary(runs)}
    assert rows["SAM (CE ascent)"] == ("+0.00 all equal (5)", "–", "–")
    assert rows["BiSAM (-log) (rho 0.8)"] == ("–", "–", "–")
    assert rows["BiSAM (tanh) (rho 0.8)"] == ("not finite (5)", "–", "–")
    assert "nan" not in tables.markdown("T", [*page(), *equal, *single], {})


def test_adjusted_keeps_the_order_and_the_numbers():
    found = [*compare(grouped(page()), ("sam",)).values()]
    assert [replace(one, adjusted=math.nan, family=1) for one in adjusted(found)] == [
        replace(one, adjusted=math.nan) for one in found
    ]
    assert adjusted([]) == []


# Registered comparisons


def test_a_primary_comparison_is_tested_by_itself():
    primary = Primary("-log against SAM under noise", "bisam_log", where={"noise": 0.4, "mu": 1.0}, seeds=range(5))
    groups = grouped(page((0.0, 0.4)))
    (one,) = primary_comparisons(groups, primary)
    assert (one.recipe, one.baseline, one.family, one.primary) == (LOG, SAM, 1, True)
    assert one.adjusted == one.difference.p
    found = differences(groups, ("sam",), primary)
    assert found[LOG] == one
    assert list(found) == list(differences(groups, ("sam",)))
    assert {other.family for recipe, other in found.items() if recipe != LOG} == {5}
    text = tables.markdown("T", page((0.0, 0.4)), {}, primary=primary)
    assert "**Primary comparison**, fixed before the first run: -log against SAM under noise. label noise 40 %" in text
    assert "BiSAM (-log) minus SAM: +1.10 [" in text
    assert "(**decided**). All other comparisons are exploratory." in text
    assert "adjusted over the 5 other comparisons of this table" in text
    (row,) = (line for line in text.splitlines() if line.startswith("| 40 % | BiSAM (-log) "))
    assert "| < 0.001 (primary) |" in row.replace("\\", "")


def test_settings_of_a_primary_comparison_are_adjusted_together():
    found = primary_comparisons(grouped(page((0.0, 0.4))), Primary("tanh", "bisam_tanh", seeds=range(5)))
    assert [one.recipe.noise for one in found] == [0.0, 0.4]
    assert [one.adjusted for one in found] == pytest.approx([min(1.0, 2 * one.difference.p) for one in found])
    assert {one.family for one in found} == {2}


def test_a_primary_comparison_may_be_with_another_method_than_the_baseline():
    primary = Primary("-log against the control", "bisam_log", "sam_ce", seeds=range(5))
    groups = grouped([*page(), *seeded(CE, *(score + 0.002 * i for i, score in enumerate(BASE)))])
    (one,) = primary_comparisons(groups, primary)
    assert one.baseline == CE
    found = differences(groups, ("sam",), primary)
    assert found[LOG].baseline == SAM
    assert not any(other.primary for other in found.values())
    assert {other.family for other in found.values()} == {4}


def test_a_primary_comparison_waits_for_its_seeds_and_takes_no_others():
    primary = Primary("-log", "bisam_log", seeds=range(5))
    few = grouped(page(seeds=range(4)))
    (one,) = primary_comparisons(few, primary)
    assert one.adjusted < 0.05
    assert one.interim
    assert not one.decided
    text = tables.markdown("T", page(seeds=range(4)), {}, primary=primary)
    assert "(**interim, 4 of 5 registered pairs: nothing is decided until all are there**)" in text
    assert "(primary) (interim) |" in text
    more = grouped([*page(), *page(first=100)])
    (one,) = primary_comparisons(more, primary)
    assert one.difference.pairs == 5
    found = differences(more, ("sam",), primary)
    assert found[LOG] == one
    assert found[ASAM].difference.pairs == 10
    assert primary_comparisons(grouped(page(first=100)), primary) == []
    assert "No registered seed has both of its runs yet." in tables.markdown("T", page(first=9), {}, primary=primary)


def test_a_primary_comparison_in_a_section_of_its_own_leaves_the_table_exploratory():
    primary = Primary("the regret of a radius that is too large")
    text = tables.markdown("T", page(), {}, primary=primary)
    assert "the regret of a radius that is too large. It has a section of its own. All comparisons of the" in text
    assert "adjusted over the 3 comparisons of this table" in text
    assert primary_comparisons(grouped(page()), primary) == []


def test_a_study_gives_its_seeds_to_its_primary_comparison():
    study = Study("a", "A", lambda _: [SAM, LOG], 7, first_seed=50, primary=Primary("-log", "bisam_log"))
    assert study.registered == Primary("-log", "bisam_log", seeds=range(50, 57))
    assert replace(study, primary=Primary("-log", "bisam_log", seeds=range(3))).registered.seeds == range(3)
    assert replace(study, primary=None).registered is None


def registered_is_there(study: Study) -> bool:
    """Whether some recipe of a study is its primary comparison, with a baseline beside it."""
    if study.primary is None or not study.primary.method:
        return True
    recipes = [replace(recipe, seed=study.registered.seeds[0]) for recipe in study.changed(None, ())]
    return bool(primary_comparisons(grouped(run(recipe, 0.9) for recipe in recipes), study.registered))


def test_the_primary_comparisons_of_all_studies_are_among_their_recipes():
    assert [name for name, study in STUDIES.items() if not registered_is_there(study)] == []
    digits = STUDIES["digits"]
    assert registered_is_there(replace(digits, primary=Primary("-log", "bisam_log", where={"noise": 0.4})))
    for wrong in ({"method": "bisam_lgo"}, {"where": {"noise": 0.3}}, {"against": "sgd_"}):
        assert not registered_is_there(
            replace(digits, primary=Primary(**{"words": "", "method": "bisam_log", **wrong}))
        )


# CSV


def test_the_csv_has_the_old_columns_and_the_numbers_of_the_tests():
    rows = list(csv.DictReader(io.StringIO(to_csv(tables.summary(page())))))
    old = "name method dataset model noise rho epochs metric test_best_mean test_best_std test_last_mean test_last_std "
    old += "validation_best_mean validation_best_std relative_time_mean relative_time_std flipped_late_mean "
    old += "flipped_late_std n diverged gradients_per_step forwards_per_step seconds_per_epoch baseline "
    old += "difference_mean difference_low difference_high pairs recipe"
    assert set(old.split()) <= set(rows[0])
    log = next(row for row in rows if row["method"] == "BiSAM (-log)")
    expected = stats.ttest_1samp(SHIFTS[LOG], 0)
    assert float(log["p"]) == pytest.approx(expected.pvalue, rel=1e-6)
    assert float(log["p_holm"]) == pytest.approx(3 * expected.pvalue, rel=1e-6)
    assert (log["comparisons"], log["primary"], log["headline"]) == ("3", "False", "best")
    assert 0 < float(log["detectable"]) < float(log["detectable_holm"])
    sam = rows[0]
    assert (sam["p"], sam["p_holm"], sam["comparisons"], sam["detectable"]) == ("nan", "nan", "0", "nan")
