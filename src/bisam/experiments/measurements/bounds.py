"""Figure 1: lower and upper bounds of the 0-1 loss, drawn from their formulas."""

from __future__ import annotations

from math import log
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from bisam import NegLog, Tanh
from bisam.experiments.measurements.measurement import Measurement, Row
from bisam.experiments.studies.papers import BISAM, Exhibit

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SHOWN = "BiSAM's lower bounds φ of the 0-1 loss of one margin, and upper bounds"
_NOTE = (
    f"{_SHOWN}. BiSAM's adversary does not climb φ but Q, the soft maximum of φ over the classes, the label's own "
    "among them: Q - log(K)/µ is a lower bound of the 0-1 loss, Q alone is not, and the gradient of Q vanishes on "
    "confident correct examples, where that of φ (-log) does not ([label-gradient](../label-gradient/report.md))."
)


def bounds(rows: list[Row]) -> Figure:
    """BiSAM's two lower bounds of the 0-1 loss as functions of a margin, and two upper bounds (Xie et al., 2024)."""
    from matplotlib.figure import Figure

    del rows  # the curves are formulas
    x = torch.linspace(-3, 3, 601, dtype=torch.float64)
    curves: dict[str, tuple[torch.Tensor, str, Any]] = {
        "BiSAM (-log): 1 − log(1 + exp(γ − F))": (NegLog().phi(x), "#0072B2", "-"),
        "BiSAM (tanh): tanh(αF), α = 1": (Tanh(alpha=1.0).phi(x), "#56B4E9", "--"),
        "hinge: max(0, 1 + F)": (F.relu(1 + x), "#E69F00", "-."),
        "cross-entropy: log(1 + exp F) / log 2": (F.softplus(x) / log(2), "#D55E00", (0, (1, 1))),
    }
    figure = Figure(figsize=(6.4, 5.3), layout="constrained")
    ax = figure.subplots()
    ax.plot([-3, 0, 0, 3], [0, 0, 1, 1], color="#000000", lw=2, label="0-1 loss: 1 where F > 0")
    for name, (y, colour, dashes) in curves.items():
        ax.plot(x, y, color=colour, ls=dashes, lw=1.8, label=name)
    ax.set_xlim(-3, 3)
    ax.set_xlabel("margin F of a wrong class over the label")
    ax.set_ylabel("loss")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=9)
    ax.set_title("Lower bounds of the 0-1 loss, for the ascent, and upper bounds", fontsize=11)
    return figure


FIGURE_1 = Measurement(
    name="figure1",
    title="Figure 1",
    summary="Figure 1: the bounds of the 0-1 loss",
    note=_NOTE,
    exhibit=Exhibit(BISAM, "Figure 1"),
    settings={},
    parts=lambda settings: [],
    measure=lambda part, settings, device: [],
    answer=lambda rows: (
        "Both bounds of BiSAM are below the 0-1 loss at every margin, and hinge and cross-entropy above it: formulas, "
        "without a measurement."
    ),
    columns={},
    figures={"figure1.png": (_SHOWN, bounds)},
)
