"""Figures of quantities by epoch: scores, losses, flipped samples, gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from bisam.experiments.reports.drawing import MANY, Panel, Style, heading, legend, panels, plain, sheet, styles
from bisam.experiments.reports.groups import Groups, grouped, measured, names, perturbed
from bisam.experiments.runs.folder import Finished
from bisam.experiments.studies.published import in_sequence


def curves(runs: Sequence[Finished]) -> Figure:
    """Validation score and training loss at each epoch."""
    groups = grouped(runs)
    shown = panels(groups, MANY)
    figure, axes = sheet(2 * len(shown), (5.0, 3.1), columns=_columns(groups, shown))
    for panel, styled, score, loss in zip(shown, _styled(groups, shown), axes[::2], axes[1::2], strict=True):
        for _, name, group in panel.shown:
            _band(score, name, styled[name], 100 * _epochs(group, "validation"))
            _band(loss, name, styled[name], _epochs(group, "train_loss"))
        _focus(score)
        score.set_ylabel(f"validation {panel.metric}")
        loss.set_ylabel("training loss (nats)")
        for ax in (score, loss):
            ax.set_title(plain(panel.title, 60), fontsize=10)
            _by_epoch(ax)
    heading(figure, "Training", groups)
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
            _band(ax, name, styled[name], _epochs(group, "flipped"))
        ax.set_title(plain(panel.title, 60), fontsize=10)
        _by_epoch(ax)
        ax.set_ylabel("samples right at w, wrong at w + e")
        ax.set_ylim(bottom=0)
        _share(ax, panel)
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
                _band(ax, name, styled[name], 100 * _epochs(group, column)[:, at - 1], at)
        for ax, label in ((largest, "largest error in the ball (%)"), (error, "error at the weights (%)")):
            ax.set_title(plain(panel.title, 60), fontsize=10)
            ax.set_ylabel(label)
            ax.set_ylim(bottom=0)
            _by_epoch(ax)
    heading(figure, "Largest error that ascent finds in one ball for all methods, on training examples", groups)
    _legend(figure, groups, axes[::2])
    return figure


def gradients(runs: Sequence[Finished]) -> Figure:
    """Validation score against the number of gradients and against time."""
    groups = grouped(runs)
    shown = panels(groups, MANY)
    figure, axes = sheet(2 * len(shown), (5.2, 3.5), columns=_columns(groups, shown))
    for panel, styled, counted, timed in zip(shown, _styled(groups, shown), axes[::2], axes[1::2], strict=True):
        apart = False
        for recipe, name, group in panel.shown:
            score = 100 * _epochs(group, "validation")
            spent = _epochs(group, "gradients") * _epochs(group, "losses")
            waited = np.vectorize(lambda g, recipe=recipe: in_sequence(recipe, g))(_epochs(group, "gradients"))
            waited = waited * _epochs(group, "losses")
            _band(counted, name, styled[name], score, waited.cumsum(1).mean(0))
            if not np.allclose(waited, spent):
                apart = True
                line: dict[str, Any] = {"color": styled[name].colour, "linestyle": ":", "linewidth": 1}
                counted.plot(spent.cumsum(1).mean(0), score.mean(0), label=f"{name}, all gradients", **line)
            _band(timed, name, styled[name], score, _epochs(group, "seconds").cumsum(1).mean(0))
        for ax in (counted, timed):
            _focus(ax)
            ax.set_title(plain(panel.title, 60), fontsize=10)
            ax.set_ylabel(f"validation {panel.metric}")
        counted.set_xlabel("batch gradients in sequence" + (" (SAMPa's two at once count as one)" if apart else ""))
        counted.xaxis.set_major_formatter(EngFormatter(sep=""))
        timed.set_xlabel("seconds of training" + (" (SAMPa's two one after the other)" if apart else ""))
    heading(figure, "Score against gradients, and against time", groups)
    _legend(figure, groups, axes[::2])
    return figure


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


def _band(ax: Axes, name: str, style: Style, values: np.ndarray, x: np.ndarray | None = None) -> None:
    """Plot the mean over the runs (n, epochs) with a band of one standard deviation, where all runs have a value."""
    known = ~np.isnan(values).any(0)
    if not known.any():
        return
    whole, (values, x) = known.all(), (values[:, known], (np.arange(1, values.shape[1] + 1) if x is None else x)[known])
    name = name if whole else f"{name} (not finite in all epochs)"
    centre = values.mean(0)
    ax.plot(x, centre, label=plain(name), markevery=max(1, len(x) // 8), linewidth=1.4, **style.line)
    if len(values) > 1:
        width = values.std(0, ddof=1)
        ax.fill_between(x, centre - width, centre + width, color=style.colour, alpha=0.15, linewidth=0)
    ax.grid(alpha=0.3)


def _by_epoch(ax: Axes) -> None:
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))


def _focus(ax: Axes) -> None:
    """Set the limits without the low scores of the first epochs, which would compress the rest."""
    lines = [np.asarray(line.get_ydata(), float) for line in ax.get_lines()]
    if not lines:
        return
    late = np.concatenate([y[len(y) // 5 :] for y in lines])
    low, high = late.min(), max(y.max() for y in lines)
    ax.set_ylim(low - 0.15 * (high - low + 1), high + 0.1 * (high - low + 1))


def _share(ax: Axes, panel: Panel) -> None:
    """Add an axis in per cent of the training set, if its size is known and equal in all runs."""
    examples = {run.result.get("examples") for *_, group in panel.shown for run in group}
    if len(examples) == 1 and (n := examples.pop()):
        share = ax.secondary_yaxis(
            "right", functions=(lambda y: np.asarray(y) * 100 / n, lambda y: np.asarray(y) * n / 100)
        )
        share.set_ylabel("% of the training set")
