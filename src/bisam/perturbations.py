"""Perturbations: from an ascent gradient to a displacement of the weights.

A geometry, which has the radius:

    L2(0.05)                                                    # SAM: the Euclidean ball
    L2(Cosine(0.05, 0.0, steps=10_000))                         # any radius may be a schedule
    Adaptive(2.0)                                               # ASAM as most ports have it: all parameters, eta = 0
    Adaptive(0.5, eta=0.01, where=lambda name, w: "weight" in name)     # ASAM as its authors have it

and around it what is done to the gradient before, or to the displacement after:

    Friendly(L2(0.05))                                          # F-SAM: without the average gradient
    NormLayers(Adaptive(2.0))                                   # SAM-ON, on ASAM's neighbourhood
    RandomMask(Friendly(L2(0.05)), beta=0.5)                    # see masks.py

A perturbation is any callable `(gradient, oracle) -> displacement`; a zero gradient gives a zero displacement. What it
remembers between steps is in `oracle.state`. Wherever a perturbation is taken, a radius `rho` stands for `L2(rho)`.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from bisam import schedules
from bisam.objectives import CrossEntropy, LowerBound
from bisam.oracle import Oracle
from bisam.schedules import Radius
from bisam.validation import instance, non_negative, portion, positive, share
from bisam.vector import TINY, Vector

Perturbation = Callable[[Vector, Oracle], Vector]
"""`(gradient, oracle) -> displacement`."""

_NORM = re.compile(r"((^|[._])bn|norm)\d*([._]|$)")


@dataclass(frozen=True)
class L2:
    """e = rho g/||g||, which maximises a linear function on a ball (Foret et al., 2021).

    Source: https://arxiv.org/abs/2010.01412, eq. 2.

    Args:
        rho: radius, >= 0, or a schedule; 0 turns SAM into its base optimizer.

    Raises:
        TypeError: `rho` is neither a number nor a schedule.
        ValueError: `rho` is negative or not finite.
    """

    rho: Radius

    def __post_init__(self) -> None:
        schedules.check("rho", self.rho)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement of length rho along `gradient`."""
        return gradient * (schedules.at(self.rho, oracle.step) / (gradient.norm() + TINY))


@dataclass(frozen=True)
class Adaptive:
    """e = rho T^2 g/||T g|| with T = |w| + eta: an ellipsoid that follows the weights' scale (Kwon et al., 2021).

    Source: https://arxiv.org/abs/2102.11600. The authors' code applies T where a parameter's name contains "weight"
    (norm layers included) and the identity elsewhere, with rho 0.5 and eta 0.01:
    `Adaptive(0.5, eta=0.01, where=lambda name, w: "weight" in name)`. The popular port applies it to all parameters,
    eta = 0: `Adaptive(rho)`, where rho 2.0 is a common choice. BiSAM's authors use the port.

    Args:
        rho: radius, >= 0, in units of the weights, or a schedule.
        eta: added to |w|, >= 0, so that weights near zero move too.
        where: `(name, weight) -> bool`, the parameters that T scales; None for all.

    Raises:
        TypeError: `rho` is neither a number nor a schedule.
        ValueError: `rho` or `eta` is negative or not finite.
    """

    rho: Radius
    eta: float = 0.0
    where: Callable[[str, Tensor], bool] | None = None

    def __post_init__(self) -> None:
        schedules.check("rho", self.rho)
        non_negative("eta", self.eta)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement that is of length rho in the metric of T."""
        rho = schedules.at(self.rho, oracle.step)
        t = oracle.weights.abs()
        if self.eta:
            t = t + self.eta
        tg = t * gradient
        if self.where is None:
            return t * tg * (rho / (tg.norm() + TINY))
        chosen = [self.where(name, w) for name, w in zip(oracle.names, oracle.weights, strict=True)]
        tg = tg.where(chosen, gradient)
        return (t * tg).where(chosen, tg) * (rho / (tg.norm() + TINY))


@dataclass(frozen=True)
class LossEquated:
    """e = r g/||g|| with r = min(sigma/||g||, rho_max): a fixed rise of the loss, to first order (Wang et al., 2026).

    The geometry of LE-SAM, https://arxiv.org/abs/2605.10183, as third parties write it. `sigma` is annealed to 0 on a
    cosine over the final epochs: `Cosine(sigma, 0.0, steps=..., begin=...)`. The authors' values of `sigma` and
    `rho_max` were not found in a public source: the defaults here are ours.

    Args:
        sigma: rise of the loss, >= 0, or a schedule.
        rho_max: largest radius, > 0.

    Raises:
        TypeError: `sigma` is neither a number nor a schedule.
        ValueError: an argument is outside its range.
    """

    sigma: Radius = 0.05
    rho_max: float = 0.5

    def __post_init__(self) -> None:
        schedules.check("sigma", self.sigma)
        positive("rho_max", self.rho_max)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement along `gradient` that is worth sigma, or as much as rho_max is."""
        norm = gradient.norm() + TINY
        return gradient * ((schedules.at(self.sigma, oracle.step) / norm).clamp_max(self.rho_max) / norm)


def is_radius(value: Any) -> bool:
    """Whether a value is a radius: a number, or a schedule, which takes the step alone."""
    if isinstance(value, Real):
        return True
    if isinstance(value, type) or not callable(value):
        return False
    try:
        taken = inspect.signature(value).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return False
    places = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    needed = [p for p in taken if p.kind in places and p.default is p.empty]
    return len(needed) == 1 and all(p.kind is not p.VAR_POSITIONAL for p in taken)


