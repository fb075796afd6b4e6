"""Perturbations: functions from an ascent gradient to a displacement of the weights.

A geometry defines the radius:

    >>> from bisam.schedules import Cosine
    >>> sam = L2(0.05)                                              # SAM: the Euclidean ball
    >>> annealed = L2(Cosine(0.05, 0.0, steps=10_000))              # a radius may be a schedule
    >>> asam = Adaptive(2.0)                                        # ASAM as in most ports: all parameters, eta = 0
    >>> authors = Adaptive(0.5, eta=0.01, where=lambda name, w: "weight" in name)    # ASAM as its authors use it
    >>> per_tensor = PerTensor(0.05)                                # each tensor has the radius for itself

Other perturbations contain a geometry. They change the gradient before it, or the displacement after it:

    >>> from bisam.masks import RandomMask
    >>> friendly = Friendly(L2(0.05))                               # F-SAM: without the average gradient
    >>> centralised = Centralised(L2(0.05))                         # GCSAM: without the mean of each row
    >>> norm_layers = NormLayers(Adaptive(2.0))                     # SAM-ON in the neighbourhood of ASAM
    >>> head = Only(lambda name, p: name.startswith("head."), L2(0.05))    # a part of the parameters
    >>> masked = RandomMask(Friendly(L2(0.05)), beta=0.5)           # see masks.py
    >>> two = PerGroup([(lambda name, p: name.startswith("head."), 0.5), (lambda name, p: True, 0.05)])

A perturbation is any callable `(gradient, oracle) -> displacement`; a zero gradient gives a zero displacement. The
state that it keeps between steps is in `oracle.state`. Every argument that takes a perturbation also takes a radius
`rho`, which means `L2(rho)`.

A perturbation of a part of the weights may have a method `part(oracle, among)`. It says before the query of the
gradient which tensors of the gradient the next call needs, so that the query computes no others:

    >>> import torch
    >>> from bisam import ModelOracle, cross_entropy
    >>> oracle = ModelOracle(torch.nn.Linear(2, 1), cross_entropy)
    >>> needed(Only(lambda name, p: name == "bias", L2(0.05)), oracle)
    (False, True)
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor

from bisam import objectives, schedules
from bisam.evaluation import Evaluation
from bisam.objectives import Objective, OfClasses
from bisam.oracle import Oracle
from bisam.schedules import FlipRate, Radius
from bisam.validation import instance, non_negative, portion, positive, share, shown
from bisam.vector import TINY, Vector

Perturbation = Callable[[Vector, Oracle], Vector]
"""A function `(gradient, oracle) -> displacement`."""

Choice = TypeVar("Choice", bool, int)

Part = Sequence[bool] | None
"""For each tensor of the weights, whether it is in a part of the weights; None for all of them."""

_NORM = re.compile(r"((^|[._])bn|norm)\d*([._]|$)")


@dataclass(frozen=True)
class L2:
    """The Euclidean ball: e = rho g/||g||, which maximises a linear function on it (Foret et al., 2021).

    Source: https://arxiv.org/abs/2010.01412, eq. 2. As in public implementations, 1e-12 is added to the norm, so that a
    zero gradient gives a zero displacement; gradients of about this length give a displacement shorter than rho.

    Args:
        rho: radius, >= 0, a number or a schedule; with 0 SAM is its base optimizer.

    Raises:
        TypeError: `rho` is neither a number nor a schedule.
        ValueError: `rho` is negative or not finite.

    Example:
        >>> import torch
        >>> from bisam import L2, ModelOracle, Vector, cross_entropy
        >>> oracle = ModelOracle(torch.nn.Linear(2, 2, bias=False), cross_entropy)
        >>> gradient = Vector([torch.tensor([[3.0, 0.0], [0.0, 4.0]])])
        >>> L2(0.5)(gradient, oracle).tensors[0]
        tensor([[0.3000, 0.0000],
                [0.0000, 0.4000]])
    """

    rho: Radius

    def __post_init__(self) -> None:
        _check_rho(self.rho)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement of length rho along `gradient`."""
        return gradient * (_present(self.rho, oracle) / (gradient.norm() + TINY))

    def part(self, oracle: Oracle, among: Part) -> Part:
        """See `needed`."""
        return among


