"""The table of flips: marks, counts, shares, and paired differences from the baseline."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import replace

import pytest

pytest.importorskip("matplotlib")

from scipy import stats

from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import tables
from bisam.experiments.reports.flips import at, flips, rows, section
from bisam.experiments.reports.groups import grouped
from bisam.experiments.reports.significance import holm
from bisam.experiments.runs.files import to_csv
from bisam.experiments.runs.folder import Finished
from tests.experiments.reports.test_reports import LOG, SAM, SGD, run


def flipped(recipe: Recipe, seed: int, *counts: float) -> Finished:
    """A run with these flips in its epochs."""
    one = run(replace(recipe, seed=seed, epochs=len(counts)))
    return replace(one, metrics=[{**row, "flipped": n} for row, n in zip(one.metrics, counts, strict=True)])


FIRST, MIDDLE, LAST = (0.0, 4.0, -2.0), (10.0, 11.0, 13.0), (20.0, 22.0, 21.0)
RUNS = [
    *(flipped(SAM, seed, 50.0 + seed, 9.0, 40.0, 8.0, 30.0 + seed) for seed in range(3)),
    *(
        flipped(LOG, seed, 50.0 + seed + FIRST[seed], 7.0, 40.0 + MIDDLE[seed], 6.0, 30.0 + seed + LAST[seed])
        for seed in range(3)
    ),
    *(flipped(SGD, seed, *[0.0] * 5) for seed in range(3)),
    *(flipped(replace(SAM, method="esam"), seed, *[math.nan] * 5) for seed in range(3)),
]


def cells(text: str) -> list[list[str]]:
    _, _, section = text.partition("## Samples flipped by the perturbation")
    section, _, _ = section.partition("\n## ")
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("|")]


def test_flips_are_shown_at_three_marks_with_differences_of_one_family():
    found = flips(grouped(RUNS), ("sam",))
    assert [(one.recipe.method, one.mark, one.epoch) for one in found] == [
        *(("sam", "first", 1), ("bisam_log", "first", 1)),
        *(("sam", "middle", 3), ("bisam_log", "middle", 3)),
        *(("sam", "last", 5), ("bisam_log", "last", 5)),
    ]
    compared = [one.comparison for one in found if one.comparison]
    p = [stats.ttest_1samp(shifts, 0).pvalue for shifts in (FIRST, MIDDLE, LAST)]
    assert [one.difference.p for one in compared] == pytest.approx(p, rel=1e-9)
    assert [one.adjusted for one in compared] == pytest.approx(holm(p), rel=1e-9)
    assert {one.family for one in compared} == {3}


def test_the_table_is_in_every_report_of_methods_that_flip():
    text = tables.markdown("T", RUNS, {})
    heads, _, *lines = cells(text)
    assert heads == ["epoch", "method", "flipped", "% of samples", "n", "difference", "p (Holm)", "detectable"]
    assert lines[0] == ["1 (first)", "SAM", "51.00 ± 1.00", "4.73 ± 0.09", "3", "–", "–", "–"]
    assert lines[5][:6] == [
        "5 (last)",
        "BiSAM (-log)",
        "52.00 ± 1.73",
        "4.82 ± 0.16",
        "3",
        "+21.00 [+18.52, +23.48] (3)",
    ]
    assert lines[5][6] == "0.002"  # 3 * 0.00075
    assert len(lines) == 6
    assert "adjusted over the 3 comparisons of this table. Decided: 2 of 3." in text
    assert "Samples flipped" not in tables.markdown("T", [one for one in RUNS if one.recipe.is_plain], {})


def test_settings_have_a_column_and_their_methods_stand_together():
    runs = [*RUNS, *(replace(one, recipe=replace(one.recipe, noise=0.0)) for one in RUNS)]
    heads, _, *lines = cells(tables.markdown("T", runs, {}))
    assert heads[0] == ""
    assert [line[0] for line in lines] == ["label noise 40 %"] * 6 + ["label noise 0 %"] * 6
    assert {one.comparison.family for one in flips(grouped(runs), ("sam",)) if one.comparison} == {6}


@pytest.mark.parametrize(
    ("epochs", "marks"),
    [
        (1, {"last": 1}),
        (2, {"first": 1, "last": 2}),
        (3, {"first": 1, "middle": 2, "last": 3}),
        (30, {"first": 1, "middle": 15, "last": 30}),
        (200, {"first": 1, "middle": 100, "last": 200}),
    ],
)
def test_short_runs_have_fewer_marks(epochs, marks):
    runs = [flipped(recipe, 0, *map(float, range(1, epochs + 1))) for recipe in (SAM, LOG)]
    found = flips(grouped(runs), ("sam",))
    assert {one.mark: one.epoch for one in found} == marks
    assert all(one.counts == (float(one.epoch),) for one in found)
    assert {mark: at(runs[0], mark) for mark in marks} == marks


def test_runs_of_different_numbers_of_epochs_have_marks_of_their_own():
    """Runs of steps on other numbers of devices."""
    long = flipped(SAM, 1, 1.0, 2.0, 3.0, 4.0, 5.0)
    short = replace(flipped(SAM, 0, 1.0, 2.0, 3.0), recipe=replace(long.recipe, seed=0))
    found = {one.mark: (one.epoch, one.counts) for one in flips(grouped([short, long]), ("sam",))}
    assert found == {"first": (1, (1.0, 1.0)), "middle": (0, (2.0, 3.0)), "last": (0, (3.0, 5.0))}
    assert [line[0] for line in cells(section(flips(grouped([short, long]), ("sam",))))[2:]] == [
        *("1 (first)", "middle", "last"),
    ]


def test_a_diverged_run_is_counted_and_decides_nothing():
    runs = [*RUNS[:5], flipped(LOG, 2, 50.0, 7.0, 60.0, math.nan, math.nan)]
    found = flips(grouped(runs), ("sam",))
    last = found[-1]
    assert (last.finite, len(last.counts)) == ([50.0, 53.0], 3)
    assert not last.comparison.decided
    assert last.comparison.family == 3
    line = cells(section(found))[-1]
    assert line[2:] == ["51.50 ± 2.12", "4.78 ± 0.20", "2 of 3", "not finite (3)", "–", "–"]


def test_with_many_methods_there_is_the_last_epoch_only():
    recipes = [replace(SAM, method=name, rho=METHODS[name].rho) for name in METHODS if name != "sgd"]
    found = flips(grouped(flipped(recipe, 0, 3.0, 2.0, 1.0) for recipe in recipes), ("sam",))
    assert {one.mark for one in found} == {"last"}
    assert len(found) == len([recipe for recipe in recipes if not recipe.is_plain])


def test_without_a_second_seed_there_are_no_columns_of_comparisons():
    heads, _, *lines = cells(section(flips(grouped([RUNS[0], RUNS[3]]), ("sam",))))
    assert heads == ["epoch", "method", "flipped", "% of samples", "n"]
    assert lines[0] == ["1 (first)", "SAM", "50.00", "4.64", "1"]


def test_results_without_the_number_of_examples_have_no_shares():
    one = RUNS[0]
    one = replace(one, result={key: value for key, value in one.result.items() if key != "examples"})
    assert cells(section(flips(grouped([one]), ("sam",))))[2][2:4] == ["50.00", "–"]


def test_the_numbers_are_rows_of_a_csv():
    made = list(csv.DictReader(io.StringIO(to_csv(rows(flips(grouped(RUNS), ("sam",)))))))
    assert [(row["name"], row["mark"], row["epoch"]) for row in made[:3]] == [
        *(("SAM", "first", "1"), ("BiSAM (-log)", "first", "1"), ("SAM", "middle", "3")),
    ]
    log = made[5]
    assert float(log["flipped_mean"]) == pytest.approx(52.0)
    assert float(log["share_mean"]) == pytest.approx(52.0 / 1078)
    assert float(log["p_holm"]) == pytest.approx(3 * stats.ttest_1samp(LAST, 0).pvalue)
    assert (log["baseline"], log["pairs"], log["comparisons"], log["finite"]) == ("SAM", "3", "3", "3")
    assert rows([]) == []
