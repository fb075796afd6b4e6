"""Ascents: what five adversaries do with the same network, from the runs that measured it.

    found = compared(runs)          # paired differences from plain cross-entropy's ascent, at the last mark
    section(found, runs)            # tables and sentences, in Markdown

A pair is one network at its last mark, displaced by an ascent and by plain cross-entropy's.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from math import isfinite, isnan, nan
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from bisam.experiments.markdown import table
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.reports.cells import NOTHING, cells_of, interval, probability, spread
from bisam.experiments.reports.drawing import BLACK, BLUE, ORANGE, RED, SKY, Style, heading, legend
from bisam.experiments.reports.groups import Groups, grouped, title
from bisam.experiments.reports.scales import share
from bisam.experiments.reports.significance import Tested, adjusted, student
from bisam.experiments.reports.svg import point
from bisam.experiments.runs.folder import Finished
from bisam.experiments.runs.results import ASCENTS, PLAIN_ASCENT, QUANTITIES
from bisam.experiments.studies.study import Primary
from bisam.experiments.training.ascents import RADIUS, SMOOTHING, STEPS
from bisam.experiments.training.ball import RADIUS as NEAR

NAMES = {
    PLAIN_ASCENT: "cross-entropy",
    "smoothed": "smoothed cross-entropy",
    "tanh": "BiSAM (tanh)",
    "log": "BiSAM (-log)",
    "log_5": "BiSAM (-log, mu 5)",
}
"""The ascents in words, in the order of `ASCENTS`."""
OTHERS = tuple(ascent for ascent in ASCENTS if ascent != PLAIN_ASCENT)
"""The ascents that are compared with plain cross-entropy's."""
TESTED = ("flips", "worst")
"""The quantities that are compared with plain cross-entropy's; each is a family of comparisons."""
PRIMARY = ("flips", "log")
"""The quantity and the ascent of the registered comparison."""
EXCESS = 0.2
"""Flips of BiSAM (-log) above those of SAM at the last epoch of figure 2 of Xie et al. (2024), as a share of SAM's.

Read off the authors' picture: about 1,485 and 1,220.
"""

_STYLES = {
    PLAIN_ASCENT: Style(BLACK, "-", "s"),
    "smoothed": Style(ORANGE, "--", "o"),
    "tanh": Style(SKY, "--", "v"),
    "log": Style(BLUE, "-", "^"),
    "log_5": Style(RED, "-.", "D"),
}


@dataclass(frozen=True, kw_only=True)
class Compared(Tested):
    """An ascent against plain cross-entropy's on the same networks, at the last mark.

    The difference is the ascent's value minus plain cross-entropy's, as a share of the examples, by network.

    Attributes:
        recipe: of the networks.
        ascent: one of `OTHERS`.
        quantity: one of `TESTED`; the comparisons of each are a family.
    """

    recipe: Recipe
    ascent: str
    quantity: str


def usable(runs: Iterable[Finished]) -> list[Finished]:
    """The runs that measured the ascents."""
    return [run for run in runs if run.recipe.measured_epochs and run.recipe.measured == "ascents"]


def column(quantity: str, ascent: str) -> str:
    """The name of a column of the metrics."""
    return f"{quantity}_by_{ascent}"


def compared(runs: Iterable[Finished], registered: Primary | None = None) -> list[Compared]:
    """The comparisons of all ascents with plain cross-entropy's at the last mark.

    Args:
        runs: finished runs; those without such measurements do not count.
        registered: of the study: `where` its networks are, with the seeds that test it; the ascent is `PRIMARY`.
    """
    found: list[Compared] = []
    for recipe, group in grouped(usable(runs)).items():
        here = registered is not None and all(recipe.setting(k) == value for k, value in registered.where.items())
        seeds = () if registered is None or registered.seeds is None else registered.seeds
        for quantity, ascent in product(TESTED, OTHERS):
            primary = here and (quantity, ascent) == PRIMARY
            networks = [run for run in group if run.recipe.seed in seeds] if primary and seeds else group
            if networks:
                values = [_last(run, quantity, ascent) - _last(run, quantity, PLAIN_ASCENT) for run in networks]
                found.append(
                    Compared(
                        recipe=recipe,
                        ascent=ascent,
                        quantity=quantity,
                        difference=student(values),
                        primary=primary,
                        registered=len(seeds),
                    )
                )
    return adjusted(found, lambda one: (one.quantity, one.primary))


