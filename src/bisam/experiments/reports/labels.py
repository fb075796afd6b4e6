"""Labels: names beside the points of a figure, placed so that they cover neither each other nor a point.

    figure.draw_without_rendering()       # the layout must be final
    place(ax, points, names, colours)

Each name tries places around its point, near ones first, and takes the first that is free, or else the one that covers
least. Names in crowded neighbourhoods choose first. The result depends on the figure alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

_DIRECTIONS = 16
_DISTANCES = (4.0, 8.0, 13.0, 19.0, 26.0, 34.0, 43.0, 54.0, 68.0, 85.0)  # points of text, from the point to the name
_LINED = 8.0  # distance from which a line leads from the point to the name
_POINT = 3.5  # half the width of what a point covers
_GAP = 1.5  # between two names


def place(ax: Axes, points: np.ndarray, names: Sequence[str], colours: Sequence[str], size: float = 8.0) -> list[Text]:
    """Write names beside points.

    Args:
        ax: of a figure whose layout is final.
        points: of data, (n, 2); all are in the axes.
        names: n.
        colours: n.
        size: of the text.

    Returns:
        The texts, in the order of the names.
    """
    figure = ax.get_figure(root=True)
    assert isinstance(figure, Figure)
    renderer = FigureCanvasAgg(figure).get_renderer()
    unit = figure.dpi / 72
    at = ax.transData.transform(points)
    texts = [ax.text(x, y, name, fontsize=size) for (x, y), name in zip(points, names, strict=True)]
    sizes = [text.get_window_extent(renderer) for text in texts]
    for text in texts:
        text.remove()
    frame = ax.get_window_extent(renderer)
    covered = [_box(centre, 2 * _POINT * unit, 2 * _POINT * unit) for centre in at]
    near = np.exp(-((at[:, None] - at[None]) ** 2).sum(-1) / (60 * unit) ** 2).sum(1)
    made: dict[int, Text] = {}
    for i in sorted(range(len(names)), key=lambda i: (-near[i], i)):
        width, height = sizes[i].width + 2 * _GAP * unit, sizes[i].height + 2 * _GAP * unit
        best, reach, least = np.zeros(2), 0.0, np.inf
        for distance in _DISTANCES:
            for direction in np.linspace(0, 2 * np.pi, _DIRECTIONS, endpoint=False):
                dx, dy = np.cos(direction), np.sin(direction)
                centre = at[i] + [dx * (distance * unit + width / 2), dy * (distance * unit + height / 2)]
                box = _box(centre, width, height)
                lost = _outside(box, (frame.x0, frame.y0, frame.x1, frame.y1))
                cost = sum(_overlap(box, other) for other in covered) + lost + 1e-6 * distance
                if cost < least:
                    best, reach, least = (centre - at[i]) / unit, distance, cost
            if least < 1e-3:
                break
        covered.append(_box(at[i] + best * unit, width, height))
        style: dict[str, Any] = {"fontsize": size, "color": colours[i], "ha": "center", "va": "center", "zorder": 4}
        if reach >= _LINED:
            style["arrowprops"] = {"arrowstyle": "-", "color": "#999999", "lw": 0.5, "shrinkA": 0, "shrinkB": 2}
        made[i] = ax.annotate(
            names[i], tuple(points[i].tolist()), (best[0], best[1]), textcoords="offset points", **style
        )
        made[i].set_in_layout(False)
    return [made[i] for i in range(len(names))]


_Box = tuple[float, float, float, float]


def _box(centre: Any, width: float, height: float) -> _Box:
    """A rectangle around a centre: left, bottom, right, top."""
    x, y = (float(value) for value in centre)
    return x - width / 2, y - height / 2, x + width / 2, y + height / 2


def _overlap(a: _Box, b: _Box) -> float:
    """The area that two rectangles share."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    return max(width, 0.0) * max(height, 0.0)


def _outside(box: _Box, frame: _Box) -> float:
    """The area of a rectangle that is outside a frame."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)
