"""The page on analysis: its code runs, and its table of costs is that of the results."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bisam import L2, analysis

PAGE = Path(__file__).parents[2] / "docs" / "analysis.md"


def test_the_code_of_the_page_runs():
    for package in ("curvlinops", "torchmetrics", "torchvision"):
        pytest.importorskip(package)
    pytest.importorskip("matplotlib").use("Agg")
    import matplotlib.pyplot as plt

    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    for block in blocks:
        exec(block, names)
    assert len(blocks) == 7
    assert names["one"].rise <= names["many"].rise
    assert names["axes"].get_xlabel() == "along a random direction"
    plotted = ("one", "worst", "flipped", "top", "density", "line", "plane")
    plotted += ("found", "scaled", "calibrated", "rank", "slope", "errors")
    results = [names[name] for name in plotted]
    for result in results:
        assert result.plot().get_xlabel()
        plt.close("all")
    sharp, loader = names["sharp"], names["loader"]
    assert names["many"].forward == pytest.approx(21 * 3 + 1)
    assert names["many"].backward == pytest.approx(20 * 3)
    assert (names["mean"].forward, names["mean"].backward) == (pytest.approx(21), 0)
    objectives = sum(len(series) for series in names["worst"].adversaries.values())
    assert names["worst"].forward == pytest.approx(3 * 30 + objectives + 1)
    assert names["worst"].backward == pytest.approx(3 * 30)
    assert (names["flipped"].forward, names["flipped"].backward) == (pytest.approx(9), pytest.approx(4))
    assert all(names[name].forward == pytest.approx(1) for name in ("found", "scaled", "calibrated", "rank", "slope"))
    assert names["slope"].backward == pytest.approx(1)
    assert names["errors"].forward == pytest.approx(7 * 5 + 1)
    seen: list[tuple[int, int]] = []
    analysis.landscape(sharp, loader, "random", points=5, progress=lambda *now: seen.append(now))
    assert seen[-1] == (6 * 256, 6 * 256)
    assert analysis.sharpness(sharp, loader, L2(0.0)).rise == 0


def test_the_page_has_each_function():
    functions = {name for name in vars(analysis) if name[0].islower() and callable(getattr(analysis, name))}
    named = set(re.findall(r"`?\b([a-z_]+)\(", PAGE.read_text()))
    assert {"sharpness", "flips", "trace"} <= functions
    assert functions <= named
