"""Local: studies that are in no paper and run on two cores."""

from __future__ import annotations

from dataclasses import replace

from bisam.experiments.recipes.catalogue import PLAIN
from bisam.experiments.recipes.presets import CIFAR
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.cifar10_fitted import CIFAR10_FITTED
from bisam.experiments.studies.digits import DIGITS
from bisam.experiments.studies.methods import EVERY_METHOD
from bisam.experiments.studies.study import Analyses, Study


def _sharpness(epochs: int | None) -> list[Recipe]:
    """Each method with three settings: half, once and twice a radius, learning rates for SGD."""
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
    *DIGITS,
    *CIFAR10_FITTED,
    Study(
        "cifar10-small",
        "A fifth of CIFAR-10, ResNet-20, 15 epochs (superseded by cifar10-fitted)",
        _cifar10_small,
        seeds=3,
        figures=("accuracy", "curves", "flips"),
        note="*Superseded*: in 1,185 steps (SGD: 2,370) no network fits its training images. Training accuracies end "
        "at 30 to 89 %, so that the study compares how fast methods fit and says nothing about generalisation. The "
        "study cifar10-fitted takes its place. "
        "The radii are the authors' (SAM, BiSAM) and Kwon et al.'s (A-BiSAM) and were not tuned; the arithmetic "
        "of the model is bfloat16 by autocast, with weights in float32.",
    ),
    *EVERY_METHOD,
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
        "validation epoch are chosen by clean labels. The radii are half, once and twice 0.4 (ASAM: 4); "
        "SGD has three learning rates and twice the epochs. The radius of the ball was chosen by the size of the "
        "measures in two runs with seed 0 at 40 % noise (SGD, SAM), which are not part of the study. The Hessian is "
        "that of 256 examples.",
        analyses=_MEASURES,
    ),
)
"""In the order of `bisam list`."""
