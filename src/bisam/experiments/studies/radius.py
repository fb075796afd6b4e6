"""Radius: whether an adversary forgives a radius that is too large.

The first study of a pair trains every method with a grid of radii. The second, for SAM and BiSAM (-log) alone, trains
fresh seeds with the optimum that the first one found for each of the two, with half of it and with twice of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bisam.experiments.recipes.catalogue import PLAIN
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.study import Study

METHOD = "bisam_log"
"""The method whose regret is compared with SAM's."""
NOISES = (0.0, 0.4)
FACTOR = 2.0
"""How much too large the radius of the primary comparison is."""

_STEPS = (1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.2)  # by a factor of sqrt(2), rounded so that every second is twice
_DECAYS = tuple(5e-4 * 2**i for i in range(8))
_METHODS = ("sam", "sam_ce", "bisam_log", "bisam_tanh", "asam")
_SMOOTHING = 0.1
_GRID_SEEDS, _FIRST_GRID = 12, 400
_SEEDS, _FIRST = 60, 500


def grid(base: Recipe, least: dict[str, float]) -> Callable[[int | None], list[Recipe]]:
    """The recipes of a grid of radii.

    Args:
        base: the data set, the network and the length.
        least: the smallest of the eight radii of each method.
    """

    def recipes(epochs: int | None) -> list[Recipe]:
        one = replace(base, label_smoothing=_SMOOTHING, epochs=epochs or base.epochs)
        # SGD trains for twice the epochs, so that all methods compute the same number of gradients.
        plain = [replace(one.times(2), method=PLAIN, weight_decay=decay) for decay in _DECAYS]
        others = [
            replace(one, method=method, rho=round(first * step, 10))
            for method, first in least.items()
            for step in _STEPS
        ]
        return [replace(recipe, noise=noise) for noise in NOISES for recipe in (*plain, *others)]

    return recipes


def around(base: Recipe, optima: dict[tuple[str, float], float]) -> Callable[[int | None], list[Recipe]]:
    """The recipes at the optimum of each method and noise level, at half and at twice of it.

    Args:
        base: the data set, the network and the length.
        optima: the optimum by method and noise.
    """

    def recipes(epochs: int | None) -> list[Recipe]:
        one = replace(base, label_smoothing=_SMOOTHING, epochs=epochs or base.epochs)
        return [
            replace(one, method=method, noise=noise, rho=round(factor * rho, 10))
            for (method, noise), rho in optima.items()
            for factor in (1 / FACTOR, 1.0, FACTOR)
        ]

    return recipes


_COMPARED = (
    "*Primary comparison*, fixed before the first run of either study: the regret of a radius that is too large by a "
    f"factor of {FACTOR:g}, which is the test score at a method's optimum minus the test score at twice the optimum; "
    "BiSAM (-log)'s regret minus SAM's, paired by seed, with Student's 95 % interval and p values adjusted for the two "
    "levels of label noise (Holm). A negative difference says that -log forgives such a radius more. It is measured in "
    f"{{regret}}, with n = {_SEEDS} seeds ({_FIRST} to {_FIRST + _SEEDS - 1}) for each cell; the study ends at this n. "
    "The *optimum* of a method at a level of noise is the radius of the grid with the largest mean headline score over "
    f"the grid's {_GRID_SEEDS} seeds ({_FIRST_GRID} to {_FIRST_GRID + _GRID_SEEDS - 1}), which the regret does not "
    "use; a tie goes to the smaller radius. If an optimum is at an end of the grid, the grid is extended by factors of "
    "2 before the regret is measured, and this page says so."
)
_CONTROL = (
    f"The descent loss has label smoothing {_SMOOTHING:g}, as in the BiSAM authors' recipe. SAM climbs this loss, and "
    "both BiSAMs climb a bound without smoothing. SAM (CE ascent), which climbs the cross-entropy without smoothing, "
    "tells the two changes apart. SGD, whose weight decay is tuned on a grid of the same size, has twice the epochs. "
    "The other methods have weight decay 0.0005."
)

_MLP = Recipe(model="mlp", epochs=30)

RADIUS = (
    Study(
        "radius",
        "Accuracy against the radius: digits, a small MLP",
        grid(_MLP, {"sam": 0.1, "sam_ce": 0.1, "bisam_log": 0.1, "bisam_tanh": 0.1, "asam": 1.0}),
        _GRID_SEEDS,
        ("radii",),
        first_seed=_FIRST_GRID,
        note=f"Question: does BiSAM (-log) forgive a radius that is too large? {_CONTROL} "
        f"{_COMPARED.format(regret='the study radius-regret')} All comparisons on this page are exploratory. The range "
        "of the grid was chosen with seeds 900 to 907, which no study uses. The network and the data set are small, so "
        "that two cores can train hundreds of seeds: a result holds for them, and not for large networks.",
    ),
)
"""In the order of `bisam list`."""