def _last(run: Finished, quantity: str, ascent: str) -> float:
    return run.metrics[-1].get(column(quantity, ascent), nan)


def setting(recipe: Recipe) -> str:
    """What the networks of a recipe were trained with, in words."""
    noise = f"label noise {100 * recipe.noise:g} %" if recipe.noise else "no label noise"
    smoothing = f"label smoothing {recipe.label_smoothing:g}" if recipe.label_smoothing else "no label smoothing"
    return f"{title(recipe)}, {noise}, {smoothing}"


def rows(runs: Iterable[Finished]) -> list[dict[str, Any]]:
    """One row of numbers for each recipe, mark and ascent, for a CSV file; shares of 1, nan where not finite."""
    made: list[dict[str, Any]] = []
    for recipe, group in grouped(usable(runs)).items():
        about = {name: getattr(recipe, name) for name in ("dataset", "model", "method", "noise", "label_smoothing")}
        for epoch in _marks(recipe, group):
            errors = [run.metrics[epoch - 1]["ascents_error"] for run in group]
            for ascent in ASCENTS:
                row = {**about, "epoch": epoch, "ascent": ascent, "error_mean": mean(errors)}
                for quantity in QUANTITIES:
                    values = [run.metrics[epoch - 1][column(quantity, ascent)] for run in group]
                    row[f"{quantity}_mean"] = mean(values)
                    row[f"{quantity}_std"] = stdev(values) if len(values) > 1 else nan
                made.append({**row, "n": len(group), "recipe": recipe.slug})
    return made


def _marks(recipe: Recipe, group: Sequence[Finished]) -> list[int]:
    epochs = min(len(run.metrics) for run in group)
    return [epoch for epoch in range(1, epochs + 1) if recipe.is_measured(epoch, epochs)]


_TEST = ("difference", "p (Holm)", "detectable")
_ONE = ("ascent", f"flips, radius {NEAR:g} (%)", "flips (%)", *_TEST, "repaired (%)", "rise of the loss", "cosine")
_MORE = ("ascent", "largest error (%)", *_TEST)


def section(found: Sequence[Compared], runs: Iterable[Finished]) -> str:
    """The section of a report in Markdown; empty if no run measured the ascents.

    Args:
        found: as `compared` returns them.
        runs: the same runs.
    """
    groups = grouped(usable(runs))
    if not groups:
        return ""
    by = {(one.recipe, one.quantity, one.ascent): one for one in found}
    blocks = ["## What each ascent does with the same network, at the last mark", _EXPLANATION]
    for recipe, group in groups.items():
        error = spread([run.metrics[-1]["ascents_error"] for run in group], 100)
        blocks.append(f"**{setting(recipe)}** (n = {len(group)}; error at the weights {error} %)")
        blocks.append(table(_ONE, [_one(ascent, recipe, group, by) for ascent in ASCENTS]))
    blocks += [f"## The largest error after {STEPS} steps of each ascent, at the last mark", _STEPS]
    lines: list[tuple[str, ...]] = []
    for recipe, group in groups.items():
        for ascent in ASCENTS:
            values = [_last(run, "worst", ascent) for run in group]
            compared = cells_of(by.get((recipe, "worst", ascent)), 100)
            lines.append((setting(recipe), NAMES[ascent], spread(values, 100), *compared, f"{len(group)}"))
    blocks += [table(("networks", *_MORE, "n"), lines), *_words(found, groups), _READING]
    return "\n\n".join(blocks)


