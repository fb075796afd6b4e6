"""Analyses in reports: means over seeds, settings that are never mixed, and analyses of other weights."""

from __future__ import annotations

import json
from dataclasses import replace
from math import nan

import pytest

from bisam.experiments.analyses.file import ANALYSIS, as_text, new_entry
from bisam.experiments.analyses.settings import Settings
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports import analyses
from bisam.experiments.runs.files import checksum
from bisam.experiments.runs.folder import Finished

SAM = Recipe(method="sam", rho=0.4, epochs=3)
BEST = Settings(weights="best")


def entry(run: Finished, rate: float, settings: Settings = BEST, of: str | None = None) -> dict:
    """Flips of 200 examples: `rate` of them by each adversary."""
    names = ("loss", "cross-entropy", "-log", "tanh")
    result = {
        "mode": "eval",
        "seed": settings.seed,
        "examples": 200.0,
        "correct": 190,
        "flipped": dict.fromkeys(names, round(200 * rate)),
        "repaired": dict.fromkeys(names, 0),
        "rise": dict.fromkeys(names, 0.1),
        "cosines": {name: dict.fromkeys(names, 0.5) for name in names},
        "rho": settings.radius,
        "perturb": "L2",
        "adversaries": dict.fromkeys(names, ""),
        "batches": 2,
        "forward": 9.0,
        "backward": 4.0,
    }
    told = settings.relevant(("rho",))
    return new_entry("flips", told, of or checksum(run.result), {"flips": result}, 1.0, "cpu")


@pytest.fixture
def runs(tmp_path) -> list[Finished]:
    """Three seeds of two methods, each with a folder."""
    found = []
    for recipe in (SAM, replace(SAM, method="bisam_log")):
        for seed in range(3):
            folder = tmp_path / recipe.slug / f"seed-{seed}"
            folder.mkdir(parents=True)
            found.append(Finished(replace(recipe, seed=seed), {"test_best": 0.9, "seed": seed}, [], folder))
    return found


def write(run: Finished, *entries: dict) -> None:
    (run.folder / ANALYSIS).write_text(as_text(entries))


def table_rows(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def shown(runs: list[Finished]) -> str:
    return analyses.section(runs, *analyses.read(runs), "runs/study")


def test_without_analyses_there_is_no_section(runs):
    assert analyses.read(runs) == ({}, [])
    assert shown(runs) == ""
    assert analyses.rows(runs, {}) == []


def test_means_over_the_seeds_and_the_number_of_runs_that_lack_it(runs):
    for run, rate in zip(runs[:5], (0.05, 0.06, 0.10, 0.2, 0.3), strict=True):
        write(run, entry(run, rate))
    text = shown(runs)
    assert "for 5 of 6 finished runs" in text
    assert "`bisam analyse runs/study` measures the other 1." in text
    header, sam, log = table_rows(text)
    assert header[:2] == ["method", "flips, SAM (%)"]
    assert sam[:2] == ["SAM", "7.00 ± 2.65"]
    assert log[:2] == ["BiSAM (-log)", "25.00 ± 7.07"]
    assert (sam[-1], log[-1]) == ("3", "2")
    row = analyses.rows(runs, analyses.read(runs)[0])[0]
    assert (row["method" if "method" in row else "name"], row["measure"], row["n"]) == ("SAM", "flips, SAM", 3)
    assert (row["mean"], row["std"]) == (pytest.approx(0.07), pytest.approx(0.02645751311))


def test_other_radii_have_rows_and_other_examples_a_table_of_their_own(runs):
    more, other = replace(BEST, rho=(0.2,)), replace(BEST, split="test")
    for run in runs[:3]:
        write(run, entry(run, 0.05), *([entry(run, 0.5, more)] if run is runs[0] else []))
    write(runs[3], entry(runs[3], 0.1, other))
    text = shown(runs)
    first, second = text.split("On at most 2,000 test examples")
    assert "On at most 2,000 training examples, with the label noise" in first
    assert table_rows(first)[0][:2] == ["rho", "method"]
    assert [row[:3] + row[-1:] for row in table_rows(first)[1:]] == [
        ["0.05", "SAM", "5.00 ± 0.00", "3"],
        ["0.2", "SAM", "50.00", "1"],
    ]
    assert [row[:2] for row in table_rows(second)] == [["method", "flips, SAM (%)"], ["BiSAM (-log)", "10.00"]]
    assert len({(r["rho"], r["split"], r["mean"]) for r in analyses.rows(runs, analyses.read(runs)[0])}) > 2


def test_the_analysis_of_other_weights_is_left_out(runs):
    write(runs[0], entry(runs[0], 0.1, of="other"))
    assert analyses.read(runs) == ({}, [])


def test_a_damaged_file_is_named(runs):
    write(runs[0], entry(runs[0], 0.1))
    (runs[1].folder / ANALYSIS).write_text("{")
    entries, faults = analyses.read(runs)
    assert len(entries) == 1
    text = analyses.section(runs, entries, faults, "runs/study")
    assert "Left out, because they cannot be used: seed-1/analysis.json (Expecting property name" in text


def test_where_it_was_measured_is_told(runs):
    write(runs[0], entry(runs[0], 0.1))
    assert "Analysis: Made 20" in shown(runs)


@pytest.mark.parametrize(
    ("values", "percent", "n", "text"),
    [
        ([], False, 1, "–"),
        ([nan], False, 1, "–"),
        ([0.5], False, 1, "0.500"),
        ([0.5], True, 1, "50.00"),
        ([0.5], False, 3, "0.500 (1)"),
        ([0.25, 0.75], False, 2, "0.500 ± 0.354"),
        ([1.43, 1.4301], False, 2, "1.43005 ± 0.00007"),
        ([1200, 1300], False, 2, "1250 ± 71"),
        ([-2e-5], False, 1, "−2.00e−05"),
        ([0, 0], False, 2, "0.00 ± 0.00"),
    ],
)
def test_a_cell(values, percent, n, text):
    assert analyses.cell(values, percent, n) == text


def test_the_file_is_as_it_is_read(runs):
    write(runs[0], entry(runs[0], 0.1))
    values = json.loads((runs[0].folder / ANALYSIS).read_text())
    assert set(values) == {"version", "entries", "checksum"}
    assert analyses.read(runs)[0] == {runs[0].recipe: values["entries"]}
