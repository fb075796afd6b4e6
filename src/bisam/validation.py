"""Validation: checks of arguments that would fail late or silently; messages show the value and the remedy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Set
from numbers import Real
from typing import Any, cast

from torch import Tensor

LARGEST = 2**63 - 1
"""Largest integer that is accepted where no argument asks for less: that of int64."""
MOST_QUERIES = 1_000
"""Largest number of queries in a row that one argument can ask for: more would run for minutes without a message."""


def positive(name: str, value: Any) -> None:
    """Checks that a hyper-parameter is a positive finite number.

    Raises:
        TypeError: it is not a number; the message shows the name and the value.
        ValueError: it is not positive or not finite.
    """
    number(name, value)
    if not (0 < value < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {shown(value)}")


def number(name: str, value: Any) -> None:
    """Checks that a hyper-parameter is a real number that a float can hold.

    Raises:
        TypeError: it is not a number; the message shows the name and the value.
        ValueError: it is an integer or a fraction beyond the range of floats, with which arithmetic would overflow.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {shown(value)}")
    try:
        float(value)
    except OverflowError:
        raise ValueError(f"{name} must be within ±1.8e308, got {shown(value)}") from None


def finite(name: str, value: Any) -> None:
    """Checks that a hyper-parameter is a finite number.

    Raises:
        TypeError: it is not a number; the message shows the name and the value.
        ValueError: it is not finite.
    """
    number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {shown(value)}")


def non_negative(name: str, value: Any) -> None:
    """Checks that a hyper-parameter is a finite number >= 0.

    Raises:
        TypeError: it is not a number; the message shows the name and the value.
        ValueError: it is negative or not finite.
    """
    number(name, value)
    if not (0 <= value < math.inf):
        raise ValueError(f"{name} must be non-negative and finite, got {shown(value)}")


def share(name: str, value: Any, *, zero: bool = False, one: bool = True) -> None:
    """Checks that a number is in (0, 1]; `zero` allows 0 and `one=False` excludes 1.

    Raises:
        TypeError: it is not a number; the message shows the name and the value.
        ValueError: it is outside the interval; the message shows the name and the value.
    """
    number(name, value)
    if not (0 <= value <= 1) or (value == 0 and not zero) or (value == 1 and not one):
        raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1{']' if one else ')'}, got {shown(value)}")


def portion(share: float, n: int) -> int:
    """Returns the share of n, rounded up, at least 1; 0.07 of 100 is 7, although 0.07 * 100 > 7 in floating point."""
    return min(n, max(1, math.ceil(share * n - 1e-9)))


def whole(name: str, value: Any, least: int = 1, most: int = LARGEST) -> None:
    """Checks that a number is an int of at least `least` and at most `most`.

    Raises:
        TypeError: it is not an int; the message shows the name and the value.
        ValueError: it is outside the range; the message shows the name and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {shown(value)}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, got {shown(value)}")


def flag(name: str, value: Any) -> None:
    """Checks that an argument is True or False: the text "no" would count as true.

    Raises:
        TypeError: it is neither; the message shows the name and the value.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {shown(value)}")


def numbers_of_classes(name: str, of_class: str, values: Any) -> tuple[float, ...]:
    """Returns numbers >= 0, one for each class in the order of the classes, as a tuple.

    Args:
        name: name of the argument.
        of_class: what one of them is called, before the number of its class.
        values: the argument.

    Raises:
        TypeError: one is not a number; the message shows the class and the value.
        ValueError: they are no sequence, as a dict and a set are, or empty; or one is negative or not finite.
    """
    if isinstance(values, str | type | Mapping | Set) or not hasattr(values, "__len__") or not len(values):
        raise ValueError(
            f"{name} must be numbers in a list, one for each class in the order of the classes, got {shown(values)}"
        )
    if isinstance(values, Tensor):
        raise TypeError(f"{name} must be numbers, not a tensor: use {name}.tolist(), got {shown(values)}")
    for label, value in enumerate(values):
        non_negative(f"{of_class} {label}", value)
    return tuple(values)


def instance(name: str, value: Any, remedy: str, *also: type) -> None:
    """Checks that a value is callable and not a class.

    Raises:
        TypeError: it is a class, or it is neither callable nor an instance of the types `also`; the message shows the
            name, the value and `remedy`.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__}, not an instance: write {value.__name__}(...)")
    if not (callable(value) or isinstance(value, also)):
        raise TypeError(f"{name} must be {remedy}, got {shown(value)}")


def check_losses(losses: Any, targets: Any) -> None:
    """Checks that an objective returned a scalar or one loss per example.

    Raises:
        TypeError: it did not return a floating-point tensor.
        ValueError: its shape does not match the shape of the targets.
    """
    if not isinstance(losses, Tensor) or not losses.is_floating_point():
        raise TypeError(f"the loss must return a floating-point tensor, got {describe(losses)}")
    if losses.dim() == 0 or not isinstance(targets, Tensor):
        return
    if losses.dim() > max(targets.dim(), 1) or losses.shape[:1] != (targets.shape or (1,))[:1]:
        raise ValueError(
            f"the loss returned shape {tuple(losses.shape)} for targets of shape {tuple(targets.shape)}: it must be a "
            "scalar, or one loss per example (N,)"
        )


def describe(value: Any) -> str:
    """Describes a value for an error message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    return f"a tuple of {len(cast('tuple[Any, ...]', value))}" if isinstance(value, tuple) else type(value).__name__


def shown(value: Any) -> str:
    """Returns the `repr` of a value, shortened to about 200 characters.

    An integer of more than 4,300 digits, which has no `repr`, is described by its length.
    """
    if isinstance(value, int) and abs(value) > 10**100:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except Exception:  # a class can fail in its own `__repr__`, also because a part of it is such an integer
        return f"an object of {type(value).__name__}"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


_LONGEST = 200
