"""Long tail: adversaries that weight the classes, where the numbers of training examples of the classes fall.

Each method has a setting of its own, a radius or the weight decay of SGD, chosen with the same number of trials: the
studies `longtail-rho` and `longtail-cifar10-rho` make them; what the section "Chosen settings" of their reports says is
entered in `chosen` of the task. `longtail` and `longtail-cifar10` test it on other seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from bisam.experiments.recipes.catalogue import BASELINE, PLAIN
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.studies.equal import at_equal_gradients
from bisam.experiments.studies.study import Primary, Study
from bisam.experiments.studies.tuned import Task, with_setting

IMBALANCES = (10.0, 100.0)
"""Ratios of the training examples of the first class to those of the last one."""

SAM_BALANCED, BISAM_BALANCED = "SAM (balanced ascent)", "BiSAM (-log, balanced)"
BISAM_FOCAL = "BiSAM (-log, focal)"
WEIGHTED: Mapping[str, str] = {
    SAM_BALANCED: "SAM(L2({:g}), ascent=ClassWeighted(cross_entropy, 'balanced'))",
    BISAM_BALANCED: "BiSAM({:g}, ClassWeighted(NegLog(), 'balanced'))",
    BISAM_FOCAL: "BiSAM({:g}, ClassWeighted(NegLog(), Focal(2)))",
}
"""Names of the methods whose adversary weights the classes, and templates of their expressions with their radius."""
METHODS = (PLAIN, BASELINE, SAM_BALANCED, "bisam_log", *[name for name in WEIGHTED if name != SAM_BALANCED])
"""All methods, in the order of the table."""


@dataclass(frozen=True)
class LongTail(Task):
    """A data set with its network, and the trials of the settings.

    Attributes:
        radii: trials of each method that has a radius.
        decays: trials of the weight decay of SGD, as many.
    """

    radii: tuple[float, ...]
    decays: tuple[float, ...]
    methods: ClassVar[Sequence[str]] = METHODS
    expressions: ClassVar[Mapping[str, str]] = WEIGHTED
    conditions: ClassVar[Sequence[float]] = IMBALANCES
    suffix: ClassVar[str] = "-rho"

    def trials_of(self, method: str, condition: float) -> tuple[float, ...]:
        """The trials of a method: the same at both imbalances."""
        return self.decays if method == PLAIN else self.radii

    def trial(self, method: str, condition: float, setting: float, epochs: int | None) -> Recipe:
        """The recipe of a method with a setting; SGD has as many gradients as the others."""
        base = replace(self.recipe, imbalance=condition, epochs=epochs or self.recipe.epochs)
        if method in WEIGHTED:
            return replace(base, method=WEIGHTED[method].format(setting))
        return at_equal_gradients(with_setting(base, method, setting))

    def primary(self) -> Primary:
        """The comparison that is fixed before the first run."""
        method = WEIGHTED[BISAM_BALANCED].format(self.settings[BISAM_BALANCED, 100.0])
        return Primary("BiSAM (-log, balanced) against SAM at imbalance 100", method, where={"imbalance": 100.0})


DIGITS = LongTail(
    "longtail",
    Recipe(method=BASELINE, epochs=40, batch_size=32),
    radii=(0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6),
    decays=(1.25e-4, 5e-4, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2),
    chosen={
        (PLAIN, 10.0): 2e-3,
        (BASELINE, 10.0): 0.025,
        (SAM_BALANCED, 10.0): 0.2,
        ("bisam_log", 10.0): 0.2,
        (BISAM_BALANCED, 10.0): 0.4,
        (BISAM_FOCAL, 10.0): 0.4,
        (PLAIN, 100.0): 1.25e-4,
        (BASELINE, 100.0): 0.05,
        (SAM_BALANCED, 100.0): 0.025,
        ("bisam_log", 100.0): 0.05,
        (BISAM_BALANCED, 100.0): 0.05,
        (BISAM_FOCAL, 100.0): 0.025,
    },
)
CIFAR10 = LongTail(
    "longtail-cifar10",
    Recipe(
        dataset="cifar10:8",
        model="resnet8",
        method=BASELINE,
        limit=5000,
        augment=False,
        batch_size=128,
        epochs=40,
    ),
    radii=(0.025, 0.05, 0.1, 0.2, 0.4, 0.8),
    decays=(5e-4, 2e-3, 5e-3, 1e-2, 2e-2, 4e-2),
)

_QUESTION = (
    "Question: does an adversary that weights the classes help where some have few training examples? The descent is "
    "cross-entropy for all. The adversaries: SAM's; cross-entropy in which each class of a batch has the same weight "
    "(balanced ascent); BiSAM's bound (-log); the same with balanced classes, a bound of the balanced error; the same "
    "with the weights (1 - n_c/n)^2 of Focal-SAM (Li et al., 2025) for a class with n_c of n examples of the batch. "
    "The training examples of class k are n r^(-k/9) with imbalance r (Cui et al., 2019; Cao et al., 2019), drawn by "
    "the seed. The scores are the balanced accuracy on the test set, the mean of the accuracies of the classes; the "
    "groups are classes 0 to 2 (many), 3 to 6 (medium) and 7 to 9 (few). "
)


def _note(task: LongTail, epoch: str, seeds: str, smaller: str) -> str:
    """The note of a test: the question, where the settings are from, and what was fixed before the first run."""
    return (
        f"{_QUESTION}Each setting is the best of {len(task.radii)} trials by balanced validation accuracy on other "
        f"seeds ({task.tuning}): a radius, or the weight decay of SGD, which trains for "
        "twice the epochs, so that all compute the same number of gradients. The validation part is not long-tailed, "
        "so that the choice knows more of the rare classes than training does. Fixed before the first run: the "
        "*primary comparison* is BiSAM (-log, balanced) minus SAM, each with its own radius, in balanced test accuracy "
        f"of the {epoch} at imbalance 100, paired by seed, two-sided at 5 %; {seeds}; the study ends there and not "
        "earlier. All other comparisons of this page are adjusted together (Holm), and accuracies of groups of classes "
        f"are described and not tested. {smaller}{task.settings.note()}"
    )


_TUNING = (
    "Six trials or more for each method at each imbalance, as many for all, on seeds that no test uses. Fixed before "
    "the first run: the setting with the largest mean balanced validation accuracy over the seeds, of the epoch that "
    "is tested, is chosen, the smaller of equal ones. If the best one of a method is at an end of its trials, one more "
    "trial there, by the same factor, is added for all methods at both imbalances, once. "
)
_ADDED = (
    "By this rule the radius 0.025 and the weight decay 0.000125 were added: with imbalance 100 the smallest was the "
    "best of every method. The best ones of SGD, SAM (balanced ascent) and BiSAM (-log, focal) with imbalance 100, and "
    "of SAM with imbalance 10, are still the smallest, and the rule adds no further trial. "
)
_OF_DIGITS = (
    "The network is that of `digits`, three convolutions with batch normalisation, which takes batches of one example "
    "too; each seed draws a split of its own."
)
_OF_CIFAR10 = (
    "To fit two cores the images have 8 x 8 pixels (means of blocks), at most about 500 of each class are trained on, "
    "without augmentation, and the network is ResNet-8."
)

LONGTAIL = (
    Study(
        DIGITS.name,
        "Adversaries that weight the classes, on long-tailed digits",
        DIGITS.tests,
        seeds=60,
        figures=("accuracy", "flips"),
        first_seed=800,
        primary=DIGITS.primary(),
        note=_note(DIGITS, "last epoch", "n = 60 (seeds 800 to 859)", _OF_DIGITS),
        labels=DIGITS.labels(),
    ),
    Study(
        DIGITS.tuning,
        "The settings of `longtail`, by balanced validation accuracy",
        DIGITS.trials,
        seeds=6,
        figures=("radius",),
        first_seed=110,
        note=_TUNING + _ADDED + _OF_DIGITS,
        tunes=True,
        labels=DIGITS.labels(),
    ),
    Study(
        CIFAR10.name,
        "Adversaries that weight the classes, on small long-tailed CIFAR-10",
        CIFAR10.tests,
        seeds=20,
        figures=("accuracy", "flips"),
        first_seed=800,
        primary=CIFAR10.primary(),
        note=_note(CIFAR10, "best validation epoch", "n = 20 (seeds 800 to 819)", _OF_CIFAR10),
        labels=CIFAR10.labels(),
    ),
    Study(
        CIFAR10.tuning,
        "The settings of `longtail-cifar10`, by balanced validation accuracy",
        CIFAR10.trials,
        seeds=2,
        figures=("radius",),
        first_seed=110,
        note=_TUNING + _OF_CIFAR10,
        tunes=True,
        labels=CIFAR10.labels(),
    ),
)
"""The tests, each with the study that chooses its settings."""
