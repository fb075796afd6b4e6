"""The sentence that opens the report of a measurement."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from bisam.experiments.measurements import MEASUREMENTS

PAGES = Path(__file__).parents[3] / "docs" / "reproduction"
KEPT = ["example", "label-gradient", "sampa-gradients", "sampa-costs", "table11", "table12", "gan"]


def value(text: str):
    """A cell of a CSV file as the row had it."""
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


def rows(name: str):
    with (PAGES / name / "report.csv").open(newline="") as file:
        return [{key: value(text) for key, text in row.items()} for row in csv.DictReader(file)]


def test_every_measurement_has_one():
    assert [name for name, one in MEASUREMENTS.items() if one.answer is None] == []


@pytest.mark.skipif(not PAGES.is_dir(), reason="needs a checkout")
@pytest.mark.parametrize("name", KEPT)
def test_a_committed_page_opens_with_what_its_numbers_say(name):
    text = (PAGES / name / "report.md").read_text()
    assert text.split("\n\n")[1] == MEASUREMENTS[name].answer(rows(name))


@pytest.mark.skipif(not PAGES.is_dir(), reason="needs a checkout")
def test_bars_are_counted_by_their_verdicts():
    values = {"bisam_log_to_sam": 1.5, "bisam_tanh_to_sam": 1.0}
    found = [
        {name: next((v for start, v in values.items() if name.startswith(start)), old) for name, old in row.items()}
        for row in rows("table11")
    ]
    assert MEASUREMENTS["table11"].answer(found).endswith("the bar of 1.01: 5 met, 5 missed.")


@pytest.mark.skipif(not PAGES.is_dir(), reason="needs a checkout")
def test_methods_that_diverged_are_named_last():
    found = [
        {**row, "distance": None} if (row["method"], row["gradients"]) == ("Adam", 600) and row["seed"] else row
        for row in rows("gan")
    ]
    said = MEASUREMENTS["gan"].answer(found)
    assert said.endswith("(2 diverged).")
    assert "nearest first, mean ± standard deviation of 3 seeds, untested: ExtraAdam 2.98 ± 0.68, GDA" in said
