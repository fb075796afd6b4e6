"""Written: the calls that make methods, for `repr` and for messages.

>>> from bisam import BiSAM, SAM, Tanh
>>> from bisam.masks import RandomMask
>>> BiSAM(), BiSAM(bound=Tanh(mu=5.0)), SAM(RandomMask(0.1))
(BiSAM(rho=0.05), BiSAM(rho=0.05, bound=Tanh(mu=5.0)), SAM(RandomMask(0.1)))
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import MISSING, fields
from typing import Any, Self

from bisam.objectives import CrossEntropy, LowerBound, NegLog, ObjectiveWrapper, cross_entropy
from bisam.perturbations import L2, Adaptive, is_radius

Argument = tuple[str, Any, Any]
"""The name of a parameter, its value, and its default; MISSING if it has none."""

_REMEDIES = {
    "rho": "give the radius as a number, METHOD(0.05), or a perturbation, METHOD(L2(0.05))",
    "adaptive": "give an adaptive ball, METHOD(Adaptive(0.5)), whose radii are larger than those of L2",
    "eta": "it is a setting of the adaptive ball, METHOD(Adaptive(0.5, eta=0.01))",
}
"""Maps the arguments of other packages to a text that says what to write instead."""

_PARTS = tuple([f"bisam.{module}" for module in ("masks", "objectives", "perturbations", "schedules")])


class Called:
    """Base class of methods that take a perturbation: the arguments of other packages are refused with a remedy."""

    def __new__(cls, *arguments: Any, **named: Any) -> Self:
        """Makes an instance; `__init__` sets its fields.

        Raises:
            TypeError: an argument has a name that `__init__` does not know.
        """
        if named:
            known = inspect.signature(cls).parameters
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in known.values()):
                for name in named:
                    if name not in known:
                        raise TypeError(_unknown(cls.__name__, name, list(known)))
        return super().__new__(cls)


def _unknown(method: str, name: str, known: list[str]) -> str:
    """Returns the message for an argument that a method does not have."""
    if name in _REMEDIES and known[0] == "perturb":
        return f"{method} has no argument {name!r}: " + _REMEDIES[name].replace("METHOD", method)
    return f"{method} has no argument {name!r}: its arguments are {', '.join(known)}"


class Written(Called):
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
