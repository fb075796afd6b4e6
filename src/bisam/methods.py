"""Methods: the papers. Which queries, where, and how their gradients combine.

A method is a value, `(oracle, batch) -> Evaluation`: the loss to report and the gradient to descend. It does no I/O,
knows no model and keeps nothing; the same object may serve two losses. Letters are the papers': g the ascent gradient,
e the displacement.

    SAM()                                        # rho 0.05
    SAM(L2(0.1), ascent=Tanh())                  # climb a lower bound of the 0-1 loss: BiSAM (tanh)
    SAM(Adaptive(0.5, eta=0.01), ascent=NegLog())
    MSAM(32, BiSAM())                            # each micro-batch of 32 perturbs for itself
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, cast

from bisam.arguments import instance
from bisam.evaluation import Batch, Evaluation, divisor, join, split
from bisam.objectives import LowerBound, NegLog, Objective
from bisam.oracle import Oracle
from bisam.perturbations import L2, Adaptive, Perturbation
from bisam.vector import Vector

Method = Callable[[Oracle, Batch], Evaluation]


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
        perturb: from the ascent gradient to the displacement.
        ascent: what the adversary climbs; None is the training loss, a `LowerBound` makes it BiSAM.
        descent: what is minimised at the displaced weights; None is the training loss.

    Raises:
        TypeError: an argument is not what it should be (a radius in place of a perturbation, say).
    """

    perturb: Perturbation = field(default=L2(0.05))
    ascent: Objective | None = None
    descent: Objective | None = None

    def __post_init__(self) -> None:
        instance("perturb", self.perturb, "a perturbation such as L2(0.05)")
        for name, objective in (("ascent", self.ascent), ("descent", self.descent)):
            if objective is not None:
                instance(name, objective, "an objective such as NegLog()")

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Two queries: at w, and at w + e."""
        return oracle.query(batch, self.descent, at=self.climb(oracle, batch))

    def climb(self, oracle: Oracle, batch: Batch) -> Vector:
        """The displacement e. A method of its own, so that the ascent gradient dies with its frame."""
        return self.perturb(oracle.query(batch, self.ascent).gradient, oracle)


def BiSAM(rho: float = 0.05, bound: LowerBound = NegLog(), descent: Objective | None = None) -> SAM:  # noqa: B008
    """SAM whose adversary climbs a lower bound of the 0-1 loss (Xie et al., 2024, https://arxiv.org/abs/2407.12993)."""
    return SAM(L2(rho), ascent=bound, descent=descent)


def ASAM(rho: float, eta: float = 0.0) -> SAM:
    """SAM in a neighbourhood that follows the weights' scale (Kwon et al., 2021, https://arxiv.org/abs/2102.11600).

    All parameters, as most ports; `SAM(Adaptive(rho, eta, where=...))` is the authors' choice of parameters.
    """
    return SAM(Adaptive(rho, eta))


def ABiSAM(rho: float, bound: LowerBound = NegLog(), eta: float = 0.0) -> SAM:  # noqa: B008
    """Adaptive BiSAM: ASAM's neighbourhood, BiSAM's adversary (Xie et al., 2024, Algorithm 2)."""
    return SAM(Adaptive(rho, eta), ascent=bound)


@dataclass(frozen=True)
class MSAM:
    """m-sharpness: any method on each micro-batch of `m` examples by itself, gradients averaged (Foret et al., 2021).

    See section 4.1 there, and Behdin et al., 2023, https://arxiv.org/abs/2302.09693. It is what data-parallel training
    does with `m` the batch of one replica. Running statistics move once per micro-batch.

    Args:
        m: examples in a micro-batch, >= 1; the last one may be smaller. Each weighs the examples that count in it.
        method: what each micro-batch does.

    Raises:
        TypeError: `m` is no whole number, or `method` no method.
        ValueError: `m` is less than 1.
    """

    m: int
    method: Method = field(default=SAM())

    def __post_init__(self) -> None:
        if isinstance(self.m, bool) or not isinstance(cast(Any, self.m), int):
            raise TypeError(f"m is the number of examples in a micro-batch and must be an int, got {self.m!r}")
        instance("method", self.method, "SAM(), BiSAM() or another (oracle, batch) -> Evaluation")
        if self.m < 1:
            raise ValueError(f"m is the number of examples in a micro-batch and must be at least 1, got {self.m!r}")

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """The method's queries for each micro-batch in turn."""
        parts = split(batch, self.m)
        if len(parts) == 1:
            return self.method(oracle, batch)
        g, answers = None, list[Evaluation]()
        for part in parts:
            answer = self.method(oracle, part)
            share = answer.gradient * answer.count
            g = share if g is None else g + share
            answers.append(replace(answer, grad=None))
        whole = join(answers)
        return replace(whole, grad=None if g is None else g / divisor(whole.count))