@dataclass(frozen=True)
class Adaptive:
    """The ellipsoid of ASAM: e = rho T^2 g/||T g|| with T = |w| + eta, scales with the weights (Kwon et al., 2021).

    Source: https://arxiv.org/abs/2102.11600. The authors' code applies T to parameters whose name contains "weight"
    (including those of normalisation layers) and the identity to all others, with rho 0.5 and eta 0.01:
    `Adaptive(0.5, eta=0.01, where=lambda name, w: "weight" in name)`. The most used port applies T to all parameters
    with eta = 0: `Adaptive(rho)`, for which rho 2.0 is a common choice. The authors of BiSAM use the port. |w| of a
    complex weight is its modulus.

    Args:
        rho: radius, >= 0, in units of the weights, a number or a schedule.
        eta: added to |w|, >= 0, so that weights near zero are perturbed too.
        where: `(name, weight) -> bool`, selects the parameters that T scales. Default: all.

    Raises:
        TypeError: `rho` is neither a number nor a schedule, `eta` is not a number, or `where` is no function.
        ValueError: `rho` or `eta` is negative or not finite.

    Example:
        >>> import torch
        >>> from bisam import Adaptive, ModelOracle, Vector, cross_entropy
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, -2.0]]))
        >>> gradient = Vector([torch.tensor([[3.0, 2.0]])])
        >>> Adaptive(0.5)(gradient, ModelOracle(model, cross_entropy)).tensors[0]    # T g = (3, 4), T^2 g = (3, 8)
        tensor([[0.3000, 0.8000]])
    """

    rho: Radius
    eta: float = 0.0
    where: Callable[[str, Tensor], bool] | None = None

    def __post_init__(self) -> None:
        _check_rho(self.rho)
        non_negative("eta", self.eta)
        if self.where is not None:
            instance("where", self.where, "a function (name, parameter) -> bool")

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement that has length rho in the metric of T."""
        rho = _present(self.rho, oracle)
        t = oracle.weights.abs()
        if self.eta:
            t = t + self.eta
        tg = t * gradient
        if self.where is None:
            return t * tg * (rho / (tg.norm() + TINY))
        chosen = [self.where(name, w) for name, w in zip(oracle.names, oracle.weights, strict=True)]
        tg = tg.where(chosen, gradient)
        return (t * tg).where(chosen, tg) * (rho / (tg.norm() + TINY))

    def part(self, oracle: Oracle, among: Part) -> Part:
        """See `needed`."""
        return among


@dataclass(frozen=True)
class PerTensor:
    """A Euclidean ball for each tensor: e_i = rho g_i/||g_i|| for each parameter tensor i.

    The displacement of n tensors is sqrt(n) times as long as that of `L2`. It is the normalisation of ZSharp in its
    authors' code for tensors of two or more dimensions, where the paper (https://arxiv.org/abs/2505.02369) has one norm
    for all: `SAM(ZScore(PerTensor(0.05)))`.

    Args:
        rho: radius of each tensor, >= 0, a number or a schedule.

    Raises:
        TypeError: `rho` is neither a number nor a schedule.
        ValueError: `rho` is negative or not finite.

    Example:
        >>> import torch
        >>> from bisam import ModelOracle, Vector, cross_entropy
        >>> from bisam.perturbations import PerTensor
        >>> oracle = ModelOracle(torch.nn.Linear(2, 1), cross_entropy)
        >>> gradient = Vector([torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])])
        >>> PerTensor(1.0)(gradient, oracle).tensors
        [tensor([[0.6000, 0.8000]]), tensor([1.])]
    """

    rho: Radius

    def __post_init__(self) -> None:
        _check_rho(self.rho)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement, of length rho in each tensor whose gradient is not 0."""
        rho = _present(self.rho, oracle)
        scaled = gradient.each(lambda g: g * (rho / (Vector([g]).norm() + TINY)))
        return gradient.like(scaled.tensors, gradient.holes)

    def part(self, oracle: Oracle, among: Part) -> Part:
        """See `needed`."""
        return among


