"""Durations as text."""

from __future__ import annotations

import pytest

from bisam.experiments.runs.durations import seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("5400", 5400), ("1h30m", 5400), ("90m", 5400), ("1.5h", 5400), ("1:30:00", 5400), ("90:00", 5400)),
        *(("45s", 45), ("2d", 172800), ("1d1h1m1s", 90061), ("0.5", 0.5)),
    ],
)
def test_a_duration_in_the_ways_it_is_written(text, value):
    assert seconds(text) == value