def geometry(value: Perturbation | Radius) -> Perturbation:
    """The perturbation itself, or the L2 ball of a radius.

    Raises:
        TypeError: it is neither a perturbation nor a radius.
        ValueError: the radius is negative or not finite.
    """
    if is_radius(value):
        return L2(cast(Radius, value))
    if isinstance(value, LowerBound | CrossEntropy):
        raise TypeError(f"perturb must be a radius or a perturbation such as L2(0.05), got the objective {value!r}")
    instance("perturb", value, "a radius such as 0.05, or a perturbation such as L2(0.05)")
    return cast(Perturbation, value)


@dataclass(frozen=True)
class Around:
    """Base of perturbations with another one inside.

    Args:
        perturb: the perturbation inside, or a radius.

    Raises:
        TypeError: it is neither.
    """

    perturb: Perturbation | Radius = field(default=L2(0.05))

    def __post_init__(self) -> None:
        object.__setattr__(self, "perturb", geometry(self.perturb))

    def inner(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement of the perturbation inside."""
        return cast(Perturbation, self.perturb)(gradient, oracle.within("perturb"))


@dataclass(frozen=True)
class Friendly(Around):
    """Along d = g - sigma m, the part of the gradient that is particular to the batch (Li et al., 2024).

    m is a running average of the gradient, m <- lam m + (1 - lam) g after each use; at the first step m = g and d = g.
    The ascent of F-SAM, https://arxiv.org/abs/2403.12350.

    Args:
        perturb: from d to the displacement.
        sigma: share of the average that is taken away, >= 0; 0 is SAM.
        lam: memory of the average, in [0, 1]; the authors use 0.6 to 0.95.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `sigma` or `lam` is outside its range.
    """

    sigma: float = 1.0
    lam: float = 0.9
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("sigma", self.sigma)
        share("lam", self.lam, zero=True)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement for the gradient without its average."""
        m: Vector | None = oracle.state.get("m")
        oracle.state["m"] = gradient if m is None else m * self.lam + gradient * (1 - self.lam)
        return self.inner(gradient if m is None else gradient - m * self.sigma, oracle)


@dataclass(frozen=True)
class Smoothed(Around):
    """Along a running average d <- (1 - theta) d + theta g, which has less variance (Li and Giannakis, 2023).

    The ascent of VaSSO, https://arxiv.org/abs/2309.15639. At the first step d = g.

    Args:
        perturb: from d to the displacement.
        theta: weight of the new gradient, in (0, 1]; 1 is SAM.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `theta` is outside its range.
    """

    theta: float = 0.9
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        share("theta", self.theta)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement for the averaged gradient."""
        d: Vector | None = oracle.state.get("d")
        d = gradient if d is None else d * (1 - self.theta) + gradient * self.theta
        oracle.state["d"] = d
        return self.inner(d, oracle)


@dataclass(frozen=True)
class ZScore(Around):
    """Along the entries of the gradient that stand out from their tensor (Yun, 2025): |z| in the top share `keep`.

    The ascent of ZSharp, https://arxiv.org/abs/2505.02369. z is the entry less the mean of its tensor, by the tensor's
    standard deviation. Tensors of fewer than two dimensions (biases, norm layers) are kept whole, as in the authors'
    code; theirs then gives each tensor a radius of its own, the paper and this class one to all.

    Args:
        perturb: from the filtered gradient to the displacement.
        keep: share of each tensor's entries that are kept, rounded up, in (0, 1]; 1 is SAM, the authors use 0.05.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `keep` is outside its range.
    """

    keep: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        share("keep", self.keep)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement for the entries that stand out."""
        if self.keep == 1:
            return self.inner(gradient, oracle)
        kept = gradient.each(lambda g: g if g.dim() < 2 or not g.numel() else g * self._outstanding(g))
        return self.inner(gradient.like(kept.tensors, gradient.holes), oracle)

    def _outstanding(self, g: Tensor) -> Tensor:
        distance = (g - g.mean()).abs()  # |z| but for a factor, and its order is what counts
        kept = portion(self.keep, g.numel())  # not kthvalue, which has no deterministic implementation on a GPU
        return distance >= distance.flatten().topk(kept).values[-1]


@dataclass(frozen=True)
class NormLayers(Around):
    """Along the gradient of the normalisation layers alone (Mueller et al., 2023).

    The ascent of SAM-ON, https://arxiv.org/abs/2306.04226; the radius is that of the part. A parameter belongs to a
    normalisation layer if the class of its module has "norm" in its name (all of torch's, timm's and Hugging Face's),
    or a part of its own name begins or ends with "norm" or "bn", as in `layer1.0.bn2.weight`. The authors' rule is the
    name alone, with "norm" or "bn" anywhere in it, where "subnet" would count.

    Args:
        perturb: from the part of the gradient to the displacement.

    Raises:
        TypeError: `perturb` is no perturbation.

    Called, it raises:
        ValueError: the model has no normalisation layer.
    """

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement of the normalisation layers."""
        labels = zip(oracle.layers, oracle.names, strict=True)
        norms = ["norm" in layer.lower() or bool(_NORM.search(name.lower())) for layer, name in labels]
        if not any(norms):
            raise ValueError(
                "NormLayers perturbs normalisation layers alone, and the model has none that is trained: use L2 or "
                "Adaptive, with a where=, or name your layers' class ...Norm"
            )
        zeros = gradient.like([g if n else torch.zeros_like(g) for n, g in zip(norms, gradient, strict=True)])
        # The displacement of a geometry is 0 where the gradient is; only what is around it may move the rest.
        return self.inner(gradient.where(norms, zeros), oracle)