@dataclass(frozen=True)
class LossEquated:
    """A given increase of the loss to first order: e = r g/||g||, r = min(sigma/||g||, rho_max) (Wang et al., 2026).

    The geometry of LE-SAM, https://arxiv.org/abs/2605.10183, as third parties describe it. `sigma` is annealed to 0
    along a cosine over the final epochs: `Cosine(sigma, 0.0, steps=..., begin=...)`. The authors' values of `sigma` and
    `rho_max` were not found in a public source; the defaults are this library's.

    Args:
        sigma: increase of the loss, >= 0, a number or a schedule.
        rho_max: largest radius, > 0.

    Raises:
        TypeError: `sigma` is neither a number nor a schedule, or `rho_max` is not a number.
        ValueError: an argument is outside its range.
    """

    sigma: Radius = 0.05
    rho_max: float = 0.5

    def __post_init__(self) -> None:
        schedules.check("sigma", self.sigma)
        positive("rho_max", self.rho_max)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement along `gradient` that increases the loss by sigma, of length rho_max at most."""
        norm = gradient.norm() + TINY
        return gradient * ((schedules.at(self.sigma, oracle.step) / norm).clamp_max(self.rho_max) / norm)

    def part(self, oracle: Oracle, among: Part) -> Part:
        """See `needed`."""
        return among


def is_radius(value: Any) -> bool:
    """Whether a value is a radius: a number, or a schedule (a callable with one required argument, the step)."""
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
    """Returns a perturbation unchanged, and a radius as an `L2` ball.

    Raises:
        TypeError: the value is neither a perturbation nor a radius.
        ValueError: the radius is negative or not finite.
    """
    if is_radius(value):
        return L2(cast(Radius, value))
    if isinstance(value, OfClasses | objectives.ObjectiveWrapper):
        raise TypeError(f"perturb must be a radius or a perturbation such as L2(0.05), got the objective {value!r}")
    instance("perturb", value, "a radius such as 0.05, or a perturbation such as L2(0.05)")
    return cast(Perturbation, value)


def needed(perturb: Perturbation, oracle: Oracle, among: Part = None) -> Part:
    """Returns the tensors of the gradient that the next call of a perturbation needs, before the gradient is computed.

    A method asks with the oracle that it passes to the next call, and the query computes no more:
    `oracle.query(batch, wrt=needed(perturb, inside))`. The perturbation may choose its part at random: it keeps the
    choice in `oracle.state` and removes it in the call.

    Args:
        perturb: a perturbation. It may have a method `part(oracle, among) -> Part`, and needs all tensors otherwise. If
            `among` has no tensor, the method returns without a random choice what the perturbation still needs, for
            example for an average of the gradient.
        oracle: the oracle of the next call.
        among: the tensors whose displacement is used. The next call gets a gradient with zeros at the others, unless
            the perturbation needs them.
    """
    part = getattr(perturb, "part", None)
    return None if part is None else part(oracle, among)


def learn(perturb: Perturbation, correct: Tensor, answer: Evaluation, oracle: Oracle) -> None:
    """Reports to the radius in a perturbation which predictions the step has flipped.

    Args:
        perturb: a perturbation whose radius is a `FlipRate`, see `bisam.methods.method.follows_flips`.
        correct: whether each prediction at the weights was right, `Evaluation.correct`.
        answer: the answer of a query for the same examples at the displaced weights.
        oracle: the oracle that the perturbation was called with.
    """
    dtype, device = torch.promote_types(answer.value.dtype, torch.float32), oracle.weights.tensors[0].device
    flipped = (correct & ~answer.correct).sum(dtype=dtype)
    counted = objectives.count(correct, answer.targets, cast(Objective, answer.objective))
    _learn(perturb, torch.stack([flipped, flipped.new_zeros(()) + counted]).to(device), oracle)


def _learn(perturb: Any, flips: Tensor, oracle: Oracle) -> None:
    if isinstance(rho := getattr(perturb, "rho", None), FlipRate):
        rho.learn(oracle.state, flips, oracle.over_ranks)
    else:
        _learn(perturb.perturb, flips, oracle.within("perturb"))


def _check_rho(rho: Any) -> None:
    if not isinstance(rho, FlipRate):
        schedules.check("rho", rho)


def _present(rho: Radius, oracle: Oracle) -> float | Tensor:
    return rho.now(oracle.state) if isinstance(rho, FlipRate) else schedules.at(rho, oracle.step)


@dataclass(frozen=True)
class Around:
    """Base class of perturbations that contain another perturbation.

    Args:
        perturb: the inner perturbation, or a radius `rho`, which means `L2(rho)`.

    Raises:
        TypeError: `perturb` is neither.
        ValueError: the radius is negative or not finite.
    """

    perturb: Perturbation | Radius = field(default=L2(0.05))

    def __post_init__(self) -> None:
        object.__setattr__(self, "perturb", geometry(self.perturb))

    def inner(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement of the inner perturbation."""
        return cast(Perturbation, self.perturb)(gradient, oracle.within("perturb"))

    def inner_part(self, oracle: Oracle, among: Part) -> Part:
        """Returns the tensors of the gradient that the inner perturbation needs, see `needed`."""
        return needed(cast(Perturbation, self.perturb), oracle.within("perturb"), among)


