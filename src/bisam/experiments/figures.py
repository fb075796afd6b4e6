"""Figures of a study, from run folders, in colours that colour-blind readers can tell apart (Okabe and Ito, 2008)."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bisam.experiments.catalogue import FAMILIES, METHODS
from bisam.experiments.recipes import Recipe
from bisam.experiments.report import grouped, perturbed, title
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
FAMILY_COLOURS = {
    "plain": "#000000",
    "adversary": "#0072B2",
    "geometry": "#E69F00",
    "combining": "#009E73",
    "saving": "#CC79A7",
    "around": "#D55E00",
}
_MANY = 10


def _family_colour(recipe: Recipe) -> str:
    return FAMILY_COLOURS[METHODS[recipe.method].family] if recipe.method in METHODS else "#666666"


def _colour(recipe: Recipe) -> str:
    if recipe.method in COLOURS:
        return COLOURS[recipe.method]
    return _family_colour(recipe)


def accuracy(runs: Sequence[Finished]) -> Figure:
    """Test accuracy by method, one panel for each label noise: with the best-validation and with the last weights."""
    if len({recipe.method for recipe in grouped(runs)}) > _MANY:
        return _ranking(runs)
    groups = grouped(runs)
    noises = sorted({recipe.noise for recipe in groups})
    figure, axes = _panels(len(noises))
    for ax, noise in zip(axes, noises, strict=True):
        shown = [(recipe, group) for recipe, group in groups.items() if recipe.noise == noise]
        for i, (recipe, group) in enumerate(shown):
            for shift, when in ((-0.2, "best"), (0.2, "last")):
                values = [100 * run.result[f"test_{when}"] for run in group]
                ax.bar(
                    i + shift,
                    np.mean(values),
                    0.38,
                    yerr=np.std(values, ddof=1) if len(values) > 1 else None,
                    capsize=3,
                    color=_colour(recipe),
                    alpha=1.0 if when == "best" else 0.55,
                    hatch=None if when == "best" else "//",
                    edgecolor="white",
                    ecolor="#333333",
                    zorder=2,
                )
                ax.plot(np.full(len(values), i + shift), values, ".", color="#333333", markersize=4, zorder=3)
        ax.set_xticks(range(len(shown)), [title(recipe.method).replace(" ", "\n") for recipe, _ in shown])
        lowest = min(100 * run.result[f"test_{w}"] for _, g in shown for run in g for w in ("best", "last"))
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


def _ranking(runs: Sequence[Finished]) -> Figure:
    """Methods from the best to the worst, as dots: for more of them than bars can show."""
    groups = sorted(grouped(runs).items(), key=lambda item: np.mean(_accuracies(item[1], "last")))
    figure = Figure(figsize=(7.6, 0.24 * len(groups) + 1.4), layout="constrained")
    ax = figure.subplots()
    for i, (recipe, group) in enumerate(groups):
        for when, marker in (("best", "o"), ("last", "D")):
            values = _accuracies(group, when)
            filled = _family_colour(recipe) if when == "last" else "white"
            style: dict[str, Any] = {"color": _family_colour(recipe), "mfc": filled, "ms": 5, "capsize": 2, "lw": 1}
            shift = 0.12 if when == "best" else -0.12
            ax.errorbar(np.mean(values), i + shift, xerr=_std(values), fmt=marker, **style)
    ax.set_yticks(range(len(groups)), [_label(recipe) for recipe, _ in groups], fontsize=8)
    ax.set_ylim(-0.7, len(groups) - 0.3)
    ax.set_xlabel("test accuracy (%)")
    ax.grid(alpha=0.3)
    ax.plot([], [], "D", color="#444444", ms=5, label="last epoch")
    ax.plot([], [], "o", color="#444444", mfc="white", ms=5, label="best validation epoch")
    ax.legend(loc="lower right", fontsize=8)
    ax.set_title(f"{_noise(groups)}, mean and standard deviation of {_seeds(groups)} seeds", fontsize=10)
    return figure


def time(runs: Sequence[Finished]) -> Figure:
    """Accuracy against the time of a step: what each method gives for what it costs; where it is crowded, enlarged."""
    groups = sorted(grouped(runs).items(), key=lambda item: np.mean(_times(item[1])))
    figure = Figure(figsize=(11.5, 7.6), layout="constrained")
    ax, names = figure.subplots(1, 2, width_ratios=(3.6, 1))
    points = np.array([(np.mean(_times(group)), np.mean(_accuracies(group, "last"))) for _, group in groups])
    spreads = np.array([(_std(_times(group)) or 0, _std(_accuracies(group, "last")) or 0) for _, group in groups])
    colours = [_family_colour(recipe) for recipe, _ in groups]
    crowded = (np.abs(points / np.median(points, axis=0) - 1) < [0.15, 0.05]).all(1)
    everywhere, here = np.arange(len(groups)), np.flatnonzero(crowded)
    ax.set_xlabel("time of a step, relative to plain training")
    ax.set_ylabel("test accuracy with the last weights (%)")
    if len(here) > _MANY:
        inset = ax.inset_axes((0.17, 0.05, 0.8, 0.47))
        _cloud(inset, points, spreads, colours, here, here, reach=0.065)
        ax.indicate_inset_zoom(inset, edgecolor="#777777")
        inset.tick_params(labelsize=8)
        _cloud(ax, points, spreads, colours, everywhere, np.flatnonzero(~crowded))
    else:
        _cloud(ax, points, spreads, colours, everywhere, everywhere)
    for i, (recipe, _) in enumerate(groups):
        names.text(0.0, -i, f"{i + 1}", color=colours[i], fontsize=8.5, weight="bold", ha="right")
        names.text(0.06, -i, _label(recipe), fontsize=8.5)
    names.set_xlim(-0.1, 1)
    names.set_ylim(-len(groups) + 0.5, 1)
    names.axis("off")
    for family, colour in FAMILY_COLOURS.items():
        ax.plot([], [], "o", color=colour, label=FAMILIES[family])
    figure.legend(loc="outside lower center", ncols=3, fontsize=8.5, frameon=False)
    figure.suptitle(f"Accuracy against time, {_noise(groups)}, mean and standard deviation of {_seeds(groups)} seeds")
    return figure


def _cloud(
    ax: Axes,
    points: np.ndarray,
    spreads: np.ndarray,
    colours: Sequence[str],
    shown: np.ndarray,
    numbered: np.ndarray,
    reach: float = 0.036,
) -> None:
    """Points with spread, of which some have their number beside them, `reach` of the axes apart."""
    for i in shown:
        (x, y), (dx, dy) = points[i], spreads[i]
        ax.errorbar(x, y, dy, dx, fmt="o", color=colours[i], ms=4, lw=0.8, alpha=0.3, zorder=2)
        ax.plot(x, y, "o", color=colours[i], ms=4, zorder=3)
    ax.grid(alpha=0.3)
    line = {"arrowstyle": "-", "color": "#999999", "lw": 0.5}
    for i, place in zip(numbered, _apart(ax, points[numbered], reach), strict=True):
        style: dict[str, Any] = {"color": colours[i], "fontsize": 9, "weight": "bold", "ha": "center", "va": "center"}
        ax.annotate(f"{i + 1}", tuple(points[i]), tuple(place), arrowprops=line, zorder=4, **style)


def radius(runs: Sequence[Finished]) -> Figure:
    """Validation accuracy against the radius, a small panel for each method."""
    groups = grouped(perturbed(runs))
    methods = list(dict.fromkeys(recipe.method for recipe in groups))
    columns = min(6, len(methods))
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(2.1 * columns, 1.6 * rows + 0.6), layout="constrained")
    axes = list(figure.subplots(rows, columns, sharey=True, squeeze=False).flat)
    for ax, method in zip(axes, methods, strict=False):
        shown = [(r, [100 * run.result["validation_best"] for run in g]) for r, g in groups.items()]
        shown = [(r, values) for r, values in shown if r.method == method]
        rhos = [METHODS[method].rho if r.rho is None and method in METHODS else r.rho for r, _ in shown]
        means, spreads = [np.mean(values) for _, values in shown], [_std(values) or 0 for _, values in shown]
        ax.errorbar(rhos, means, spreads, fmt="o-", color=_family_colour(shown[0][0]), ms=3, lw=1, capsize=2)
        ax.set_xscale("log", base=2)
        ax.set_xticks(rhos, [f"{rho:g}" for rho in rhos], fontsize=7)
        ax.minorticks_off()
        ax.set_title(title(method), fontsize=8)
        ax.grid(alpha=0.3)
    for ax in axes[len(methods) :]:
        ax.axis("off")
    figure.supxlabel("rho, or what stands in its place", fontsize=9)
    figure.supylabel("best validation accuracy (%)", fontsize=9)
    figure.suptitle(f"The radius, {_noise(groups.items())}, {_seeds(groups.items())} seeds", fontsize=10)
    return figure


WHAT = {
    "accuracy": "Test accuracy by method",
    "flips": "Training samples that the perturbation flips",
    "time": "Test accuracy against the time of a step",
    "radius": "Validation accuracy against the radius",
}
"""What the figures show, by the names of the functions here."""


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


_Groups = Iterable[tuple[Recipe, Sequence[Finished]]]


def _accuracies(group: Iterable[Finished], when: str) -> list[float]:
    return [100 * run.result[f"test_{when}"] for run in group]


def _times(group: Iterable[Finished]) -> list[float]:
    return [run.result["relative_time"] for run in group]


def _std(values: Sequence[float]) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def _noise(groups: _Groups) -> str:
    noises = sorted({recipe.noise for recipe, _ in groups})
    return f"label noise {' and '.join(f'{100 * noise:g}' for noise in noises)} %"


def _seeds(groups: _Groups) -> str:
    return _range(sorted({len(group) for _, group in groups}))


def _label(recipe: Recipe) -> str:
    """The method; SGD with its epochs, of which it may have more than the others."""
    return f"{title(recipe.method)}, {recipe.epochs} epochs" if recipe.method == "sgd" else title(recipe.method)


def _apart(ax: Axes, points: np.ndarray, reach: float) -> np.ndarray:
    """Places for labels near the points, in the axes' units: each pushes the others and the points away."""
    ax.autoscale_view()
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    size = np.array([right - left, top - bottom])
    anchors = (points - [left, bottom]) / size
    random = np.random.default_rng(0)
    places = anchors + random.normal(0, 0.004, anchors.shape) + [0, 0.02]
    for _ in range(300):
        push = np.zeros_like(places)
        for others, apart in ((places, reach), (anchors, 0.72 * reach)):
            gap = places[:, None] - others[None]
            distance = np.linalg.norm(gap * [1.4, 1.0], axis=-1)  # the axes are wider than high
            near = (distance < apart) & (distance > 0)
            push += (gap / np.maximum(distance, 1e-6)[..., None] * ((apart - distance) * near)[..., None]).sum(1)
        places = np.clip(places + 0.5 * push - 0.02 * (places - anchors), 0.012, 0.985)
    return places * size + [left, bottom]


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(5.2 * count + 0.8, 4.4), layout="constrained")
    return figure, list(figure.subplots(1, count, squeeze=False)[0])


def _band(ax: Axes, recipe: Recipe, values: np.ndarray) -> None:
    epochs, centre = np.arange(1, values.shape[1] + 1), values.mean(0)
    ax.plot(epochs, centre, color=_colour(recipe), label=title(recipe.method))
    if len(values) > 1:
        spread = values.std(0, ddof=1)
        ax.fill_between(epochs, centre - spread, centre + spread, color=_colour(recipe), alpha=0.18, linewidth=0)


def _range(n: list[int]) -> str:
    return f"{n[0]}" if len(n) == 1 else f"{n[0]} to {n[-1]}"
