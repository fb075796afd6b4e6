"""Local: studies that are in no paper and run on two cores."""

from __future__ import annotations

from dataclasses import replace

from bisam.experiments.recipes.catalogue import METHODS, PLAIN
from bisam.experiments.recipes.presets import CIFAR
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.study import Analyses, Study


def _digits(epochs: int | None) -> list[Recipe]:
    """SGD trains for twice the epochs, so that all methods compute the same number of gradients.

    rho has the best validation accuracy at 40 % noise, mean of seeds 100 to 102 (`bisam train --noise 0.4 --rho ...`):
    for SAM among {0.1, 0.2, 0.4, 0.8}, for ASAM among {1, 2, 4, 8}. Both BiSAMs use the rho of SAM, as in the paper.
    """
    each = epochs or 30
    rhos: dict[str, float | None] = {PLAIN: None, "sam": 0.4, "bisam_log": 0.4, "bisam_tanh": 0.4, "asam": 4.0}
    return [
        Recipe(method=method, noise=noise, rho=rho, epochs=2 * each if method == PLAIN else each)
        for noise in (0.0, 0.4)
        for method, rho in rhos.items()
    ]


_GRID = (0.1, 0.2, 0.4, 0.8)
_GRIDS: dict[str, tuple[float, ...]] = {
    **dict.fromkeys(("asam", "abisam_log", "abisam_tanh"), (1.0, 2.0, 4.0, 8.0)),
    **dict.fromkeys(("fsam", "ssam_d", "sampa", "opt_sam", "async_sam", "sam_db"), (0.2, 0.4, 0.8, 1.6)),
    **dict.fromkeys(("zsharp", "every", "during"), (0.4, 0.8, 1.6, 3.2)),
    **dict.fromkeys(("sam_on", "fisher_sam", "ae_sam"), (0.8, 1.6, 3.2, 6.4)),
    "le_sam": (0.1, 0.2, 0.4, 0.8),
    "looksam": (0.025, 0.05, 0.1, 0.2),
    "wsam": (0.0125, 0.025, 0.05, 0.1),
    "momentum_sam": (1.2, 2.4, 4.8, 9.6),
    "bsam": (0.02, 0.05, 0.1, 0.2),
}
"""Grids of radii other than `_GRID`: four for each method, shifted until the best radius was not at an end."""

