"""SVG: figures as vector graphics whose points say their values, and which follow the colours of a page.

    point(ax, 0.4, 92.0, "SAM, rho 0.4", {0: 90.0, 1: 94.0})      # a mouse over it shows mean and seeds
    inline(drawing.rendered(figure, "svg").decode(), "accuracy-", "Test score by method")

A point is an invisible marker whose id carries its text until `with_titles` makes it a `<title>`; PNG and PDF do not
show it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from html import escape
from math import isfinite
from statistics import mean, stdev
from urllib.parse import quote, unquote

from matplotlib.axes import Axes

_ID = "hover-"
_SPOT = re.compile(rf'<g id="{_ID}([^"]*)">')
_FAMILY = re.compile(r"font-family: [^;\"]*sans-serif;? ?")
_COLOUR = re.compile(r"#[0-9a-f]{6}\b")
_ROLES = {"#ffffff": "var(--paper)", "#000000": "var(--ink)", "#b0b0b0": "var(--grid)", "#cccccc": "var(--line)"}

LIGHTER = {"#0072b2": "#4aa3df", "#d55e00": "#ef7f37", "#009e73": "#1fbf92", "#7f7f7f": "#a0a0a0"}
"""Colours of lines that would be too dark on a dark page, and those in their place."""


def point(ax: Axes, x: float, y: float, name: str, values: Mapping[int, float], unit: str = "") -> None:
    """A place in a figure that shows a name and the values by seed.

    Args:
        ax: the axes.
        x: place in data units.
        y: place in data units.
        name: of the point, in one line.
        values: by seed.
        unit: behind each number, such as " %".
    """
    known = list(values.values())
    lines = [name]
    if len(known) > 1 and all(map(isfinite, known)):
        lines.append(f"mean {_short(mean(known))} ± {_short(stdev(known))}{unit}")
    lines += [f"seed {seed}: {_short(value)}{unit}" for seed, value in values.items()]
    spot(ax, x, y, "\n".join(lines))


def spot(ax: Axes, x: float, y: float, text: str) -> None:
    """A place in a figure that shows a text of one or more lines."""
    if isfinite(x) and isfinite(y):
        marks = ax.scatter([x], [y], s=100, color="#000000", alpha=0, linewidths=0, zorder=9)
        marks.set_gid(_ID + quote(text, safe=" ,:"))


def with_titles(svg: str) -> str:
    """A figure whose points have their texts as titles, which browsers show."""
    return _SPOT.sub(lambda found: f'<g class="hover"><title>{escape(unquote(found[1]))}</title>', svg)


def inline(svg: str, prefix: str, caption: str) -> str:
    """An SVG file as an element of an HTML page.

    Black and white become the page's colours of ink and paper, the others variables with the colour as the default:
    `--c0072b2`. The element loads nothing and has no rule of style for the page.

    Args:
        svg: a file that matplotlib wrote.
        prefix: put before all ids, which must differ from those of other figures of the page.
        caption: for readers that do not see it.
    """
    start = svg.index("<svg")
    box = re.search(r'viewBox="([^"]*)"', svg)
    width = re.search(r'width="([0-9.]+)pt"', svg)
    assert box is not None  # matplotlib writes both
    assert width is not None
    body = svg[svg.index(">", start) + 1 :]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    body = re.sub(r'\bid="|url\(#|href="#', lambda found: found[0] + prefix, body)
    body = _COLOUR.sub(lambda found: _ROLES.get(found[0], f"var(--c{found[0][1:]}, {found[0]})"), _FAMILY.sub("", body))
    pixels = round(float(width[1]) * 4 / 3)
    head = f'<svg viewBox="{box[1]}" width="{pixels}" role="img" aria-label="{escape(caption)}">'
    return head + body.strip()


def _short(value: float) -> str:
    return f"{value:.4g}".replace("-", "−")
