"""Arguments: refuse, where it is given, what would fail late or silently; messages show the value and the remedy."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any


def positive(name: str, value: Any) -> None:
    """Refuse a hyper-parameter that is not a positive finite number.

    Raises:
        TypeError: it is no number; with the name and the value.
        ValueError: it is not positive or not finite.
    """
    number(name, value)
    if not (0 < value < math.inf):
        raise ValueError(f"{name} must be positive and finite, got {value!r}")


def number(name: str, value: Any) -> None:
    """Refuse a hyper-parameter that is no real number.

    Raises:
        TypeError: with the name and the value.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def non_negative(name: str, value: Any) -> None:
    """Refuse a hyper-parameter that is negative or not finite.

    Raises:
        TypeError: it is no number; with the name and the value.
        ValueError: it is negative or not finite.
    """
    number(name, value)
    if not (0 <= value < math.inf):
        raise ValueError(f"{name} must be non-negative and finite, got {value!r}")


def instance(name: str, value: Any, remedy: str, *also: type) -> None:
    """Refuse a class where an instance is needed, and what cannot be called.

    Raises:
        TypeError: with the name, the value and `remedy`, unless it is one of the types `also`.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__}, not an instance: write {value.__name__}(...)")
    if not (callable(value) or isinstance(value, also)):
        raise TypeError(f"{name} must be {remedy}, got {value!r}")
