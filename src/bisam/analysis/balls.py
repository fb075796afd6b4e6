"""Balls: the sets of displacements that perturbations choose from, as ellipsoids.

A perturbation maximises a linear function over a set. For a measure with several steps the set itself is needed: all
e = T u with ||u|| <= rho, where T scales each entry.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from bisam import schedules
from bisam.oracle import Oracle
from bisam.perturbations import L2, Adaptive, NormLayers, Only, Perturbation, needed
from bisam.schedules import Radius
from bisam.vector import Vector


@dataclass(frozen=True)
class Ball:
    """The displacements e = T u with ||u|| <= rho.

    Attributes:
        rho: the radius.
        scale: T, one factor >= 0 for each entry of the weights.
        wrt: for each tensor of the weights, whether it is displaced; None: all of them.
    """

    rho: float
    scale: Vector
    wrt: Sequence[bool] | None = None

    def displacement(self, u: Vector) -> Vector:
        """Returns T u."""
        return self.scale * u

    def ascent(self, gradient: Vector) -> Vector:
        """Returns the gradient with respect to u for that with respect to the weights."""
        return self.scale * gradient

    def inside(self, u: Vector) -> Vector:
        """Returns the point of the ball that is closest to `u`."""
        norm = u.norm()
        return u * torch.where(norm > self.rho, self.rho / norm, torch.ones_like(norm))

    def on_the_boundary(self, generator: torch.Generator) -> Vector:
        """Returns a point of uniform distribution on the sphere ||u|| = rho, restricted to the displaced entries."""
        noise = self.scale.random(lambda t: torch.randn(t.shape, generator=generator, dtype=t.dtype).to(t.device))
        noise = noise * self.scale.like([(t != 0).to(t.dtype) for t in self.scale])
        return noise * (self.rho / noise.norm())


def ball_of(perturb: Perturbation, oracle: Oracle) -> Ball:
    """Returns the set of displacements of a perturbation.

    Args:
        perturb: `L2` or `Adaptive`, alone or in `NormLayers` or `Only`.
        oracle: the oracle of the weights.

    Raises:
        TypeError: the perturbation is another one, whose displacements are no ellipsoid.
    """
    if isinstance(perturb, NormLayers | Only):
        inner = ball_of(cast(Perturbation, perturb.perturb), oracle)
        chosen = needed(perturb, oracle)
        return inner if chosen is None else Ball(inner.rho, inner.scale.confined(chosen), chosen)
    if isinstance(perturb, L2):
        return Ball(_value(perturb.rho, oracle), _ones(oracle))
    if isinstance(perturb, Adaptive):
        t = oracle.weights.abs() + perturb.eta
        if perturb.where is not None:
            chosen = [perturb.where(name, w) for name, w in zip(oracle.names, oracle.weights, strict=True)]
            t = t.where(chosen, _ones(oracle))
        return Ball(_value(perturb.rho, oracle), t)
    raise TypeError(
        f"perturb must be a ball: a radius, L2, Adaptive, or one of them in NormLayers or Only, got {_name(perturb)}, "
        "which changes the direction of the ascent and not the set of displacements"
    )


def _value(radius: Radius, oracle: Oracle) -> float:
    return float(schedules.at(radius, oracle.step))


def _ones(oracle: Oracle) -> Vector:
    weights = oracle.weights
    return weights.like([torch.ones_like(t.abs()) for t in weights])


def _name(perturb: Any) -> str:
    return getattr(perturb, "__name__", type(perturb).__name__)
