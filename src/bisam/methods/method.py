"""Method: the protocol of the algorithms, and the traits that a method or a perturbation may declare.

A method is any callable `(oracle, batch) -> Evaluation`. Class attributes declare its traits. A trait that is not
declared is False:

    stateful          it keeps state between steps, in `oracle.state`
    data_dependent    its number of forward passes depends on the data
    concurrent        the gradients of a step do not depend on each other: devices can compute them at once
    indexed           it needs the numbers of the examples, the keyword argument `indices` of a call
    counts_flips      it reports the flips of each step to a radius that follows them, `FlipRate`
    decouple          it returns a term for the optimizer, `Evaluation.decoupled`
    transparent       it wraps another method, its field `method`, and keeps no state of its own

A subclass inherits `counts_flips` only if it inherits `__call__` and `climb` too.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, Protocol, cast

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.oracle import Oracle
from bisam.schedules import FlipRate


class Method(Protocol):
    """A callable `(oracle, batch) -> Evaluation` that returns the loss to report and the gradient to descend."""

    def __call__(self, oracle: Oracle, batch: Batch, /) -> Evaluation:
        """Computes the answer of one training step."""
        ...


OLDER_NAMES: dict[str, str] = {}
"""Older names of traits that are still read; `bisam.deprecated` fills this dictionary."""


def stateful(value: Any) -> str | None:
    """Returns the name of the first stateful class in a nest of methods and perturbations, or None."""
    return _having("stateful", unwrapped(value))


def data_dependent(value: Any) -> str | None:
    """Returns the name of the first class in a nest whose number of forward passes depends on the data, or None."""
    return _having("data_dependent", unwrapped(value))


def indexed(value: Any) -> str | None:
    """Returns the name of the first class in a nest that needs the keyword argument `indices` of a call, or None."""
    return _having("indexed", unwrapped(value))


def decouples(value: Any) -> str | None:
    """Returns the name of the first class in a nest that returns a term which the optimizer applies, or None."""
    return _having("decouple", unwrapped(value))


def follows_flips(value: Any, *, uncounted: bool = False) -> bool:
    """Whether a nest of methods and perturbations has a radius that is a `FlipRate`.

    Args:
        value: the nest.
        uncounted: whether only those count to which no method around them reports the flips (the trait `counts_flips`).
    """
    value = unwrapped(value)
    if isinstance(value, FlipRate):
        return True
    if uncounted and _counts_flips(type(value)):
        return False
    return any(follows_flips(part, uncounted=uncounted) for part in _parts(value))


def _counts_flips(kind: type) -> bool:
    owners = (next((c for c in kind.__mro__ if name in vars(c)), object) for name in ("__call__", "climb"))
    return all("counts_flips" in vars(owner) for owner in owners)


def unwrapped(method: Any) -> Any:
    """Returns the method inside transparent wrappers."""
    while getattr(method, "transparent", False):
        method = method.method
    return method


def _having(trait: str, value: Any) -> str | None:
    if getattr(value, trait, False) or getattr(value, OLDER_NAMES.get(trait, trait), False):
        return type(value).__name__
    return next((found for part in _parts(value) if (found := _having(trait, part))), None)


def _parts(value: Any) -> list[Any]:
    """Returns the fields of a dataclass, and the elements of a list or tuple of parts such as those of `PerGroup`."""
    if isinstance(value, list | tuple):
        return [*cast("list[Any]", value)]
    return [getattr(value, f.name) for f in fields(value)] if is_dataclass(value) else []
