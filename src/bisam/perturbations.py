"""Perturbations: from an ascent gradient to a displacement of the weights, by the geometry of the neighbourhood.

    L2(0.05)                                                    # SAM: the Euclidean ball
    Adaptive(2.0)                                               # ASAM as most ports have it: all parameters, eta = 0
    Adaptive(0.5, eta=0.01, where=lambda name, w: "weight" in name)     # ASAM as its authors have it

A perturbation is any callable `(gradient, oracle) -> displacement`; a zero gradient gives a zero displacement.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from bisam.arguments import non_negative
from bisam.oracle import Oracle
from bisam.vector import Vector

Perturbation = Callable[[Vector, Oracle], Vector]

_TINY = 1e-12  # as in every public SAM: keeps a zero gradient from dividing by zero


@dataclass(frozen=True)
class L2:
    """e = rho g/||g||, which maximises a linear function on a ball (Foret et al., 2021).

    Source: https://arxiv.org/abs/2010.01412, eq. 2.

    Args:
        rho: radius, >= 0; 0 turns the method into its base optimizer.

    Raises:
        ValueError: `rho` is negative or not finite.
    """

    rho: float

    def __post_init__(self) -> None:
        non_negative("rho", self.rho)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement of length rho along `gradient`."""
        return gradient * (self.rho / (gradient.norm() + _TINY))


@dataclass(frozen=True)
class Adaptive:
    """e = rho T^2 g/||T g|| with T = |w| + eta: an ellipsoid that follows the weights' scale (Kwon et al., 2021).

    Source: https://arxiv.org/abs/2102.11600. The authors' code applies T where a parameter's name contains "weight"
    (norm layers included) and the identity elsewhere, with rho 0.5 and eta 0.01:
    `Adaptive(0.5, eta=0.01, where=lambda name, w: "weight" in name)`. The popular port applies it to all parameters,
    eta = 0: `Adaptive(rho)`, where rho 2.0 is a common choice. BiSAM's authors use the port.

    Args:
        rho: radius, >= 0, in units of the weights.
        eta: added to |w|, >= 0, so that weights near zero move too.
        where: `(name, weight) -> bool`, the parameters that T scales; None for all.

    Raises:
        ValueError: `rho` or `eta` is negative or not finite.
    """

    rho: float
    eta: float = 0.0
    where: Callable[[str, Tensor], bool] | None = None

    def __post_init__(self) -> None:
        non_negative("rho", self.rho)
        non_negative("eta", self.eta)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement that is of length rho in the metric of T."""
        t = oracle.weights.abs()
        if self.eta:
            t = t + self.eta
        tg = t * gradient
        if self.where is None:
            return t * tg * (self.rho / (tg.norm() + _TINY))
        chosen = [self.where(name, w) for name, w in zip(oracle.names, oracle.weights, strict=True)]
        tg = tg.where(chosen, gradient)
        return (t * tg).where(chosen, tg) * (self.rho / (tg.norm() + _TINY))
