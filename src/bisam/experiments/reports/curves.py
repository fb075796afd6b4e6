"""Figures of quantities by epoch: scores, losses, flipped samples, gradients."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.choice import validation_score
from bisam.experiments.reports.drawing import (
    MANY,
    Panel,
    Style,
    extreme,
    heading,
    legend,
    panels,
    plain,
    sheet,
    styles,
    titled,
)
from bisam.experiments.reports.groups import Groups, Place, grouped, measured, names, perturbed, place, title
from bisam.experiments.reports.scales import ERROR_SCALE, fit_scores, share, widen_scores, widen_values
from bisam.experiments.reports.svg import point
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.results import training_labels
from bisam.experiments.studies.published import in_sequence


def curves(runs: Sequence[Finished]) -> Figure:
    """Validation score and training loss at each epoch; of a method with many settings, those of the best one."""
    groups, chosen = _shown(grouped(runs))
    shown = panels(groups, MANY)
    figure, axes = sheet(2 * len(shown), (5.0, 3.1), columns=_columns(groups, shown))
    for panel, styled, score, loss in zip(shown, _styled(groups, shown), axes[::2], axes[1::2], strict=True):
        for _, name, group in panel.shown:
            _band(score, name, styled[name], group, 100 * _epochs(group, "validation"))
            _band(loss, name, styled[name], group, _epochs(group, "train_loss"))
        score.set_ylabel(f"validation {panel.metric}")
        loss.set_ylabel("training loss (nats)")
        score.set_title(_seen(panel, "highest at the end", lambda group: -_epochs(group, "validation")), fontsize=10)
        loss.set_title(_seen(panel, "lowest at the end", lambda group: _epochs(group, "train_loss")), fontsize=10)
        for ax in (score, loss):
            _by_epoch(ax)
    _scale_scores(axes[::2], shown)
    if not widen_values(axes[1::2], "y", _means(axes[1::2])):
        for ax in axes[1::2]:
            _focus(ax, falling=True)
    share(axes[1::2], "y")
    heading(figure, "Validation score and training loss after each epoch" + chosen, groups)
    _legend(figure, groups, axes[1::2])
    return figure


def flips(runs: Sequence[Finished]) -> Figure:
    """Training samples classified correctly at w and incorrectly at w + e, per epoch (figure 2 of Xie et al., 2024).

    Raises:
        ValueError: no run perturbs the weights.
    """
    groups = grouped(perturbed(runs))
    if not groups:
        raise ValueError("flips shows runs that perturb the weights, and there is none")
    shown = panels(groups, MANY)
    figure, axes = sheet(len(shown), (5.2, 3.8))
    for panel, styled, ax in zip(shown, _styled(groups, shown), axes, strict=True):
        for _, name, group in panel.shown:
            _band(ax, name, styled[name], group, _epochs(group, "flipped"))
        ax.set_title(_seen(panel, "fewest at the end", lambda group: _epochs(group, "flipped")), fontsize=10)
        _by_epoch(ax)
        ax.set_ylabel("samples right at w, wrong at w + e")
    if not widen_values(axes, "y", _means(axes)):
        for ax in axes:
            ax.set_ylim(bottom=0)
    share(axes, "y")
    for panel, ax in zip(shown, axes, strict=True):
        _share_of_all(ax, panel)
    unknown = {name for panel in shown for _, name, group in panel.shown if np.isnan(_epochs(group, "flipped")).any()}
    left = plain(f"without {', '.join(sorted(unknown))}: part of their batch is left out", 80) if unknown else ""
    heading(figure, "\n".join(["Training samples that the perturbation flips", *left.splitlines()]), groups)
    _legend(figure, groups, axes)
    return figure


def ball(runs: Sequence[Finished]) -> Figure:
    """Error at the weights and largest error in a ball, after the measured epochs (equation 5 of Xie et al., 2024).

    Raises:
        ValueError: no run has measured epochs.
    """
    groups = grouped(measured(runs))
    if not groups:
        raise ValueError("ball shows runs with measured epochs, and there is none")
    shown = panels(groups, MANY)
    figure, axes = sheet(2 * len(shown), (5.0, 3.4), columns=_columns(groups, shown))
    for panel, styled, largest, error in zip(shown, _styled(groups, shown), axes[::2], axes[1::2], strict=True):
        for recipe, name, group in panel.shown:
            epochs = max(len(run.metrics) for run in group)
            at = np.array([epoch for epoch in range(1, epochs + 1) if recipe.is_measured(epoch, epochs)])
            for ax, column in ((largest, "ball_worst"), (error, "ball_error")):
                _band(ax, name, styled[name], group, 100 * _epochs(group, column)[:, at - 1], epochs=at)
        for ax, column, label in (
            (largest, "ball_worst", "largest error in the ball (%)"),
            (error, "ball_error", "error at the weights (%)"),
        ):
            seen = _seen(panel, "lowest at the end", lambda group, column=column: _epochs(group, column))
            ax.set_title(seen, fontsize=10)
            ax.set_ylabel(label)
            _by_epoch(ax)
    for some in (axes[::2], axes[1::2]):
        if not widen_values(some, "y", _means(some)):
            for ax in some:
                ax.set_ylim(bottom=0)
        share(some, "y")
    heading(figure, "Largest error that ascent finds in one ball for all methods, on training examples", groups)
    _legend(figure, groups, axes[::2])
    return figure


def gradients(runs: Sequence[Finished]) -> Figure:
    """Validation score against the number of gradients and against time."""
    groups, chosen = _shown(grouped(runs))
    shown = panels(groups, MANY)
    figure, axes = sheet(2 * len(shown), (5.2, 3.5), columns=_columns(groups, shown))
    for panel, styled, counted, timed in zip(shown, _styled(groups, shown), axes[::2], axes[1::2], strict=True):
        apart = False
        for recipe, name, group in panel.shown:
            score = 100 * _epochs(group, "validation")
            spent = _epochs(group, "gradients") * _epochs(group, "losses")
            waited = np.vectorize(lambda g, recipe=recipe: in_sequence(recipe, g))(_epochs(group, "gradients"))
            waited = waited * _epochs(group, "losses")
            _band(counted, name, styled[name], group, score, waited.cumsum(1).mean(0))
            if not np.allclose(waited, spent):
                apart = True
                line: dict[str, Any] = {"color": styled[name].colour, "linestyle": ":", "linewidth": 1}
                counted.plot(spent.cumsum(1).mean(0), score.mean(0), label=f"{name}, all gradients", **line)
            _band(timed, name, styled[name], group, score, _epochs(group, "seconds").cumsum(1).mean(0))
        for ax in (counted, timed):
            ax.set_title(plain(panel.title, 60), fontsize=10)
            ax.set_ylabel(f"validation {panel.metric}")
        counted.set_xlabel("batch gradients in sequence" + (" (SAMPa's two at once count as one)" if apart else ""))
        counted.xaxis.set_major_formatter(EngFormatter(sep=""))
        timed.set_xlabel("seconds of training" + (" (SAMPa's two one after the other)" if apart else ""))
    _scale_scores(axes, [panel for panel in shown for _ in range(2)])
    heading(figure, "Validation score for the gradients, and for the time, that were spent" + chosen, groups)
    _legend(figure, groups, axes[::2])
    return figure


def _shown(groups: Groups) -> tuple[Groups, str]:
    """The groups, and words for the title: of a method with many settings in a place, the one that validates best."""
    kin = defaultdict[tuple[Place, str], list[Recipe]](list)
    for recipe in groups:
        kin[place(recipe), title(recipe)].append(recipe)
    if max(Counter(place(recipe) for recipe in groups).values()) <= MANY or all(len(some) < 3 for some in kin.values()):
        return groups, ""

    def score(recipe: Recipe) -> float:
        value = float(np.mean([validation_score(run) for run in groups[recipe]]))
        return value if np.isfinite(value) else -np.inf

    best = {max(some, key=score) for some in kin.values()}
    chosen = {recipe: group for recipe, group in groups.items() if recipe in best}
    return chosen, ", of each method with the setting that validates best"


def _seen(panel: Panel, words: str, column: Callable[[Sequence[Finished]], np.ndarray]) -> str:
    """The title of a panel, and which method has the smallest mean at its last epoch that all its runs have."""
    ends: dict[str, float] = {}
    for _, name, group in panel.shown:
        means = column(group).mean(0)
        if (known := means[np.isfinite(means)]).size:
            ends[name] = float(known[-1])
    return titled(panel.title, extreme(words, ends))


def _means(axes: Sequence[Axes]) -> list[np.ndarray]:
    """The values of all lines."""
    return [np.asarray(line.get_ydata(), float) for ax in axes for line in ax.get_lines()] or [np.empty(0)]


def _scale_scores(axes: Sequence[Axes], shown: Sequence[Panel]) -> None:
    """A logarithmic scale of the error where scores come near 100 %; otherwise without the first epochs."""
    accuracies = all(panel.metric.startswith("accuracy") for panel in shown)
    if accuracies and widen_scores(axes, "y", values := _means(axes)):
        fit_scores(axes, "y", values)
        for ax in axes:
            ax.set_ylabel(ax.get_ylabel() + ERROR_SCALE)
        return
    for ax in axes:
        _focus(ax)
    share(axes, "y")


def _styled(groups: Groups, shown: Sequence[Panel]) -> list[dict[str, Style]]:
    """Styles for each panel: the same in all panels, unless there are too many names."""
    called = names(groups)
    return [panel.styles if _crowded(groups) else styles(called) for panel in shown]


def _crowded(groups: Groups) -> bool:
    return len(set(names(groups).values())) > MANY


def _columns(groups: Groups, shown: Sequence[Panel]) -> int:
    """Number of columns of axes: two pairs side by side if there are many panels and no legends between them."""
    return 4 if len(shown) > 3 and not _crowded(groups) else 2


def _legend(figure: Figure, groups: Groups, axes: Sequence[Axes]) -> None:
    legend(figure, axes, shared=not _crowded(groups))


def _epochs(group: Sequence[Finished], column: str) -> np.ndarray:
    """A column of the metrics (runs, epochs); nan where a run has no such epoch."""
    # Runs of steps on different numbers of devices can have different numbers of epochs.
    epochs = max(len(run.metrics) for run in group)
    values = np.full((len(group), epochs), np.nan)
    for i, run in enumerate(group):
        values[i, : len(run.metrics)] = [row.get(column, np.nan) for row in run.metrics]
    return values


def _band(
    ax: Axes,
    name: str,
    style: Style,
    group: Sequence[Finished],
    values: np.ndarray,
    x: np.ndarray | None = None,
    epochs: np.ndarray | None = None,
) -> None:
    """Plot the mean over the runs (n, epochs) with a band of one standard deviation, where all runs have a value.

    Args:
        ax: the axes.
        name: of the line.
        style: of the line.
        group: the runs.
        values: of each run, a column for each epoch.
        x: places of the columns; by default the epochs.
        epochs: of the columns; by default 1, 2, ...
    """
    epochs = np.arange(1, values.shape[1] + 1) if epochs is None else epochs
    known = ~np.isnan(values).any(0)
    if not known.any():
        return
    name = name if known.all() else f"{name} (not finite in all epochs)"
    values, x, epochs = values[:, known], (epochs if x is None else x)[known], epochs[known]
    centre, every = values.mean(0), max(1, len(epochs) // 8)
    ax.plot(x, centre, label=plain(name), markevery=every, linewidth=1.4, **style.line)
    seeds = [run.recipe.seed for run in group]
    for i in sorted({*range(0, len(x), every), len(x) - 1}):
        by_seed = dict(zip(seeds, values[:, i].tolist(), strict=True))
        point(ax, float(x[i]), float(centre[i]), f"{name}, epoch {epochs[i]}", by_seed)
    if len(values) > 1:
        width = values.std(0, ddof=1)
        ax.fill_between(x, centre - width, centre + width, color=style.colour, alpha=0.15, linewidth=0)
    ax.grid(alpha=0.3)


def _by_epoch(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _focus(ax: Axes, *, falling: bool = False) -> None:
    """Set the limits without the first epochs, whose low scores or large losses would compress the rest.

    Args:
        ax: with a line for each method.
        falling: whether the values fall, as a loss does.
    """
    lines = [y[np.isfinite(y)] for y in _means([ax]) if len(y) > 1]
    lines = [y for y in lines if len(y)]
    if not lines:
        return
    late = np.concatenate([y[len(y) // 5 :] for y in lines])
    if falling:
        low, high = min(y.min() for y in lines), late.max()
        ax.set_ylim(low - 0.1 * (high - low), high + 0.15 * (high - low) + 1e-9)
        return
    low, high = late.min(), max(y.max() for y in lines)
    ax.set_ylim(low - 0.15 * (high - low + 1), high + 0.1 * (high - low + 1))


def _share_of_all(ax: Axes, panel: Panel) -> None:
    """Add an axis in per cent of the training set, if its size is known and equal in all runs."""
    sizes = {training_labels(run.result) for *_, group in panel.shown for run in group}
    if len(sizes) == 1 and np.isfinite(n := sizes.pop()):
        share = ax.secondary_yaxis(
            "right", functions=(lambda y: np.asarray(y) * 100 / n, lambda y: np.asarray(y) * n / 100)
        )
        share.set_ylabel("% of the training set")
