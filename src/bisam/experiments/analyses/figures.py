"""Figures of analyses, at the width of a column of a paper, from the results by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 3.4
"""In inches, of a column."""

_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "axes.labelsize": 8,
    "axes.titlesize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def of_sharpness(found: Mapping[str, Any]) -> Figure:
    """The rise of the loss against the steps of ascent, and the rises of all kinds."""
    rises = {
        f"{found['many'].steps} steps": found["many"].rise,
        "1 step": found["one"].rise,
        "m-sharpness": found["m"].rise,
        "ASAM's ball": found["adaptive"].rise,
        "normalised": found["normalized"].rise,
        "random": found["average"].rise,
    }

    def bars(axes: Any) -> None:
        from bisam.analysis.plots import COLOURS

        drawn = axes.barh(list(rises), list(rises.values()), height=0.6, color=COLOURS[0])
        last = len(rises) - 1
        axes.errorbar(found["average"].rise, last, xerr=found["average"].std, color="black", capsize=2, linewidth=1)
        axes.bar_label(drawn, fmt="%.3g", padding=4, fontsize=7)
        axes.invert_yaxis()
        axes.set_xlabel("rise of the loss")
        axes.margins(x=0.2)

    return _stack(found["many"].plot, bars)


def of_zero_one(found: Mapping[str, Any]) -> Figure:
    """The largest error against the steps of each adversary."""
    return _stack(found["worst"].plot)


def of_flips(found: Mapping[str, Any]) -> Figure:
    """The examples that each adversary flips."""
    return _stack(found["flips"].plot)


def of_spectrum(found: Mapping[str, Any]) -> Figure:
    """The density of the eigenvalues."""
    return _stack(found["density"].plot)


def of_landscape(found: Mapping[str, Any]) -> Figure:
    """The loss along a random direction and along that of SAM's adversary, and on a plane."""
    return _stack(found["random"].plot, found["ascent"].plot, found["plane"].plot)


def of_all(found: Mapping[str, Any]) -> Figure:
    """The plots of all results."""
    return _stack(*(result.plot for result in found.values()))


def _stack(*panels: Any, height: float = 2.2) -> Figure:
    """A figure with panels below one another; each is drawn by a function of its axes."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(WIDTH, height * len(panels) + 0.2), layout="constrained")
        for panel, axes in zip(panels, figure.subplots(len(panels), squeeze=False)[:, 0], strict=True):
            panel(axes)
    return figure
