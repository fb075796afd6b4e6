"""Figures of a study, from run folders, in colours that colour-blind readers can tell apart (Okabe and Ito, 2008)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bisam.experiments.recipes import Recipe
from bisam.experiments.report import NAMES, grouped, perturbed
from bisam.experiments.runs import Finished, write

COLOURS = {
    "sgd": "#999999",
    "sam": "#E69F00",
    "bisam_log": "#0072B2",
    "bisam_tanh": "#56B4E9",
    "asam": "#009E73",
    "abisam_log": "#D55E00",
    "abisam_tanh": "#CC79A7",
}


def accuracy(runs: Sequence[Finished]) -> Figure:
    """Test accuracy by method, one panel for each label noise: with the best-validation and with the last weights."""
    groups = grouped(runs)
    noises = sorted({recipe.noise for recipe in groups})
    figure, axes = _panels(len(noises))
    for ax, noise in zip(axes, noises, strict=True):
        shown = [(recipe, group) for recipe, group in groups.items() if recipe.noise == noise]
        for i, (recipe, group) in enumerate(shown):
            for shift, when in ((-0.2, "best"), (0.2, "last")):
                values = [100 * run.result[f"test_accuracy_{when}"] for run in group]
                ax.bar(
                    i + shift,
                    np.mean(values),
                    0.38,
                    yerr=np.std(values, ddof=1) if len(values) > 1 else None,
                    capsize=3,
                    color=COLOURS[recipe.method],
                    alpha=1.0 if when == "best" else 0.55,
                    hatch=None if when == "best" else "//",
                    edgecolor="white",
                    ecolor="#333333",
                    zorder=2,
                )
                ax.plot(np.full(len(values), i + shift), values, ".", color="#333333", markersize=4, zorder=3)
        ax.set_xticks(range(len(shown)), [NAMES[recipe.method].replace(" ", "\n") for recipe, _ in shown])
        lowest = min(100 * run.result[f"test_accuracy_{w}"] for _, g in shown for run in g for w in ("best", "last"))
        ax.set_ylim(max(0.0, 5 * np.floor((lowest - 3) / 5)), 100)
        ax.set_title(f"label noise {100 * noise:g} %")
        ax.grid(axis="y", alpha=0.3, zorder=0)
    for hatch, alpha, label in ((None, 1.0, "best validation epoch"), ("//", 0.55, "last epoch")):
        axes[0].bar(0, 0, color="#666666", alpha=alpha, hatch=hatch, edgecolor="white", label=label)
    figure.legend(loc="outside lower center", ncols=2, frameon=False)
    n = sorted({len(group) for group in groups.values()})
    figure.supylabel("test accuracy (%)", fontsize="medium")
    figure.suptitle(f"Test accuracy, mean and standard deviation of {_range(n)} seeds (the axes do not start at 0)")
    return figure


def flips(runs: Sequence[Finished]) -> Figure:
    """Training samples that are right at w and wrong at w + e, per epoch (figure 2 of Xie et al., 2024)."""
    groups = grouped(perturbed(runs))
    noises = sorted({recipe.noise for recipe in groups})
    figure, axes = _panels(len(noises))
    for ax, noise in zip(axes, noises, strict=True):
        for recipe, group in groups.items():
            if recipe.noise == noise:
                _band(ax, recipe, np.array([[row["flipped"] for row in run.metrics] for run in group]))
        ax.set_title(f"label noise {100 * noise:g} %")
        ax.set_xlabel("epoch")
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    n = sorted({len(group) for group in groups.values()})
    figure.supylabel("training samples right at w, wrong at w + e", fontsize="medium")
    figure.suptitle(f"What the perturbation flips, mean and standard deviation of {_range(n)} seeds")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure; the suffix says which format."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:], dpi=150)
    write(path, buffer.getvalue())


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * count + 0.8, 4.4), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _band(ax: Axes, recipe: Recipe, values: np.ndarray) -> None:
    epochs, centre = np.arange(1, values.shape[1] + 1), values.mean(0)
    ax.plot(epochs, centre, color=COLOURS[recipe.method], label=NAMES[recipe.method])
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        ax.fill_between(epochs, centre - spread, centre + spread, color=COLOURS[recipe.method], alpha=0.18, linewidth=0)


def _range(n: list[int]) -> str:
    return f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