@dataclass(frozen=True)
class Friendly(Around):
    """F-SAM: perturbs along d = g - sigma m, the part of the gradient that is specific to the batch (Li et al., 2024).

    Source: https://arxiv.org/abs/2403.12350. m is a running average of the gradient, m <- lam m + (1 - lam) g after
    each use; at the first step m = g and d = g.

    Args:
        perturb: perturbation that is applied to d, or a radius `rho`, which means `L2(rho)`.
        sigma: factor of the average that is subtracted, >= 0; 0 is SAM.
        lam: decay of the average, in [0, 1]; the authors use 0.6 to 0.95.

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
        """Returns the displacement for the gradient without its average."""
        m: Vector | None = oracle.state.get("m")
        oracle.state["m"] = gradient if m is None else m * self.lam + gradient * (1 - self.lam)
        return self.inner(gradient if m is None else gradient - m * self.sigma, oracle)


@dataclass(frozen=True)
class Smoothed(Around):
    """VaSSO: perturbs along a running average of the gradient, d <- (1 - theta) d + theta g (Li and Giannakis, 2023).

    Source: https://arxiv.org/abs/2309.15639. The average has a lower variance than g. At the first step d = g.

    Args:
        perturb: perturbation that is applied to d, or a radius `rho`, which means `L2(rho)`.
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
        """Returns the displacement for the averaged gradient."""
        d: Vector | None = oracle.state.get("d")
        d = gradient if d is None else d * (1 - self.theta) + gradient * self.theta
        oracle.state["d"] = d
        return self.inner(d, oracle)


