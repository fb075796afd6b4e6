"""SAM, and what is SAM with another perturbation or another adversary.

SAM(0.1)                                     # a number is a radius: L2(0.1)
SAM(L2(0.1), ascent=Tanh())                  # climb a lower bound of the 0-1 loss: BiSAM (tanh)
SAM(Adaptive(0.5, eta=0.01), ascent=NegLog())
SAM(Friendly(Adaptive(2.0)), ascent=NegLog())    # what nobody has named
MultiStepSAM(L2(0.1), steps=3)
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

from bisam.evaluation import Batch, Evaluation
from bisam.masks import DropGrow, FisherMask
from bisam.objectives import LowerBound, NegLog, Objective
from bisam.oracle import Oracle
from bisam.perturbations import (
    L2,
    Adaptive,
    Friendly,
    LossEquated,
    NormLayers,
    Perturbation,
    Smoothed,
    ZScore,
    geometry,
)
from bisam.schedules import Radius
from bisam.validation import instance, whole
from bisam.vector import Vector


@dataclass(frozen=True)
class ERM:
    """The plain gradient at the weights (empirical risk minimisation): the base optimizer without a second query."""

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """One query, at the weights."""
        return oracle.query(batch)


@dataclass(frozen=True)
class SAM:
    """Climb to the worst nearby point, take the gradient there (Foret et al., 2021, https://arxiv.org/abs/2010.01412).

    Args:
        perturb: from the ascent gradient to the displacement, or a radius `rho`, which stands for `L2(rho)`.
        ascent: what the adversary climbs; None is the training loss, a `LowerBound` makes it BiSAM.
        descent: what is minimised at the displaced weights; None is the training loss.

    Raises:
        TypeError: an argument is not what it should be.
        ValueError: the radius is negative or not finite.
    """

    perturb: Perturbation | Radius = field(default=L2(0.05))
    ascent: Objective | None = None
    descent: Objective | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "perturb", geometry(self.perturb))
        for name, objective in (("ascent", self.ascent), ("descent", self.descent)):
            if objective is not None:
                instance(name, objective, "an objective such as NegLog()")

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Two queries: at w, and at w + e."""
        return oracle.query(batch, self.descent, at=self.climb(oracle, batch))

    def climb(self, oracle: Oracle, batch: Batch) -> Vector:
        """The displacement e. A method of its own, so that the ascent gradient dies with its frame."""
        return self.displacement(oracle.query(batch, self.ascent).gradient, oracle)

    def displacement(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement for an ascent gradient."""
        return cast(Perturbation, self.perturb)(gradient, oracle.within("perturb"))

    def both(self, oracle: Oracle, batch: Batch) -> tuple[Vector, Evaluation]:
        """For methods that combine gradients: the descent loss's gradient at the weights, and the answer at w + e.

        An adversary that climbs something else costs one more query.
        """
        if self.ascent == self.descent:
            g = oracle.query(batch, self.descent).gradient
            return g, oracle.query(batch, self.descent, at=self.displacement(g, oracle))
        g = oracle.query(batch, self.descent, track=False).gradient
        return g, oracle.query(batch, self.descent, at=self.climb(oracle, batch))


def BiSAM(rho: Perturbation | Radius = 0.05, bound: LowerBound = NegLog(), descent: Objective | None = None) -> SAM:  # noqa: B008
    """SAM whose adversary climbs a lower bound of the 0-1 loss (Xie et al., 2024, https://arxiv.org/abs/2407.12993)."""
    return SAM(rho, ascent=bound, descent=descent)


def ASAM(rho: Radius, eta: float = 0.0, ascent: Objective | None = None) -> SAM:
    """SAM in a neighbourhood that follows the weights' scale (Kwon et al., 2021, https://arxiv.org/abs/2102.11600).

    All parameters, as most ports; `SAM(Adaptive(rho, eta, where=...))` is the authors' choice of parameters.
    """
    return SAM(Adaptive(rho, eta), ascent=ascent)


def ABiSAM(rho: Radius, bound: LowerBound = NegLog(), eta: float = 0.0) -> SAM:  # noqa: B008
    """Adaptive BiSAM: ASAM's neighbourhood, BiSAM's adversary (Xie et al., 2024, https://arxiv.org/abs/2407.12993).

    As the authors' code has it; the paper's pseudocode was not found in a public source.
    """
    return SAM(Adaptive(rho, eta), ascent=bound)


def FSAM(
    rho: Perturbation | Radius = 0.05, sigma: float = 1.0, lam: float = 0.9, ascent: Objective | None = None
) -> SAM:
    """Friendly SAM: climb what is particular to the batch (Li et al., 2024, https://arxiv.org/abs/2403.12350)."""
    return SAM(Friendly(rho, sigma, lam), ascent=ascent)


def VaSSO(rho: Perturbation | Radius = 0.05, theta: float = 0.9, ascent: Objective | None = None) -> SAM:
    """SAM along an average gradient (Li and Giannakis, 2023, https://arxiv.org/abs/2309.15639)."""
    return SAM(Smoothed(rho, theta), ascent=ascent)


def ZSharp(rho: Perturbation | Radius = 0.05, keep: float = 0.05, ascent: Objective | None = None) -> SAM:
    """SAM along the entries of the gradient that stand out (Yun, 2025, https://arxiv.org/abs/2505.02369)."""
    return SAM(ZScore(rho, keep), ascent=ascent)


def SAMON(rho: Perturbation | Radius = 0.05, ascent: Objective | None = None) -> SAM:
    """SAM-ON: perturb normalisation layers alone (Mueller et al., 2023, https://arxiv.org/abs/2306.04226).

    `SAM(NormLayers(Adaptive(rho)))` is the authors' adaptive form.
    """
    return SAM(NormLayers(rho), ascent=ascent)


def LESAM(sigma: Radius = 0.05, rho_max: float = 0.5, ascent: Objective | None = None) -> SAM:
    """LE-SAM: a rise of the loss in place of a radius (Wang et al., 2026, https://arxiv.org/abs/2605.10183).

    The authors' values of `sigma` and `rho_max` were not found in a public source; these are ours. sigma is annealed to
    0 over the final epochs, by a third party's summary: `Cosine(sigma, 0.0, steps=..., begin=...)`.
    """
    return SAM(LossEquated(sigma, rho_max), ascent=ascent)


def FisherSAM(
    rho: Perturbation | Radius = 0.05, keep: float = 0.1, every: int = 100, ascent: Objective | None = None
) -> SAM:
    """SAM on the weights of the largest Fisher information (Zhong et al., 2022, https://arxiv.org/abs/2210.05497)."""
    return SAM(FisherMask(rho, keep, every), ascent=ascent)


def SSAMD(
    rho: Perturbation | Radius = 0.05,
    keep: float = 0.5,
    drop: float = 0.5,
    every: int = 1000,
    steps: int | None = None,
    ascent: Objective | None = None,
) -> SAM:
    """Sparse SAM with a mask that wanders, SSAM-D (Mi et al., 2022, https://arxiv.org/abs/2210.05177)."""
    return SAM(DropGrow(rho, keep, drop, every, steps), ascent=ascent)


@dataclass(frozen=True)
class MultiStepSAM(SAM):
    """SAM that climbs in several steps, each of a share of the radius (Foret et al., 2021).

    https://arxiv.org/abs/2010.01412. The displacement is the sum of the steps, so it is no longer than one step of SAM.

    Args:
        perturb: the displacement of a single step; each of the steps takes 1 / `steps` of it, and what it remembers
            changes with each.
        ascent: see `SAM`.
        descent: see `SAM`.
        steps: gradients that are climbed, >= 1; 1 is SAM.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `steps` is less than 1.
    """

    steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("steps", self.steps)

    def climb(self, oracle: Oracle, batch: Batch) -> Vector:
        """The displacement, of `steps` queries."""
        e = super().climb(oracle, batch) * (1 / self.steps)
        for _ in range(1, self.steps):
            further = self.displacement(oracle.query(batch, self.ascent, at=e).gradient, oracle)
            e = e + further * (1 / self.steps)
        return e
