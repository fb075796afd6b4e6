"""Proximal: proximal operators of constraints and regularisers, for min-max problems that have them.

A problem with a constraint or a regulariser g asks for weights w with 0 in F(w) + dg(w), where F is the operator of the
game. Methods use g through its proximal operator, argmin over z of g(z) + ||z - point||^2 / (2 gamma), which is the
projection if g is a constraint:

    >>> from bisam import RAPP, CEGPlus
    >>> box = RAPP(0.1, prox=Box(-1.0, 1.0))                                 # all parameters are in [-1, 1]
    >>> named = RAPP(0.1, prox={"x": Box(0.0, 1.0), "y": Simplex()})         # by name of a parameter or module
    >>> sparse = CEGPlus(0.1, prox={"generator": L1(1e-4)})                  # one player; the other one is free
    >>> ball = RAPP(0.1, prox=lambda point, oracle, gamma: point / point.norm().clamp_min(1.0))    # jointly

A proximal operator is any callable `(point, oracle, gamma) -> Vector`. Those of this module act on each parameter
separately (`Separable`), so that a mapping can assign them to names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from bisam.oracle import Oracle
from bisam.validation import instance, non_negative, number, positive
from bisam.vector import Vector

Prox = Callable[[Vector, Oracle, float], Vector]
"""A function `(point, oracle, gamma) -> Vector`, the proximal operator with step size `gamma` at `point`."""


class Separable(ABC):
    """Base class of proximal operators that act on each parameter separately.

    A subclass implements `of`; it can then be used for all parameters or, in a mapping, for some.

    Attributes:
        elementwise: whether `of` acts on each entry separately, so that parts of a sharded parameter need not be
            gathered.
    """

    elementwise: ClassVar[bool] = False

    @abstractmethod
    def of(self, tensor: Tensor, gamma: float) -> Tensor:
        """Returns the proximal operator at one whole parameter, a new tensor of the same shape.

        Args:
            tensor: the parameter, or for elementwise operators a part of it.
            gamma: step size, > 0.
        """

    def __call__(self, point: Vector, oracle: Oracle, gamma: float) -> Vector:
        """Returns the proximal operator at all parameters."""
        return _applied([self] * len(point), point, gamma)


@dataclass(frozen=True)
class Box(Separable):
    """The constraint low <= w <= high on each entry; its proximal operator clamps.

    Args:
        low: smallest value; `float("-inf")` for none.
        high: largest value, >= `low`; `float("inf")` for none.

    Raises:
        TypeError: an argument is not a number.
        ValueError: `low` is larger than `high`, or one of them is NaN.

    Raises when called:
        TypeError: a parameter is complex.

    Example:
        >>> import torch
        >>> from bisam.proximal import Box
        >>> Box(-1.0, 1.0).of(torch.tensor([-3.0, 0.5, 2.0]), gamma=0.1)
        tensor([-1.0000,  0.5000,  1.0000])
    """

    low: float
    high: float

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("low", self.low)
        number("high", self.high)
        if not self.low <= self.high:
            raise ValueError(f"low must be at most high, got low {self.low!r} and high {self.high!r}")

    def of(self, tensor: Tensor, gamma: float) -> Tensor:
        """Returns the entries, clamped."""
        _check_real(self, tensor)
        return tensor.clamp(self.low, self.high)


@dataclass(frozen=True)
class L1(Separable):
    """The regulariser weight ||w||_1; its proximal operator shrinks each entry by gamma weight (soft thresholding).

    A complex entry keeps its phase, and its modulus shrinks.

    Args:
        weight: factor of the norm, >= 0; with 0 there is no regulariser.

    Raises:
        TypeError: `weight` is not a number.
        ValueError: `weight` is negative or not finite.

    Example:
        >>> import torch
        >>> from bisam.proximal import L1
        >>> L1(5.0).of(torch.tensor([-3.0, 0.25, 2.0]), gamma=0.1)
        tensor([-2.5000,  0.0000,  1.5000])
    """

    weight: float

    elementwise: ClassVar[bool] = True

    def __post_init__(self) -> None:
        non_negative("weight", self.weight)

    def of(self, tensor: Tensor, gamma: float) -> Tensor:
        """Returns the entries, moved towards 0 by gamma weight."""
        threshold = gamma * self.weight
        if not tensor.is_complex():
            return tensor - tensor.clamp(-threshold, threshold)
        size = tensor.abs()
        return tensor * ((size - threshold).clamp_min(0.0) / size.clamp_min(torch.finfo(size.dtype).tiny))


@dataclass(frozen=True)
class Simplex(Separable):
    """The constraint that each row has entries >= 0 with the sum `total`, as mixed strategies have.

    The proximal operator is the projection along the last dimension, computed by sorting (Duchi et al., 2008,
    https://doi.org/10.1145/1390156.1390191).

    Args:
        total: sum of the entries of a row, > 0.

    Raises:
        TypeError: `total` is not a number.
        ValueError: `total` is not positive and finite.

    Raises when called:
        TypeError: a parameter is complex.
        ValueError: a parameter has no dimension.

    Example:
        >>> import torch
        >>> from bisam.proximal import Simplex
        >>> Simplex().of(torch.tensor([0.5, 1.0, -2.0]), gamma=0.1)
        tensor([0.2500, 0.7500, 0.0000])
    """

    total: float = 1.0

    def __post_init__(self) -> None:
        positive("total", self.total)

    def of(self, tensor: Tensor, gamma: float) -> Tensor:
        """Returns the nearest point of the simplex, along the last dimension."""
        _check_real(self, tensor)
        if tensor.dim() == 0:
            raise ValueError("Simplex needs a parameter with a dimension for the strategies, got one of shape ()")
        ranked = tensor.sort(dim=-1, descending=True).values
        count = torch.arange(1, tensor.shape[-1] + 1, dtype=tensor.dtype, device=tensor.device)
        shift = (ranked.cumsum(-1) - self.total) / count
        support = (ranked > shift).sum(-1, keepdim=True).clamp_min(1)  # at least the largest entry, also if it is NaN
        return (tensor - shift.gather(-1, support - 1)).clamp_min(0.0)


@dataclass(frozen=True)
class Named:
    """Proximal operators by name; parameters without one are free.

    `RAPP(prox={...})` creates it. A name is that of a parameter, or of a module for all parameters in it.

    Args:
        parts: pairs of a name and the operator of its parameters.

    Raises when called:
        ValueError: the model has no parameter of a name, or two names include the same parameter.
    """

    parts: tuple[tuple[str, Separable], ...]

    def __call__(self, point: Vector, oracle: Oracle, gamma: float) -> Vector:
        """Returns the operators at their parameters, and other parameters unchanged."""
        chosen: list[Separable | None] = [None] * len(point)
        for key, prox in self.parts:
            found = [i for i, name in enumerate(oracle.names) if name == key or name.startswith(f"{key}.")]
            if not found:
                raise ValueError(
                    f"prox names {key!r}, and the model has no trainable parameter or module of that name: its "
                    f"parameters are {', '.join(oracle.names[:10])}{', ...' if len(oracle.names) > 10 else ''}"
                )
            for i in found:
                if chosen[i] is not None:
                    raise ValueError(f"prox has two operators for parameter {oracle.names[i]!r}: leave one out")
                chosen[i] = prox
        return _applied(chosen, point, gamma)


def proximal(value: Any) -> Prox | None:
    """Returns the proximal operator that an argument `prox` describes: None, an operator, or a mapping from names.

    Raises:
        TypeError: the value, or one in the mapping, is of another type.
    """
    if isinstance(value, Mapping):
        parts = tuple(cast("Mapping[Any, Any]", value).items())
        for name, part in parts:
            if not isinstance(name, str) or not isinstance(part, Separable):
                raise TypeError(
                    f"prox maps names of parameters or modules to operators such as Box(-1, 1), got {name!r}: {part!r}"
                )
        return Named(parts)
    if value is not None:
        instance("prox", value, "an operator such as Box(-1, 1), a mapping from names to such, or None")
    return value


def _applied(proxes: Sequence[Separable | None], point: Vector, gamma: float) -> Vector:
    layout, tensors = point.layout, list[Tensor]()
    for i, (prox, tensor) in enumerate(zip(proxes, point, strict=True)):
        if prox is None or prox.elementwise:
            tensors.append(tensor if prox is None else prox.of(tensor, gamma))
        else:
            tensors.append(layout.part(i, prox.of(layout.whole(i, tensor), gamma)))
    return point.like(tensors, frozenset(i for i in point.holes if proxes[i] is None))


def _check_real(prox: Separable, tensor: Tensor) -> None:
    if tensor.is_complex():
        raise TypeError(
            f"{prox!r} compares entries, and a parameter is complex ({tensor.dtype}): use L1, or name others"
        )
