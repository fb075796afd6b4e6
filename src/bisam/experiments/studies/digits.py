"""Digits: the first study that a user runs, and the choice of its settings on seeds of its own."""

from __future__ import annotations

from collections.abc import Mapping

from bisam.experiments.recipes.catalogue import PLAIN
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.equal import at_equal_gradients
from bisam.experiments.studies.study import Primary, Study
from bisam.experiments.studies.tuned import Settings, with_setting

NOISES = (0.0, 0.4)
_EPOCHS = 30
_RADII = (0.025, 0.05, 0.1, 0.2, 0.4, 0.8)
GRIDS: Mapping[str, tuple[float, ...]] = {
    PLAIN: (2e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2),
    "sam": _RADII,
    "bisam_log": _RADII,
    "bisam_tanh": _RADII,
    "asam": (0.25, 0.5, 1.0, 2.0, 4.0, 8.0),
}
"""What `digits-rho` tries: as many radii of each method as weight decays of SGD."""

SETTINGS = Settings(
    "digits-rho",
    before={
        **{(PLAIN, noise): 5e-4 for noise in NOISES},
        **{(method, noise): 0.4 for method in ("sam", "bisam_log", "bisam_tanh") for noise in NOISES},
        **{("asam", noise): 4.0 for noise in NOISES},
    },
    origin="older: radii that validation chose at 40 % noise with recipes of version 2, and the default weight decay",
    chosen={
        (PLAIN, 0.0): 0.01,
        ("sam", 0.0): 0.4,
        ("bisam_log", 0.0): 0.025,
        ("bisam_tanh", 0.0): 0.2,
        ("asam", 0.0): 2.0,
        (PLAIN, 0.4): 0.04,
        ("sam", 0.4): 0.4,
        ("bisam_log", 0.4): 0.4,
        ("bisam_tanh", 0.4): 0.4,
        ("asam", 0.4): 4.0,
    },
)
"""The radius of each method at each level of noise, or the weight decay of SGD."""


def _recipe(method: str, noise: float, value: float, epochs: int | None) -> Recipe:
    return at_equal_gradients(with_setting(Recipe(noise=noise, epochs=epochs or _EPOCHS), method, value))


def _digits(epochs: int | None) -> list[Recipe]:
    return [_recipe(method, noise, SETTINGS[method, noise], epochs) for noise in NOISES for method in GRIDS]


def _digits_rho(epochs: int | None) -> list[Recipe]:
    return [
        _recipe(method, noise, value, epochs) for noise in NOISES for method, grid in GRIDS.items() for value in grid
    ]


DIGITS = (
    Study(
        "digits",
        "scikit-learn's digits, with and without label noise",
        _digits,
        seeds=5,
        note="Each method has a radius of its own for each level of noise, and SGD a weight decay of its own, chosen "
        "by validation score on other seeds ([digits-rho](../digits-rho/report.md)) from six values each. All methods "
        "compute the same number of gradients, so SGD trains for twice the epochs. Labels are not smoothed, so that "
        "SAM (CE ascent), the control of the studies with label smoothing, would be SAM itself. The *primary "
        "comparison* was fixed before the first run: BiSAM (-log) against SAM with 40 % noise, seeds 0 to 19 "
        "(`--seeds 20`); where the paired differences have a standard deviation of 1 point, 20 seeds show 0.66 points "
        "(two-sided 5 %, power 80 %)." + SETTINGS.note(),
        primary=Primary(
            "BiSAM (-log) against SAM with 40 % label noise", "bisam_log", where={"noise": 0.4}, seeds=range(20)
        ),
    ),
    Study(
        "digits-rho",
        "The settings of the study digits, by validation score",
        _digits_rho,
        seeds=5,
        figures=("radius",),
        first_seed=300,
        note="For each method and level of noise the value with the largest mean validation score over the seeds is "
        "chosen (that of the last epoch: it is the one that is tested, because validation is small); of equal ones "
        "the smaller value. The seeds are not those of the study digits. The weight decays of SGD were 0.0001 to 0.02 "
        "at first; because the largest of them was chosen with 40 % noise, 0.04 and 0.08 took the place of the two "
        "smallest, so that the number of values stayed that of the radii.",
        tunes=True,
    ),
)
"""In the order of `bisam list`."""
