"""The example of Section 2.2: an adversary that maximises an upper bound picks the wrong option."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from bisam import NegLog, Tanh
from bisam.experiments.measurements.measurement import Measurement, Row, Settings
from bisam.experiments.studies.papers import BISAM, Exhibit
from bisam.objectives import LowerBound

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def option_a(classes: int, delta: float) -> Tensor:
    """Scores (K,) that are barely correct: 1/K + delta for the label 0, equal parts of the rest for the others."""
    scores = torch.full((classes,), 1 / classes - delta / (classes - 1), dtype=torch.float64)
    scores[0] = 1 / classes + delta
    return scores


def option_b(classes: int, delta: float) -> Tensor:
    """Scores (K,) that are barely incorrect: 1/2 - delta for the label 0, and the rest for another class."""
    scores = torch.zeros(classes, dtype=torch.float64)
    scores[0], scores[1] = 0.5 - delta, 0.5 + delta
    return scores


_BOUNDS: dict[str, LowerBound] = {"tanh": Tanh(), "log": NegLog()}


def _example_parts(settings: Settings) -> list[str]:
    for classes in settings["classes"]:
        if classes < 2:
            raise ValueError(f"setting classes must be at least 2, got {classes}")
    for delta in settings["deltas"]:
        if not 1e-6 <= delta < 0.5:
            raise ValueError(f"setting deltas must be in [1e-6, 0.5), got {delta}")
    return [str(classes) for classes in settings["classes"]]


def _measure_example(part: str, settings: Settings, device: torch.device) -> list[dict[str, Any]]:
    del device  # exact values, not times
    rows: list[dict[str, Any]] = []
    for delta in settings["deltas"]:
        scores = torch.stack([option(int(part), delta) for option in (option_a, option_b)])
        labels = torch.zeros(2, dtype=torch.int64)
        row: dict[str, Any] = {"classes": int(part), "delta": delta}
        row |= _options("error", (scores.argmax(1) != labels).double())
        row |= _options("cross_entropy", -scores[:, 0].log())
        for name, bound in _BOUNDS.items():
            row |= _options(name, bound.phi(scores - scores[:, :1]).amax(1))
            row |= _options(f"{name}_soft", bound(scores, labels) - math.log(int(part)) / cast(float, bound.mu))
            row[f"{name}_mu"] = _mu_for_b(bound, scores, labels)
        rows.append(row)
    return rows


def _options(name: str, values: Tensor) -> dict[str, Any]:
    a, b = values.tolist()
    return {f"{name}_a": a, f"{name}_b": b, f"{name}_picks": "A" if a > b else "B"}


def _mu_for_b(bound: LowerBound, scores: Tensor, labels: Tensor) -> float:
    """The smallest power of ten as mu for which the soft maximum over the classes is larger for B."""
    mu = 1.0
    while (q := LowerBound(bound.phi, mu)(scores, labels))[0] >= q[1]:
        mu *= 10
    return mu


def _example_figure(rows: list[Row]) -> Figure:
    """The objectives of both adversaries at both options."""
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: (row["classes"], row["delta"]))
    classes, deltas = (sorted({row[key] for row in rows}) for key in ("classes", "delta"))
    figure = Figure(figsize=(10.4, 4.0), layout="constrained")
    left, right = figure.subplots(1, 2)
    style: dict[str, Any] = {"marker": "o", "markersize": 4}
    for option, colour, name in (("a", "#E69F00", "A, right"), ("b", "#0072B2", "B, wrong")):
        of_classes = [row for row in rows if row["delta"] == deltas[0]]
        of_delta = [row for row in rows if row["classes"] == classes[-1]]
        left.plot(
            [row["classes"] for row in of_classes],
            [row[f"cross_entropy_{option}"] for row in of_classes],
            color=colour,
            label=name,
            **style,
        )
        for bound, line, written in (("log", "-", "-log"), ("tanh", "--", "tanh")):
            right.plot(
                [row["delta"] for row in of_delta],
                [row[f"{bound}_{option}"] for row in of_delta],
                line,
                color=colour,
                label=f"{name} ({written})",
                **style,
            )
    left.set(xscale="log", xlabel="classes K", ylabel="cross-entropy", ylim=(0, None))
    left.set_title(f"An upper bound of the 0-1 loss (δ = {deltas[0]:g})", fontsize=11)
    right.set(xscale="log", xlabel="δ", ylabel="largest φ over the classes")
    right.set_yscale("symlog", linthresh=1e-4)
    right.set_ylim(-3e-5, None)
    right.set_title(f"A lower bound of it (K = {classes[-1]})", fontsize=11)
    for ax in (left, right):
        ax.grid(alpha=0.3)
        ax.legend(fontsize=8)
    return figure


def _answer(rows: list[Row]) -> str:
    def count(key: str, option: str) -> int:
        return sum(row[key] == option for row in rows)

    bounds = sum(all(row[f"{name}_picks"] == "B" for name in _BOUNDS) for row in rows)
    soft = sum(all(row[f"{name}_soft_picks"] == "B" for name in _BOUNDS) for row in rows)
    return (
        f"Of {len(rows)} cases cross-entropy picks B, the error, in {count('cross_entropy_picks', 'B')}, both bounds "
        f"pick it in {bounds}, and their soft maximum with the paper's µ in {soft}: exact values, without a test."
    )


EXAMPLE = Measurement(
    name="example",
    title="The example of Section 2.2: which option the adversary picks",
    note=(
        "The adversary chooses between two vectors of scores (here probabilities) for an example of class 1: A = "
        "(1/K + δ, 1/K - δ/(K-1), ...) is classified correctly, B = (1/2 - δ, 1/2 + δ, 0, ...) incorrectly. It "
        "should pick B, the error. With cross-entropy (CE) it picks A, where the loss -log(1/K + δ) grows without "
        "bound as K grows and δ falls. With the lower bound of the 0-1 loss, the largest φ(F) over the classes, it "
        "picks B: the bound is φ(0) = 0 for A and φ(2δ) > 0 for B (tanh with slope 0.1, -log). The algorithm, "
        "however, maximises a soft maximum over the classes, which cannot resolve differences below about log(K)/µ, "
        "and in A all K classes are close to the label: the column for the paper's µ (10 for tanh, 1 for -log) shows "
        "its choice. The last column is the smallest power of ten as µ for which it picks B. Exact values in float64."
    ),
    exhibit=Exhibit(BISAM, "Section 2.2"),
    settings={"classes": (10, 100, 1000, 10000), "deltas": (0.1, 0.01, 0.001)},
    parts=_example_parts,
    measure=_measure_example,
    answer=_answer,
    columns={
        "K": lambda row: str(row["classes"]),
        "δ": lambda row: f"{row['delta']:g}",
        "CE of A": lambda row: f"{row['cross_entropy_a']:.3f}",
        "CE of B": lambda row: f"{row['cross_entropy_b']:.3f}",
        "CE picks": lambda row: row["cross_entropy_picks"],
        **{
            f"{written} {what}": lambda row, key=f"{name}_{option}": f"{row[key]:.2g}"
            for name, written in (("tanh", "tanh"), ("log", "-log"))
            for option, what in (("a", "of A"), ("b", "of B"))
        },
        "bounds pick": lambda row: ", ".join(row[f"{name}_picks"] for name in _BOUNDS),
        "soft with the paper's µ": lambda row: ", ".join(row[f"{name}_soft_picks"] for name in _BOUNDS),
        "µ for B": lambda row: ", ".join(f"{row[f'{name}_mu']:g}" for name in _BOUNDS),
    },
    figures={"example.png": ("Cross-entropy and the lower bounds of both options", _example_figure)},
)
