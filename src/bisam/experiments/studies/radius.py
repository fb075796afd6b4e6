"""Radius: whether an adversary forgives a radius that is too large.

The first study of a pair trains every method with a grid of radii. The second, for SAM and BiSAM (-log) alone, trains
fresh seeds with the optimum that the first one found for each of the two, and with half, 1.4 times and twice of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from bisam.experiments.recipes.catalogue import BASELINE, PLAIN
from bisam.experiments.recipes.presets import CIFAR
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.study import Primary, Regret, Study

METHOD = "bisam_log"
"""The method whose regret is compared with SAM's."""
NOISES = (0.0, 0.4)
FACTOR = 2.0
"""How much too large the radius of the primary comparison is."""
FACTORS = (1.4, FACTOR)
"""Multiples of the optimum that are compared."""
_SHOWN = (1 / FACTOR, *FACTORS)

_STEPS = (1.4, 2.0, 2.8, 4.0, 5.6, 8.0, 11.2, 16.0)  # by a factor of sqrt(2), rounded so that every second is twice
_UNITS = {"sam": 0.1, "sam_ce": 0.1, "bisam_log": 0.1, "bisam_tanh": 0.1, "asam": 1.0}  # of the radii above
_DECAYS = tuple(5e-4 * 2**i for i in range(8))
_SMOOTHING = 0.1
_FIRST_GRID, _FIRST = 400, 500


def grid(base: Recipe, more: dict[float, tuple[float, ...]]) -> Callable[[int | None], list[Recipe]]:
    """The recipes of a grid of radii.

    Args:
        base: the data set, the network and the length.
        more: by label noise, radii in units that were added because an optimum was at an end.
    """

    def recipes(epochs: int | None) -> list[Recipe]:
        one = replace(base, label_smoothing=_SMOOTHING, epochs=epochs or base.epochs)
        # SGD trains for twice the epochs, so that all methods compute the same number of gradients.
        plain = [replace(one.times(2), method=PLAIN, weight_decay=decay) for decay in _DECAYS]
        return [
            replace(recipe, noise=noise)
            for noise in NOISES
            for recipe in (
                *plain,
                *(
                    replace(one, method=method, rho=round(unit * step, 10))
                    for method, unit in _UNITS.items()
                    for step in (*more.get(noise, ()), *_STEPS)
                ),
            )
        ]

    return recipes


def around(base: Recipe, optima: dict[tuple[str, float], float]) -> Callable[[int | None], list[Recipe]]:
    """The recipes at the optimum of each method and noise level, at half of it and at `FACTORS` times it.

    Args:
        base: the data set, the network and the length.
        optima: the optimum by method and noise.
    """

    def recipes(epochs: int | None) -> list[Recipe]:
        one = replace(base, label_smoothing=_SMOOTHING, epochs=epochs or base.epochs)
        return [
            replace(one, method=method, noise=noise, rho=round(factor * rho, 10))
            for (method, noise), rho in optima.items()
            for factor in (1.0, *_SHOWN)
        ]

    return recipes


def _compared(where: str, seeds: int, n: int) -> str:
    """The registered comparison: where it is measured with n seeds, with optima from so many seeds of a grid."""
    return (
        "*Primary comparison*, fixed before the first run of the grid: the regret of a radius that is too large by a "
        f"factor of {FACTOR:g}, which is the test score at a method's optimum minus the test score at twice the "
        "optimum; BiSAM (-log)'s regret minus SAM's, paired by seed, with Student's 95 % interval and p values "
        "adjusted for the two levels of label noise (Holm). A negative difference says that -log forgives such a "
        f"radius more. It is measured in {where}, with n = {n} seeds ({_FIRST} to {_FIRST + n - 1}) for each "
        "cell; the study ends at this n. The *optimum* of a method at a level of noise is the radius of the grid with "
        f"the largest mean headline score over the grid's {seeds} seeds ({_FIRST_GRID} to {_FIRST_GRID + seeds - 1}), "
        "which the regret does not use; a tie goes to the smaller radius. If an optimum is at an end of the grid, the "
        "grid is extended by factors of 2 before the regret is measured, and this page says so. *Secondary*, and "
        "exploratory like everything else: the same for a radius that is too large by a factor of 1.4, because "
        "training of the small MLP with tuning seeds failed altogether at twice the best radius under label noise, "
        "with every method."
    )