_EXPLANATION = (
    "All ascents start from the same weights, on the same batches. Flips: examples that are classified correctly at "
    f"the weights and wrongly after one step to the radius {RADIUS:g} (to {NEAR:g} in the first column), in per cent "
    "of the examples; each batch has a step of its own, as in training. Repaired: the reverse. Rise: of the training "
    "loss at that step, in nats. Cosine: of the angle between the step and plain cross-entropy's, mean over the "
    "batches. Numbers are mean ± standard deviation over n networks. Difference: flips minus plain cross-entropy's, "
    "paired by network, with its 95 % Student interval and the number of pairs. p (Holm): of the paired t test, "
    "adjusted over all comparisons of the flips but the primary one, which is tested by itself; a comparison is "
    "decided below 0.05. Detectable: the smallest true difference that this n shows with 80 % power, alone and after "
    "Holm's first step. A dash: there is no test, because the differences are equal in all networks or there is one "
    f"network. The smoothed cross-entropy has label smoothing {SMOOTHING:g}, also where the descent loss has none."
)
_STEPS = (
    f"{STEPS} steps of projected ascent in the ball of radius {RADIUS:g}, one displacement for all examples: the "
    "largest share of wrong predictions on the way, the error at the weights included. It is a lower bound of the "
    "largest error in the ball. Columns as above; p is adjusted over the comparisons of this table."
)
_READING = (
    "How to read this: an ascent that finds errors better than cross-entropy flips more examples and reaches a larger "
    "error *at the same radius on the same weights*. A cosine of 1 says that two ascents take the same step: whatever "
    "differs between methods that climb them, it is not the direction. A negative cosine says that an ascent leads "
    "downhill for plain cross-entropy: the smoothed loss rises where the network becomes more confident than its "
    "smoothed targets are. Nothing here is about test accuracy; flips do not say which method generalises better."
)


def _one(
    ascent: str,
    recipe: Recipe,
    group: Sequence[Finished],
    by: Mapping[tuple[Recipe, str, str], Compared],
) -> tuple[str, ...]:
    values = {quantity: [_last(run, quantity, ascent) for run in group] for quantity in QUANTITIES}
    written = {quantity: spread(of, 100) for quantity, of in values.items()}
    first = NAMES[ascent], written["flips_near"], written["flips"], *cells_of(by.get((recipe, "flips", ascent)), 100)
    return *first, written["repaired"], _finely(values["rise"]), _finely(values["cosine"])


def _finely(values: Sequence[float]) -> str:
    """Mean ± standard deviation with three digits; a dash if a value is not finite."""
    if not all(map(isfinite, values)):
        return NOTHING
    centre = f"{mean(values):.3f}".replace("-", "−")
    return f"{centre} ± {stdev(values):.3f}" if len(values) > 1 else centre


def answer(found: Sequence[Compared], runs: Iterable[Finished]) -> str:
    """The sentence of a report on the registered comparison, or else on the others; "" without comparisons.

    Args:
        found: as `compared` returns them.
        runs: the same runs.
    """
    said = _words(found, grouped(usable(runs)))
    return " ".join(said[: sum(one.primary for one in found)] or said)


def _words(found: Sequence[Compared], groups: Groups) -> list[str]:
    """Sentences on the registered comparison, and those that count the others."""
    said: list[str] = []
    for one in (one for one in found if one.primary):
        pairs, n = one.difference.pairs, one.registered
        verdict = "decided" if one.decided else "not decided"
        if pairs < n:
            verdict = f"interim, {pairs} of {n} networks: nothing is decided before all are there"
        said.append(
            f"Primary comparison, flips of {NAMES[one.ascent]} minus those of {NAMES[PLAIN_ASCENT]} "
            f"({setting(one.recipe)}), in per cent of the examples: {interval(one.difference, 100)}, "
            f"p {probability(one.adjusted)}; {verdict}.{_beside_figure2(one, groups[one.recipe])}"
        )
    for quantity, name in zip(TESTED, ("flips", "largest errors"), strict=True):
        others = [one for one in found if one.quantity == quantity and not one.primary]
        decided = [f"{NAMES[one.ascent]} ({setting(one.recipe)})" for one in others if one.decided]
        if others:
            which = f": {'; '.join(decided)}" if decided else ""
            said.append(f"Of {len(others)} exploratory comparisons of the {name} {len(decided)} are decided{which}.")
    return said


def _beside_figure2(one: Compared, group: Sequence[Finished]) -> str:
    """A sentence that compares the interval of the registered comparison with the excess of the paper's figure."""
    if isnan(one.difference.low):
        return ""
    excess = EXCESS * mean(_last(run, "flips", PLAIN_ASCENT) for run in group)
    inside = "in" if one.difference.low <= excess <= one.difference.high else "outside"
    return (
        f" An excess of {100 * EXCESS:g} % of cross-entropy's flips, as between the curves of -log and SAM at the last "
        f"epoch of the paper's figure 2, would be {100 * excess:+.2f}: {inside} the interval."
    )