@dataclass(frozen=True)
class ZScore(Around):
    """ZSharp: perturbs along the entries of the gradient with the largest |z|, the top share `keep` (Yun, 2025).

    Source: https://arxiv.org/abs/2505.02369. z is the entry minus the mean of its tensor, divided by the standard
    deviation of the tensor. Tensors with fewer than two dimensions (biases, normalisation layers) are kept whole, as in
    the authors' code. That code gives each filtered tensor its own radius, as `ZScore(PerTensor(rho))` does for all
    tensors; the paper has one radius for all, as `ZScore(L2(rho))`.

    Args:
        perturb: perturbation that is applied to the filtered gradient, or a radius `rho`, which means `L2(rho)`.
        keep: share of the entries of each tensor that are kept, rounded up, in (0, 1]; 1 is SAM; the authors use 0.05.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `keep` is outside its range.
    """

    keep: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        share("keep", self.keep)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement for the filtered gradient."""
        if self.keep == 1:
            return self.inner(gradient, oracle)
        kept = gradient.each(lambda g: g if g.dim() < 2 or not g.numel() else g * self._outstanding(g))
        return self.inner(gradient.like(kept.tensors, gradient.holes), oracle)

    def part(self, oracle: Oracle, among: Part) -> Part:
        """See `needed`: a z-score is that of a single tensor."""
        return self.inner_part(oracle, among)

    def _outstanding(self, g: Tensor) -> Tensor:
        distance = (g - g.mean()).abs()  # |z| up to a factor, which does not change the order
        kept = portion(self.keep, g.numel())  # not kthvalue, which has no deterministic implementation on a GPU
        return distance >= distance.flatten().topk(kept).values[-1]


@dataclass(frozen=True)
class Centralised(Around):
    """GCSAM: perturbs along the centralised gradient, g minus its mean over each row (Hassan et al., 2025).

    Source: https://arxiv.org/abs/2501.11584. A row is what belongs to one index of the first dimension: the weights of
    an output unit, as in gradient centralisation (Yong et al., 2020, https://arxiv.org/abs/2004.01461). Tensors with
    fewer than two dimensions are kept. The gradient that is descended is not centralised; accounts of the method by
    others differ in this, and the authors' code was not found in a public source.

    Args:
        perturb: perturbation that is applied to the centralised gradient, or a radius `rho`, which means `L2(rho)`.

    Raises:
        TypeError: `perturb` is neither a perturbation nor a radius.
        ValueError: the radius is negative or not finite.
    """

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement for the centralised gradient."""
        return self.inner(gradient.like(gradient.each(_centred).tensors, gradient.holes), oracle)

    def part(self, oracle: Oracle, among: Part) -> Part:
        """See `needed`: a row is a part of a single tensor."""
        return self.inner_part(oracle, among)


def _centred(g: Tensor) -> Tensor:
    return g if g.dim() < 2 or not g.numel() else g - g.mean(tuple(range(1, g.dim())), keepdim=True)


@dataclass(frozen=True)
class NormLayers(Around):
    """SAM-ON: perturbs along the gradient of the normalisation layers only (Mueller et al., 2023).

    Source: https://arxiv.org/abs/2306.04226. The displacement of these layers has the full radius. A parameter belongs
    to a normalisation layer if the class name of its module contains "norm" (as those of torch, timm and Hugging Face
    do), or if a component of its own name begins or ends with "norm" or "bn", as in `layer1.0.bn2.weight`. The authors
    use the parameter's name only, with "norm" or "bn" anywhere in it, which also matches "subnet".

    Args:
        perturb: perturbation that is applied to this part of the gradient, or a radius `rho`, which means `L2(rho)`.

    Raises:
        TypeError: `perturb` is neither a perturbation nor a radius.

    Raises when called:
        ValueError: the model has no trainable normalisation layer.
    """

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement of the normalisation layers."""
        return _confined(_pop(oracle, self._chosen), gradient, lambda part: self.inner(part, oracle))

    def part(self, oracle: Oracle, among: Part) -> Part:
        """Returns the normalisation layers, see `needed`."""
        return _part(_peek(oracle, self._chosen), among, lambda part: self.inner_part(oracle, part))

    def _chosen(self, oracle: Oracle) -> tuple[bool, ...]:
        labels = zip(oracle.layers, oracle.names, strict=True)
        norms = tuple(["norm" in layer.lower() or bool(_NORM.search(name.lower())) for layer, name in labels])
        if not any(norms):
            raise ValueError(
                "NormLayers perturbs normalisation layers alone, and the model has none that is trained: use L2 or "
                "Adaptive, with a where=, or name your layers' class ...Norm"
            )
        return norms


@dataclass(frozen=True)
class Only:
    """Displaces the parameters that `where` selects, and no others.

    The inner perturbation is applied to their part of the gradient, so that their displacement has the full radius. The
    other parameters keep their gradient, taken at that point. This is SAM of the ports (davda54/sam) on an optimizer
    that holds a part of the parameters:

        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        SAM(Only(lambda name, p: id(p) in held, L2(0.05)))

    Args:
        where: `(name, parameter) -> bool`, called for each trainable parameter in each step.
        perturb: perturbation that is applied to the selected part of the gradient, or a radius `rho`, which means
            `L2(rho)`. In a mask (`FisherMask`, `DropGrow`) the share counts the entries of all parameters.

    Raises:
        TypeError: `where` is not a function, or `perturb` is neither a perturbation nor a radius.
        ValueError: the radius is negative or not finite.

    Raises when called:
        ValueError: `where` selects no trainable parameter.

    Example:
        >>> import torch
        >>> from bisam import L2, ModelOracle, Only, Vector, cross_entropy
        >>> oracle = ModelOracle(torch.nn.Linear(2, 1), cross_entropy)
        >>> gradient = Vector([torch.tensor([[3.0, 4.0]]), torch.tensor([5.0])])
        >>> Only(lambda name, p: name == "weight", L2(1.0))(gradient, oracle).tensors
        [tensor([[0.6000, 0.8000]]), tensor([0.])]
    """

    where: Callable[[str, Tensor], bool]
    perturb: Perturbation | Radius = field(default=L2(0.05))

    def __post_init__(self) -> None:
        instance("where", self.where, "a function (name, parameter) -> bool")
        object.__setattr__(self, "perturb", geometry(self.perturb))

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement of the selected parameters."""
        perturb, inside = cast(Perturbation, self.perturb), oracle.within("perturb")
        return _confined(_pop(oracle, self._chosen), gradient, lambda part: perturb(part, inside))

    def part(self, oracle: Oracle, among: Part) -> Part:
        """Returns the selected parameters, see `needed`."""
        perturb, inside = cast(Perturbation, self.perturb), oracle.within("perturb")
        return _part(_peek(oracle, self._chosen), among, lambda part: needed(perturb, inside, part))

    def _chosen(self, oracle: Oracle) -> tuple[bool, ...]:
        # The parameters and not `oracle.weights`: whole where they are sharded, and not displaced in a shifted oracle.
        chosen = tuple([bool(self.where(name, p)) for name, p in zip(oracle.names, oracle.parameters, strict=True)])
        if not any(chosen):
            names = ", ".join(oracle.names[:3]) + (", ..." if len(chosen) > 3 else "")
            raise ValueError(
                f"Only displaces the parameters that where= selects, and it selects none of the {len(chosen)} that are "
                f"trained ({names}): compare with these names, or use the inner perturbation alone for all"
            )
        return chosen


@dataclass(frozen=True)
class PerGroup:
    """A perturbation for each group of parameters, for example a radius for the head and another one for the rest.

    A parameter belongs to the first group whose `where` selects it; those in no group keep their weights. For the
    parameter groups of an optimizer see `of`.

    Args:
        groups: a pair for each group: a function `where(name, parameter) -> bool`, called for each trainable parameter
            in each step, and a perturbation of the group, or a radius `rho`, which means `L2(rho)`.
        norm: "group": each group has a ball of its own, and the displacement of the whole is longer than each radius.
            "all": the norm in each perturbation is that over all groups, as in the ports with a `rho` for each
            parameter group (davda54/sam): with equal radii it is one perturbation of all groups.

    Raises:
        TypeError: a `where` is not a function, or a perturbation is neither a perturbation nor a radius.
        ValueError: there is no group, `norm` is neither "group" nor "all", or a radius is a `FlipRate`.

    Raises when called:
        ValueError: a group has no trainable parameter; with `of`, no group has one.

    Example:
        >>> import torch
        >>> from bisam import ModelOracle, Vector, cross_entropy
        >>> from bisam.perturbations import PerGroup
        >>> oracle = ModelOracle(torch.nn.Linear(2, 1), cross_entropy)
        >>> gradient = Vector([torch.tensor([[0.0, 3.0]]), torch.tensor([4.0])])
        >>> groups = [(lambda name, p: name == "bias", 0.5), (lambda name, p: True, 1.0)]
        >>> PerGroup(groups)(gradient, oracle).tensors
        [tensor([[0., 1.]]), tensor([0.5000])]
        >>> PerGroup(groups, norm="all")(gradient, oracle).tensors
        [tensor([[0.0000, 0.6000]]), tensor([0.4000])]
    """

    groups: Sequence[tuple[Callable[[str, Tensor], bool], Perturbation | Radius]]
    norm: Literal["group", "all"] = "group"

    def __post_init__(self) -> None:
        groups = cast(Any, self.groups)
        if not (isinstance(groups, Sequence) and groups and all(isinstance(pair, tuple | list) for pair in groups)):
            raise ValueError(f"groups must be pairs of a function and a perturbation in a list, got {shown(groups)}")
        if wrong := [pair for pair in groups if len(pair) != 2]:
            raise ValueError(f"a group must be a pair of a function and a perturbation, got {shown(wrong[0])}")
        for where, _ in self.groups:
            instance("where", where, "a function (name, parameter) -> bool")
        perturbs = [geometry(perturb) for _, perturb in self.groups]
        if any(_follows_flips(perturb) for perturb in perturbs):
            raise ValueError(
                "a FlipRate follows the flips of all displacements together, and here each group would have its own: "
                f"use a number or another schedule, got {self.groups!r}"
            )
        if self.norm not in ("group", "all"):
            raise ValueError(f"norm must be 'group' or 'all', got {self.norm!r}")
        wheres = [where for where, _ in self.groups]
        object.__setattr__(self, "groups", tuple(zip(wheres, perturbs, strict=True)))

    @classmethod
    def of(
        cls,
        optimizer: Any,
        geometry: Callable[[Radius], Perturbation] = L2,
        norm: Literal["group", "all"] = "all",
    ) -> PerGroup:
        """Returns the perturbation whose groups are the parameter groups of an optimizer.

        The radius of a group is its entry "rho", which is read in each step, so that a scheduler may change it:

            optimizer = SGD([{"params": body, "rho": 0.05}, {"params": head, "rho": 0.5}], lr=0.1)
            SAM(PerGroup.of(optimizer))

        Args:
            optimizer: an optimizer with parameter groups; it is read and not changed.
            geometry: function from a radius to the perturbation of a group, such as `L2` or `Adaptive`.
            norm: see `PerGroup`.

        Raises:
            TypeError: the optimizer has no parameter groups.
            ValueError: a group has no entry "rho", or it is negative.
        """
        groups = getattr(optimizer, "param_groups", None)
        if not isinstance(groups, list):
            raise TypeError(f"optimizer must have parameter groups with an entry 'rho', got {optimizer!r}")
        for i, group in enumerate(cast(list[dict[str, Any]], groups)):
            if "rho" not in group:
                raise ValueError(
                    f"parameter group {i} of the {type(optimizer).__name__} has no radius: add an entry, as in "
                    '{"params": ..., "rho": 0.05}'
                )
        parts = [(_InGroup(optimizer, i), geometry(_RhoOf(optimizer, i))) for i in range(len(cast(Any, groups)))]
        return cls(parts, norm)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement of all groups."""
        chosen = _pop(oracle, self._chosen)
        gradient = gradient.confined([i >= 0 for i in chosen])
        e: Vector | None = None
        for mask, perturb, inside in self._parts(chosen, oracle):
            of_group = gradient.confined(mask) if self.norm == "group" else gradient
            moved = perturb(of_group, inside).confined(mask)
            e = moved if e is None else e + moved
        assert e is not None
        return e

    def part(self, oracle: Oracle, among: Part) -> Part:
        """Returns the parameters of all groups, or those that their perturbations need; see `needed`."""
        chosen = _peek(oracle, self._chosen)
        if self.norm == "all":
            return tuple([i >= 0 for i in chosen])
        parts = [
            cast(Sequence[bool], _part(mask, among, partial(needed, perturb, inside)))
            for mask, perturb, inside in self._parts(chosen, oracle)
        ]
        return tuple([any(tensor) for tensor in zip(*parts, strict=True)])

    def _parts(self, chosen: Sequence[int], oracle: Oracle) -> list[tuple[list[bool], Perturbation, Oracle]]:
        return [
            ([i == n for i in chosen], cast(Perturbation, perturb), oracle.within(f"group {n}"))
            for n, (_, perturb) in enumerate(self.groups)
        ]

    def _chosen(self, oracle: Oracle) -> tuple[int, ...]:
        """Returns the number of the group of each parameter, -1 for those in none."""
        wheres = [where.members() if isinstance(where, _InGroup) else where for where, _ in self.groups]
        chosen = tuple(
            [
                next((i for i, where in enumerate(wheres) if where(name, p)), -1)
                for name, p in zip(oracle.names, oracle.parameters, strict=True)
            ]
        )
        if max(chosen, default=-1) < 0 and all(isinstance(where, _InGroup) for where, _ in self.groups):
            raise ValueError(
                f"PerGroup.of reads an optimizer that holds none of the {len(chosen)} parameters that are trained in "
                "the model: give it the optimizer that trains this model. A copy of the method alone has a copy of the "
                "optimizer; copy the SharpnessAware loss with its model instead"
            )
        # A group of an optimizer may be empty, as that of frozen parameters is.
        groups = enumerate(self.groups)
        if missing := [n for n, (where, _) in groups if n not in chosen and not isinstance(where, _InGroup)]:
            raise ValueError(
                f"group {missing[0]} of PerGroup has none of the {len(chosen)} parameters that are trained: the first "
                "group that selects a parameter has it, so that a general group goes last"
            )
        return chosen


@dataclass(frozen=True)
class _InGroup:
    """Whether a parameter is in a parameter group of an optimizer."""

    optimizer: Any
    index: int

    def __call__(self, name: str, parameter: Tensor) -> bool:
        return self.members()(name, parameter)

    def members(self) -> Callable[[str, Tensor], bool]:
        """Returns the same function for the parameters that the group has now, whose calls are fast."""
        members = {id(p) for p in self.optimizer.param_groups[self.index]["params"]}
        return lambda name, parameter: id(parameter) in members


@dataclass(frozen=True)
class _RhoOf:
    """A schedule: the entry "rho" of a parameter group of an optimizer."""

    optimizer: Any
    index: int

    def __call__(self, step: int) -> float | Tensor:
        return self.optimizer.param_groups[self.index]["rho"]


def _follows_flips(perturb: Any) -> bool:
    return isinstance(getattr(perturb, "rho", None), FlipRate) or (
        hasattr(perturb, "perturb") and _follows_flips(perturb.perturb)
    )


def _confined(chosen: Sequence[bool], gradient: Vector, perturb: Callable[[Vector], Vector]) -> Vector:
    """Returns the displacement for the chosen part of a gradient, and zeros elsewhere."""
    # A geometry gives a zero displacement where the gradient is zero; other perturbations may not.
    return perturb(gradient.confined(chosen)).confined(chosen)


def _part(chosen: Sequence[bool], among: Part, inner: Callable[[Part], Part]) -> Part:
    """Returns the part of the chosen tensors that the perturbation inside needs."""
    asked = inner(chosen if among is None else tuple([c and a for c, a in zip(chosen, among, strict=True)]))
    return chosen if asked is None else tuple([c and a for c, a in zip(chosen, asked, strict=True)])


_CHOSEN = "chosen"


def _peek(oracle: Oracle, choose: Callable[[Oracle], tuple[Choice, ...]]) -> tuple[Choice, ...]:
    """Returns the choice of the next call, and keeps it until then: a function of the user may choose otherwise."""
    if _CHOSEN not in oracle.state:
        oracle.state[_CHOSEN] = choose(oracle)
    return oracle.state[_CHOSEN]


def _pop(oracle: Oracle, choose: Callable[[Oracle], tuple[Choice, ...]]) -> tuple[Choice, ...]:
    """Returns the choice that was kept, or a new one, and forgets it."""
    return oracle.state.pop(_CHOSEN, None) or choose(oracle)