_CONTROL = (
    f"The descent loss has label smoothing {_SMOOTHING:g}, as in the BiSAM authors' recipe. SAM climbs this loss, and "
    "both BiSAMs climb a bound without smoothing. SAM (CE ascent), which climbs the cross-entropy without smoothing, "
    "tells the two changes apart. SGD, whose weight decay is tuned on a grid of eight values, has twice the epochs. "
    "The other methods have weight decay 0.0005."
)

_TUNED = "The range of the grid was chosen with eight tuning seeds (900 to 907), which no study uses."
_SMALL = (
    "The network and the data set are small, so that two cores can train hundreds of seeds: a result holds for them, "
    "and not for large networks."
)
_FRESH = "All seeds draw their parts from the same 1,797 images."

_MLP = Recipe(model="mlp", epochs=30)
_CONVNET = Recipe(model="convnet", epochs=30)
_CIFAR = replace(CIFAR, method=PLAIN, rho=None, dataset="cifar10:16", model="convnet", limit=5000, epochs=40)

OPTIMA: dict[str, dict[tuple[str, float], float]] = {
    "radius": {
        ("sam", 0.0): 0.14,
        ("bisam_log", 0.0): 0.05,
        ("sam", 0.4): 0.8,
        ("bisam_log", 0.4): 0.8,
    }
}
"""Maps the study of a grid to the optima that it found by the rule in its note, by method and level of noise."""


EXTENDED: dict[str, dict[float, tuple[float, ...]]] = {"radius": {0.0: (0.35, 0.5, 0.7, 1.0)}}
"""Maps the study of a grid and a level of noise to radii, in units of each method, that the rule in its note added."""


def _grid(name: str, title: str, base: Recipe, seeds: int, n: int, note: str) -> Study:
    return Study(
        name,
        f"Accuracy against the radius: {title}",
        grid(base, EXTENDED.get(name, {})),
        seeds,
        ("radii",),
        first_seed=_FIRST_GRID,
        regret=Regret(METHOD, BASELINE, FACTOR, _SHOWN),
        note=f"Question: does BiSAM (-log) forgive a radius that is too large? {_CONTROL} "
        f"{_compared(f'`{name}-regret`', seeds, n)} All comparisons on this page are exploratory. {note}",
    )


def _regret(name: str, title: str, base: Recipe, seeds: int, n: int, note: str) -> Study:
    optima = OPTIMA[name]
    found = ", ".join(f"{method} {rho:g} at {100 * noise:g} %" for (method, noise), rho in optima.items())
    return Study(
        f"{name}-regret",
        f"The regret of a radius that is too large: {title}",
        around(base, optima),
        n,
        ("radii",),
        first_seed=_FIRST,
        regret=Regret(METHOD, BASELINE, FACTOR, _SHOWN, optima),
        primary=Primary(f"the regret of a radius that is {FACTOR:g} times too large, BiSAM (-log) against SAM"),
        note=f"Question: does BiSAM (-log) forgive a radius that is too large? {_compared('this study', seeds, n)} The "
        f"optima that [{name}](../{name}/report.md) found, by method and label noise: {found}. Label smoothing, "
        f"optimizer and length are those of that study. {note}",
    )


_GRIDS = (
    (
        "radius",
        "digits, a small MLP",
        _MLP,
        12,
        60,
        f"{_TUNED} Without label noise the best of the first eight radii was the smallest one for SAM, SAM (CE ascent) "
        "and BiSAM (-log): by the rule above the grid was extended at its lower end by two factors of 2, for all "
        f"methods that have a radius. {_SMALL} {_FRESH}",
    ),
    (
        "radius-convnet",
        "digits, a convolutional network",
        _CONVNET,
        12,
        60,
        f"The range of the grid is that of the study radius. {_SMALL} {_FRESH}",
    ),
    (
        "radius-cifar10",
        "5,000 images of CIFAR-10 at 16x16",
        _CIFAR,
        5,
        20,
        "Made smaller for two cores: 5,000 training images, halved to 16x16 pixels, a network of three convolutions, "
        "40 epochs, 5 seeds in the grid and 20 for the regret. The range of the grid is that of the study radius.",
    ),
)

RADIUS = (
    *(_grid(*one) for one in _GRIDS),
    *(_regret(*one) for one in _GRIDS if one[0] in OPTIMA),
)
"""In the order of `bisam list`."""
