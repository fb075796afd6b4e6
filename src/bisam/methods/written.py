"""Written: methods as the calls that make them, for `repr`.

>>> from bisam import BiSAM, SAM, Tanh
>>> from bisam.masks import RandomMask
>>> BiSAM(), BiSAM(bound=Tanh(mu=5.0)), SAM(RandomMask(0.1))
(BiSAM(rho=0.05), BiSAM(rho=0.05, bound=Tanh(mu=5.0)), SAM(RandomMask(0.1)))
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any

from bisam.objectives import CrossEntropy, LowerBound, NegLog, ObjectiveWrapper, cross_entropy
from bisam.perturbations import L2, Adaptive, is_radius

Argument = tuple[str, Any, Any]
"""The name of a parameter, its value, and its default; MISSING if it has none."""

_PARTS = tuple([f"bisam.{module}" for module in ("masks", "objectives", "perturbations", "schedules")])


class Written:
    """Base class of methods that show the call that makes them: `BiSAM` for a bound as the adversary of `SAM`."""

    def __repr__(self) -> str:
        values: Any = self
        bound = getattr(self, "ascent", None)
        if type(self).__name__ != "SAM" or not isinstance(bound, LowerBound | ObjectiveWrapper):
            return call(type(self).__name__, _arguments(self))
        ball, descent = values.perturb, values.descent
        if isinstance(ball, Adaptive) and ball.where is None and descent is None:
            return call("ABiSAM", [("rho", ball.rho, None), ("bound", bound, NegLog()), ("eta", ball.eta, 0.0)])
        return call("BiSAM", [("rho", ball, None), ("bound", bound, NegLog()), ("descent", descent, None)])


def call(name: str, arguments: Iterable[Argument]) -> str:
    """Returns a call as text: without arguments that have their default, except the radius or the perturbation."""
    shown: list[str] = []
    for parameter, value, default in arguments:
        if parameter == "perturb" and not shown:
            shown.append(_text(value))
        elif parameter in ("perturb", "rho", "sigma") or not _same(value, default):
            shown.append(f"{parameter}={_text(value)}")
    return f"{name}({', '.join(shown)})"


def _arguments(value: Any) -> list[Argument]:
    """Returns the arguments of the dataclass that `value` is an instance of."""
    return [(f.name, getattr(value, f.name), f.default) for f in fields(value) if f.init]


def _text(value: Any) -> str:
    kind = type(value)
    if kind is L2 and is_radius(value.rho):
        return _text(value.rho)
    if kind is CrossEntropy and value == cross_entropy:
        return "cross_entropy"
    if not kind.__module__.startswith(_PARTS) or not hasattr(kind, "__dataclass_fields__"):
        return repr(value)
    return call(kind.__name__, _arguments(value))


def _same(value: Any, default: Any) -> bool:
    """Whether a value is the default; values of other types may be equal, and some cannot be compared."""
    return value is default or (default is not MISSING and type(value) is type(default) and bool(value == default))
