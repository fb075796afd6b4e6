"""Drawing tools of all figures: colours, panels, legends and files.

The colours are safe for colour-blind readers (Okabe and Ito, 2008); lines also differ in dashes and markers, so that
they can be distinguished in grey.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import lcm
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bisam.experiments.recipes.catalogue import BASELINE, METHODS
from bisam.experiments.recipes.entries import FAMILIES
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.groups import Groups, metric, names, place, places
from bisam.experiments.reports.svg import with_titles
from bisam.experiments.runs.files import write
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.results import IN_PER_CENT, TITLES, headline

_HEADING = 10.5
"""Font size of the title of a figure, in points."""
BLACK, GREY = "#000000", "#7F7F7F"
BLUE, SKY, GREEN, ORANGE, RED, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
FAMILY_COLOURS = {
    "plain": BLACK,
    "adversary": BLUE,
    "geometry": ORANGE,
    "combining": GREEN,
    "saving": PURPLE,
    "around": RED,
}
MANY = 10
"""The number of methods above which one panel cannot distinguish their lines."""
EPOCHS = {"best": "best validation epoch", "last": "last epoch"}
"""The weights of a test score, for axes and legends."""
FORMATS = ("png", "pdf", "svg")


@dataclass(frozen=True)
class Style:
    """How a method is drawn."""

    colour: str
    dashes: Any = "-"
    marker: str = "o"

    @property
    def line(self) -> dict[str, Any]:
        """As arguments of `Axes.plot`."""
        return {"color": self.colour, "linestyle": self.dashes, "marker": self.marker, "markersize": 4}


_KNOWN = {
    "sgd": Style(GREY, ":", "o"),
    "sam": Style(BLACK, "-", "s"),
    "sam_ce": Style(ORANGE, "--", "s"),
    "bisam_log": Style(BLUE, "-", "^"),
    "bisam_tanh": Style(SKY, "--", "v"),
    "asam": Style(GREEN, "-.", "D"),
    "abisam_log": Style(RED, "-", "P"),
    "abisam_tanh": Style(PURPLE, "--", "X"),
}
_COLOURS = (ORANGE, PURPLE, RED, GREEN, BLUE, SKY, GREY)
_DASHES = ("--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)), "-")
_MARKERS = "odvXP<>*hH"


def styles(called: Mapping[Recipe, str]) -> dict[str, Style]:
    """A style for each name: the method's own style for its first name, a free one for the others."""
    found: dict[str, Style] = {}
    for recipe, name in called.items():
        if recipe.method in _KNOWN and _KNOWN[recipe.method] not in found.values():
            found.setdefault(name, _KNOWN[recipe.method])
    taken = {style.colour for style in found.values()}
    colours = sorted(_COLOURS, key=lambda colour: colour in taken)  # the free ones first
    every = [
        Style(colours[i % len(colours)], _DASHES[i % len(_DASHES)], _MARKERS[i % len(_MARKERS)])
        for i in range(lcm(len(colours), len(_DASHES), len(_MARKERS)))
    ]
    free = cycle([style for style in every if style not in found.values()])
    for name in dict.fromkeys(called.values()):
        if name not in found:
            found[name] = next(free)
    return found


def family_colour(recipe: Recipe) -> str:
    """The colour of a method's family, for figures with more methods than there are colours."""
    return FAMILY_COLOURS[METHODS[recipe.method].family] if recipe.method in METHODS else GREY


@dataclass(frozen=True)
class Panel:
    """The recipes on the same axes, with their names and runs."""

    title: str
    shown: list[tuple[Recipe, str, Sequence[Finished]]]

    @property
    def styles(self) -> dict[str, Style]:
        """A style for each name of this panel; other panels may use it for another name."""
        return styles({recipe: name for recipe, name, _ in self.shown})

    @property
    def headline(self) -> str:
        """The weights whose scores are shown: a panel has one data set, and so one of them."""
        return headline(self.shown[0][2][0].result)

    @property
    def metric(self) -> str:
        """The metric of the scores, with its unit."""
        return with_unit(metric(self.shown[0][2][0]))


def with_unit(name: str) -> str:
    """The title of a metric, with the unit of its scores in figures."""
    return f"{TITLES.get(name, name)} {'(%)' if name in IN_PER_CENT else '× 100'}"


def panels(groups: Groups, most: int | None = None) -> list[Panel]:
    """A panel for each place; if it has more recipes than `most`, one for each family, each with SAM."""
    called, found = names(groups), list[Panel]()
    for at, name in places(groups).items():
        shown = [(recipe, called[recipe], group) for recipe, group in groups.items() if place(recipe) == at]
        if most is None or len(shown) <= most:
            found.append(Panel(name, shown))
            continue
        families = {recipe: METHODS[recipe.method].family if recipe.method in METHODS else "" for recipe, *_ in shown}
        for family in dict.fromkeys(families.values()):
            some = [one for one in shown if families[one[0]] == family or one[0].method == BASELINE]
            if len(some) > 1:  # not SAM alone
                found.append(Panel(", ".join(p for p in (name, FAMILIES.get(family, "expressions")) if p), some))
    return found