_RHOS: dict[str, float] = {
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
    "le_sam": 0.4,
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
"""The radius with the best validation accuracy, as `bisam run methods-rho` finds it."""


_COMPARED = [method for method in METHODS if method != "sam_ce"]  # without label smoothing it is SAM


def _one(method: str, rho: float | None, epochs: int) -> Recipe:
    recipe = Recipe(method=method, noise=0.4, rho=rho, epochs=epochs)
    # A method with momentum and a prior of its own, as bSAM, replaces the optimizer's.
    return replace(recipe, momentum=0.0, weight_decay=0.0) if "momentum" in recipe.own_fields else recipe


def _methods(epochs: int | None) -> list[Recipe]:
    """Every method, with the radius that `_methods_rho` chose for it, and SGD also with twice the epochs."""
    each = epochs or 30
    return [_one(PLAIN, None, 2 * each)] + [_one(method, _RHOS.get(method), each) for method in _COMPARED]


def _methods_rho(epochs: int | None) -> list[Recipe]:
    """Every method with four radii, to choose one by validation accuracy on seeds that the comparison does not use."""
    grids = {method: _GRIDS.get(method, _GRID) for method in _COMPARED if METHODS[method].rho is not None}
    return [_one(method, rho, epochs or 30) for method, grid in grids.items() for rho in grid]


def _sharpness(epochs: int | None) -> list[Recipe]:
    """Each method with three settings: half, once and twice the radius of the study digits, learning rates for SGD."""
    each = epochs or 30
    radii = {"sam": 0.4, "bisam_log": 0.4, "bisam_tanh": 0.4, "asam": 4.0}
    plain = [Recipe(method=PLAIN, learning_rate=rate, epochs=2 * each) for rate in (0.03, 0.1, 0.3)]
    others = [
        Recipe(method=method, rho=factor * rho, epochs=each)
        for method, rho in radii.items()
        for factor in (0.5, 1.0, 2.0)
    ]
    return [replace(recipe, noise=noise) for noise in (0.0, 0.4) for recipe in (*plain, *others)]


def _cifar10_small(epochs: int | None) -> list[Recipe]:
    """The authors' recipe on a fifth of CIFAR-10 for 15 epochs, which takes hours on two cores."""
    each = epochs or 15
    rhos: dict[str, float | None] = {PLAIN: None, "sam": 0.05, "bisam_log": 0.05, "bisam_tanh": 0.05, "abisam_log": 0.5}
    base = replace(CIFAR, model="resnet20", limit=10_000, precision="bf16", channels_last=True)
    return [
        replace(base, method=method, noise=noise, rho=rho, epochs=2 * each if method == PLAIN else each)
        for noise in (0.0, 0.4)
        for method, rho in rhos.items()
    ]


_LOSS, _RISE, _ADAPTIVE, _ZERO_ONE = "training loss", "20-step sharpness", "adaptive sharpness", "0-1 sharpness"
_MEASURES = Analyses(
    # The Hessian of fewer examples: its products take longer than everything else.
    what={
        **{name: {} for name in ("sharpness", "zero-one", "flips", "margins", "rank", "gradient")},
        "hessian": {"examples": 256},
    },
    # 0.05 is SAM's usual radius. At 0.1 the error in the ball of networks that have fitted noise is that of chance.
    settings={"rho": (0.05,), "steps": 20, "batch_size": 128, "weights": "last"},
    measures={
        "rise": _RISE,
        "loss": _LOSS,
        "rise, 1 step": "1-step sharpness",
        "rise, adaptive": _ADAPTIVE,
        "mean rise": "average sharpness",
        "rise, m": "m-sharpness",
        "rise, normalised": "sharpness of normalised logits",
        "0-1 rise": _ZERO_ONE,
        "flips, -log": "flips of -log",
        "largest eigenvalue": "largest eigenvalue of the Hessian",
        "trace": "trace of the Hessian",
        "gradient norm": "norm of the gradient",
        "median margin": "median margin",
        "feature rank": "feature rank",
    },
    primary=_RISE,
    control=_LOSS,
    shown=(_RISE, _ADAPTIVE, _ZERO_ONE, _LOSS),
)

LOCAL = (
    Study("digits", "scikit-learn's digits, with and without label noise", _digits, seeds=5),
    Study(
        "cifar10-small",
        "A fifth of CIFAR-10, ResNet-20, with and without label noise",
        _cifar10_small,
        seeds=3,
        figures=("accuracy", "curves", "flips"),
        note="The radii are the authors' (SAM, BiSAM) and Kwon et al.'s (A-BiSAM) and were not tuned; the arithmetic "
        "of the model is bfloat16 by autocast, with weights in float32.",
    ),
    Study(
        "methods",
        "Every method on digits with 40 % label noise",
        _methods,
        seeds=5,
        figures=("time", "accuracy"),
        note="Each radius is the one of four with the best validation accuracy, on other seeds "
        "([methods-rho](../methods-rho/report.md)); all else is equal, also where a method's authors use other "
        "settings. Most differences between methods are smaller than their spread over seeds: one small data set and "
        "five seeds do not rank them. K-SAM descends on the examples with the largest losses, which under label noise "
        "are those with the wrong labels.",
    ),
    Study(
        "methods-rho",
        "The radius of every method, by validation accuracy",
        _methods_rho,
        3,
        ("radius",),
        first_seed=100,
    ),
    Study(
        "sharpness",
        "Which measures of sharpness predict the test error, on digits",
        _sharpness,
        seeds=10,
        figures=("accuracy",),
        first_seed=200,
        note="Question: does a measure of a trained network rank configurations (method and radius, or method and "
        "learning rate) as their test error does? The *primary comparison* was fixed before the first run: the rise "
        "of the training loss (cross-entropy, with the labels that were trained on) in an L2 ball of radius 0.05, the "
        "same for all networks, as 20 steps of projected ascent on all training examples find it in eval mode; "
        "Spearman's rank correlation with the test error within a level of label noise, over 15 configurations, mean "
        "over 10 seeds, with a bootstrap interval over the seeds and a permutation test over the configurations, "
        "adjusted for the two levels (Holm). All other measures are exploratory and adjusted together. The *control* "
        "is the training loss itself: a measure that ranks no better says nothing about flatness. Measures and test "
        "error are those of the last weights: they are what training converges to, whereas the weights of the best "
        "validation epoch are chosen by clean labels. The radii are half, once and twice those of the study digits; "
        "SGD has three learning rates and twice the epochs. The radius of the ball was chosen by the size of the "
        "measures in two runs with seed 0 at 40 % noise (SGD, SAM), which are not part of the study. The Hessian is "
        "that of 256 examples.",
        analyses=_MEASURES,
    ),
)
"""In the order of `bisam list`."""
