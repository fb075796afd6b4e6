"""Validation: refuse what would fail late or silently, where it is given; messages show the value and the remedy."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, cast

from torch import Tensor


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


def finite(name: str, value: Any) -> None:
    """Refuse a hyper-parameter that is no finite number.

    Raises:
        TypeError: it is no number; with the name and the value.
        ValueError: it is not finite.
    """
    number(name, value)
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")


def non_negative(name: str, value: Any) -> None:
    """Refuse a hyper-parameter that is negative or not finite.

    Raises:
        TypeError: it is no number; with the name and the value.
        ValueError: it is negative or not finite.
    """
    number(name, value)
    if not (0 <= value < math.inf):
        raise ValueError(f"{name} must be non-negative and finite, got {value!r}")


def share(name: str, value: Any, *, zero: bool = False, one: bool = True) -> None:
    """Refuse what is not in (0, 1], or in [0, 1] where `zero` is allowed, or in [0, 1) where `one` is not.

    Raises:
        TypeError: it is no number; with the name and the value.
        ValueError: it is outside; with the name and the value.
    """
    number(name, value)
    if not (0 <= value <= 1) or (value == 0 and not zero) or (value == 1 and not one):
        raise ValueError(f"{name} must be in {'[' if zero else '('}0, 1{']' if one else ')'}, got {value!r}")


def portion(share: float, n: int) -> int:
    """How many of n are a share of them, rounded up: at least 1 of them; 0.07 of 100 are 7, though 0.07 * 100 > 7."""
    return min(n, max(1, math.ceil(share * n - 1e-9)))


def whole(name: str, value: Any, least: int = 1) -> None:
    """Refuse what is not a whole number of at least `least`.

    Raises:
        TypeError: it is no int; with the name and the value.
        ValueError: it is less; with the name and the value.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value!r}")


def instance(name: str, value: Any, remedy: str, *also: type) -> None:
    """Refuse a class where an instance is needed, and what cannot be called.

    Raises:
        TypeError: with the name, the value and `remedy`, unless it is one of the types `also`.
    """
    if isinstance(value, type):
        raise TypeError(f"{name} is the class {value.__name__}, not an instance: write {value.__name__}(...)")
    if not (callable(value) or isinstance(value, also)):
        raise TypeError(f"{name} must be {remedy}, got {value!r}")


def check_losses(losses: Any, targets: Any) -> None:
    """Make sure that an objective returned a scalar, or one loss per example.

    Raises:
        TypeError: it returned no floating-point tensor.
        ValueError: its shape does not fit that of the targets.
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
    """What a value is, for a message."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
    return f"a tuple of {len(cast('tuple[Any, ...]', value))}" if isinstance(value, tuple) else type(value).__name__