def sheet(count: int, size: tuple[float, float], columns: int = 3, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `count` axes, each of `size` in inches, in at most `columns` columns."""
    columns = min(columns, count)
    rows = -(-count // columns)
    figure = Figure(figsize=(max(6.4, size[0] * columns), size[1] * rows + 0.9), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for ax in axes[count:]:
        ax.axis("off")
    return figure, axes[:count]


def heading(figure: Figure, title: str, groups: Groups, what: str = "mean ± standard deviation") -> None:
    """Set the title of a figure, in lines that fit its width; see `described`."""
    width = int(figure.get_figwidth() * 72 / (0.56 * _HEADING))  # the mean width of a character, in units of its size
    lines = [
        part
        for line in described(title, groups, what).splitlines()
        for part in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
    ]
    figure.suptitle("\n".join(lines), fontsize=_HEADING)


def described(title: str, groups: Groups, what: str = "mean ± standard deviation") -> str:
    """A title of two lines; the second one names what all panels share."""
    seeds = sorted({len(group) for group in groups.values()})
    n = f"{seeds[0]}" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
    spread = f"{what} of {n} seeds" if seeds[-1] > 1 else "one seed"
    data, models, noises, imbalances = (set(values) for values in zip(*places(groups), strict=True))
    noise = {f"label noise {100 * value:g} %" if value else "" for value in noises}
    imbalance = {f"imbalance {value:g}" if value > 1 else "" for value in imbalances}
    common = [plain(words) for words, *others in (data, models, noise, imbalance) if words and not others]
    diverged = sum(run.diverged is not None for group in groups.values() for run in group)
    failed = [f"{diverged} of {sum(map(len, groups.values()))} runs diverged"] if diverged else []
    return f"{title}\n{', '.join([*common, spread, *failed])}"


def families(ax: Axes, groups: Groups) -> None:
    """Add a legend entry for each family that occurs."""
    for recipe in groups:
        label = FAMILIES[METHODS[recipe.method].family] if recipe.method in METHODS else "expressions"
        if label not in ax.get_legend_handles_labels()[1]:
            ax.plot([], [], "s", color=family_colour(recipe), ms=7, label=label)


def tested(group: Sequence[Finished], when: str) -> list[float]:
    """Test scores times 100, of the best validation epoch or of the last epoch."""
    return [100 * run.result[f"test_{when}"] for run in group]


def legend(figure: Figure, axes: Sequence[Axes], shared: bool = True) -> None:
    """One legend below all axes, or one to the right of each."""
    entries = {label: line for ax in axes for line, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if entries and shared:
        longest = max(len(line) for label in entries for line in label.splitlines())
        columns = max(1, min(len(entries), int(figure.get_figwidth() / (0.07 * longest + 0.6))))
        style: dict[str, Any] = {"loc": "outside lower center", "ncols": columns, "frameon": False, "fontsize": 9}
        figure.legend(list(entries.values()), list(entries), **style)
    for ax in () if shared else axes:
        beyond = 1.2 if ax.child_axes else 1.01  # there is an axis on the right too
        ax.legend(loc="upper left", bbox_to_anchor=(beyond, 1.02), fontsize=8, frameon=False)


def plain(text: str, width: int = 30) -> str:
    """Text for a figure: without formulas, wrapped at `width` characters, with at most four lines."""
    lines = textwrap.wrap(text.replace("$", r"\$"), width) or [""]
    return "\n".join([*lines[:3], "…"] if len(lines) > 4 else lines)


def titled(where: str, seen: str, width: int = 52) -> str:
    """The title of a panel: its place, and below it what is seen there; either may be empty.

    Args:
        where: the place.
        seen: what is seen there.
        width: characters of a line.
    """
    return "\n".join(plain(line, width) for line in (where, seen) if line)


def extreme(words: str, values: Mapping[str, float], choose: Callable[[Iterable[float]], float] = min) -> str:
    """The words and the name with the extreme value, or how many share it; "" of fewer than two finite values.

    Args:
        words: what the value is, as "highest mean".
        values: by name.
        choose: `min` or `max`.
    """
    finite = {name: value for name, value in values.items() if np.isfinite(value)}
    names = [name for name, value in finite.items() if value == choose(finite.values())]
    return f"{words}: {names[0] if len(names) == 1 else f'{len(names)} methods'}" if len(finite) > 1 else ""


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation; None for fewer than two values."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def rendered(figure: Figure, format: str = "png", dpi: int = 150) -> bytes:
    """A figure as the content of a file; equal figures give equal bytes. In SVG texts are text, and points have titles.

    Raises:
        ValueError: the format is none of png, pdf, svg.
    """
    if format not in FORMATS:
        raise ValueError(f"figures are png, pdf or svg, not {format!r}")
    undated: dict[str, Any] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}[format]
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "bisam", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=format, dpi=dpi, metadata=undated)
    return with_titles(buffer.getvalue().decode()).encode() if format == "svg" else buffer.getvalue()


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix gives the format.

    Raises:
        ValueError: the suffix is none of .png, .pdf, .svg.
    """
    write(path, rendered(figure, format_of(path)))


def format_of(path: Path) -> str:
    """Return the format of a figure's file, by its suffix.

    Raises:
        ValueError: the suffix is none of .png, .pdf, .svg.
    """
    if (format := path.suffix[1:].lower()) not in FORMATS:
        raise ValueError(f"{path}: give a file that ends in .png, .pdf or .svg")
    return format
