"""Methods: every method of the catalogue on digits, and the choice of its settings on seeds of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from bisam.experiments.recipes.assumptions import AE_SAM
from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.equal import at_equal_gradients
from bisam.experiments.studies.study import Study
from bisam.experiments.studies.tuned import Settings, with_setting

_EPOCHS = 30
_NOISE = 0.4
DECAYS = (5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2)
"""Weight decays that are tried for the methods that have no radius."""

_BEFORE: Mapping[str, float] = {
    "sgd": 5e-4,
    "saf": 5e-4,
    "mesa": 5e-4,
    "sam": 0.4,
    "bisam_log": 0.4,
    "bisam_tanh": 0.4,
    "abisam_log": 4.0,
    "abisam_tanh": 4.0,
    "ebisam": 0.4,
    "gbisam": 0.4,
    "asam": 4.0,
    "sam_on": 3.2,
    "fsam": 0.8,
    "vasso": 0.4,
    "zsharp": 0.8,
    "le_sam": 0.2,
    "fisher_sam": 1.6,
    "ssam_f": 0.4,
    "ssam_d": 0.8,
    "multistep_sam": 0.4,
    "gsam": 0.4,
    "wsam": 0.05,
    "cr_sam": 0.4,
    "xsam": 0.4,
    "functional_sam": 0.4,
    "esam": 0.2,
    "ksam": 0.2,
    "looksam": 0.1,
    "ae_sam": 3.2,
    "momentum_sam": 2.4,
    "sampa": 0.8,
    "sampa_0": 0.4,
    "opt_sam": 0.8,
    "async_sam": 0.8,
    "sam_db": 0.8,
    "every": 1.6,
    "during": 1.6,
    "msam": 0.4,
    "rsam": 0.2,
    "bsam": 0.05,
}
COMPARED = tuple(method for method in METHODS if method in _BEFORE)
"""The methods of both studies: those that the catalogue had when they were registered. SAM (CE ascent) is not among
them, because it is SAM where labels are not smoothed; a method that is added to the catalogue later is not either."""

SETTINGS = Settings(
    "methods-rho",
    before={(method, _NOISE): value for method, value in _BEFORE.items()},
    origin="older: chosen with recipes of version 2 at equal epochs (LE-SAM: by hand), and the default weight decay",
)
"""The radius of each method (or what stands in its place), or its weight decay."""

_STEPS = (1 / 8, 1 / 4, 1 / 2, 1, 2, 4)
_CENTRES: Mapping[str, float] = {
    "abisam_log": 4.0,
    "abisam_tanh": 4.0,
    "asam": 4.0,
    "sam_on": 3.2,
    "fsam": 0.8,
    "zsharp": 0.8,
    "le_sam": 0.2,
    "fisher_sam": 1.6,
    "ssam_d": 0.8,
    "wsam": 0.05,
    "looksam": 0.1,
    "ae_sam": 3.2,
    "momentum_sam": 2.4,
    "sampa": 0.8,
    "opt_sam": 0.8,
    "async_sam": 0.8,
    "sam_db": 0.8,
    "every": 1.6,
    "during": 1.6,
    "bsam": 0.05,
}
"""Where the grids of methods lie that need other radii than SAM, whose grid lies around 0.4."""


def grid(method: str) -> tuple[float, ...]:
    """The values that `methods-rho` tries: six for each method, radii in steps of a factor 2, or weight decays."""
    if METHODS[method].rho is None:
        return DECAYS
    return tuple(step * _CENTRES.get(method, 0.4) for step in _STEPS)


def _one(method: str, value: float, epochs: int | None) -> Recipe:
    recipe = Recipe(method=method, noise=_NOISE, epochs=epochs or _EPOCHS)
    # A method with momentum and a prior of its own, as bSAM, replaces the optimizer's.
    recipe = replace(recipe, **dict.fromkeys({"momentum", "weight_decay"} & {*recipe.own_fields}, 0.0))
    return at_equal_gradients(with_setting(recipe, method, value))


def _methods(epochs: int | None) -> list[Recipe]:
    return [_one(method, SETTINGS[method, _NOISE], epochs) for method in COMPARED]


def _methods_rho(epochs: int | None) -> list[Recipe]:
    return [_one(method, value, epochs) for method in COMPARED for value in grid(method)]


EVERY_METHOD = (
    Study(
        "methods",
        "Every method on digits with 40 % label noise",
        _methods,
        seeds=20,
        figures=("time", "accuracy"),
        note="All methods compute about as many gradients as SAM does in 30 epochs: one with fewer gradients in a step "
        "trains for more epochs, one with more for fewer. The table has the counted number of a step; forward passes "
        "besides (f) are not compensated, and AE-SAM, which decides by itself, is taken to need 1.5. Each radius, or "
        "what stands in its place, is the one of six with the best validation score on other seeds "
        "([methods-rho](../methods-rho/report.md)); SGD, SAF and MESA, which have none, have the weight decay that is "
        "best of six. All else is equal, also where a method's authors use other settings. Most differences between "
        "methods are smaller than their spread over seeds: one small data set does not rank them. K-SAM descends on "
        "the examples with the largest losses, which under label noise are those with the wrong labels. The clip of "
        "LE-SAM's radius (100) is out of reach, so that sigma alone decides. Labels are not smoothed, so that SAM (CE "
        "ascent) would be SAM itself. Methods that were added to the catalogue after the registration are not "
        "here." + SETTINGS.note(),
        assumptions=(AE_SAM,),
    ),
    Study(
        "methods-rho",
        "The radius or weight decay of every method, by validation score",
        _methods_rho,
        seeds=3,
        figures=("radius",),
        first_seed=100,
        note="For each method the value with the largest mean validation score over the seeds is chosen (that of the "
        "last epoch: it is the one that is tested, because validation is small); of equal ones the smaller value. The "
        "seeds are not those of the study methods.",
        tunes=True,
        assumptions=(AE_SAM,),
    ),
)
"""In the order of `bisam list`."""