def ascents(runs: Sequence[Finished]) -> Figure:
    """Flips, cosine and rise of the error of each ascent at the measured epochs; a row for each kind of networks.

    Raises:
        ValueError: no run measured the ascents.
    """
    groups = grouped(usable(runs))
    if not groups:
        raise ValueError("ascents shows runs that measured them, and there is none")
    figure = Figure(figsize=(9.6, 2.5 * len(groups) + 1.0), layout="constrained")
    grid = figure.subplots(len(groups), 3, squeeze=False, sharex="row")
    for (recipe, group), axes in zip(groups.items(), grid, strict=True):
        at = _marks(recipe, group)
        for ascent in ASCENTS:
            band = partial(
                _band, name=NAMES[ascent], style=_STYLES[ascent], x=at, seeds=[run.recipe.seed for run in group]
            )
            band(axes[0], values=100 * _values(group, at, column("flips", ascent)))
            band(axes[1], values=_values(group, at, column("cosine", ascent)))
            error = _values(group, at, "ascents_error")
            band(axes[2], values=100 * (_values(group, at, column("worst", ascent)) - error))
        fitted = _fitted(group, at)
        for ax, label in zip(axes, _LABELS, strict=True):
            ax.set_ylabel(label, fontsize=8)
            ax.grid(alpha=0.3)
            ax.set_xlim(left=0)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
            ax.tick_params(labelsize=8)
            if fitted is not None:
                ax.axvline(fitted, color=BLACK, linewidth=0.8, linestyle=":", label=_FITTED)
        axes[1].set_title(setting(recipe), fontsize=9)
        axes[1].axhline(0, color=BLACK, linewidth=0.5)
        axes[1].set_ylim(top=1.08)
        for ax in (axes[0], axes[2]):
            ax.set_ylim(bottom=0)
    for column_of_axes in grid.T:
        share(list(column_of_axes), "y")
    for ax in grid[-1]:
        ax.set_xlabel("epoch")
    heading(
        figure,
        f"What five ascents of radius {RADIUS:g} flip on the same networks, where they go, and how far the error rises",
        groups,
    )
    legend(figure, list(grid.flat))
    return figure


_LABELS = ("flips (% of examples)", "cosine to cross-entropy", f"rise of the error,\n{STEPS} steps (points)")
_FITTED = "99 % of the examples are fitted"


def _values(group: Sequence[Finished], at: Sequence[int], name: str) -> np.ndarray:
    return np.array([[run.metrics[epoch - 1][name] for epoch in at] for run in group])


def _fitted(group: Sequence[Finished], at: Sequence[int]) -> int | None:
    """The first mark from which on all networks are right on 99 % of the examples."""
    wrong = _values(group, at, "ascents_error").max(0) > 0.01
    unfitted = [i for i, value in enumerate(wrong) if value or not isfinite(value)]
    after = unfitted[-1] + 1 if unfitted else 0
    return at[after] if after < len(at) else None


def _band(ax: Axes, *, name: str, style: Style, x: Sequence[int], seeds: Sequence[int], values: np.ndarray) -> None:
    """The mean over the networks with a band of one standard deviation, at the marks where all are finite."""
    known = ~np.isnan(values).any(0)
    if not known.any():
        return
    at, values = np.array(x)[known], values[:, known]
    centre = values.mean(0)
    # Others lie on top of plain cross-entropy where they take the same step: it is drawn below them, and wider.
    wide = name == NAMES[PLAIN_ASCENT]
    line: dict[str, Any] = {**style.line, "linewidth": 2.6 if wide else 1.2, "markersize": 6 if wide else 3.5}
    ax.plot(at, centre, label=name, **line)
    for i in range(len(at)):
        by_seed = dict(zip(seeds, values[:, i].tolist(), strict=True))
        point(ax, float(at[i]), float(centre[i]), f"{name}, epoch {at[i]}", by_seed)
    if len(values) > 1:
        width = values.std(0, ddof=1)
        ax.fill_between(at, centre - width, centre + width, color=style.colour, alpha=0.15, linewidth=0)
