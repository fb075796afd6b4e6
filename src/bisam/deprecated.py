"""Deprecated: the names of bisam 0.1. They warn, and bisam 0.3 removes them.

This file contains all code for them. To remove them, delete this file, its two imports (in `bisam` and in
`bisam.integrations.transformers.trainer`), `OLDER_NAMES` of `bisam.methods.method`, and `tests/test_deprecated.py`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ParamSpec, TypeVar, cast

from bisam.evaluation import Evaluation
from bisam.loss import SharpnessAware
from bisam.methods import method
from bisam.model.oracle import ModelOracle
from bisam.optim import Lookahead, next_step
from bisam.oracle import Oracle, Query
from bisam.vector import Vector

P = ParamSpec("P")
R = TypeVar("R")

MODULES = {
    "bisam.arguments": "bisam.validation",
    "bisam.buffers": "bisam.model.module_state",
    "bisam.hosts": "bisam.model.compatibility",
    "bisam.integrations.parallel": "bisam.integrations.pairs",
    "bisam.integrations.trainer_loss": "bisam.integrations.transformers.loss",
    "bisam.memory": "bisam.state",
    "bisam.methods.bayes": "bisam.methods.bayesian",
    "bisam.methods.combining": "bisam.methods.combined",
    "bisam.methods.saving": "bisam.methods.efficient",
    "bisam.model_oracle": "bisam.model.oracle",
    "bisam.noise": "bisam.model.rng",
    "bisam.optimizers": "bisam.optim",
}
"""Modules that were moved, by their old names."""


def install() -> None:
    """Makes the old names work; called once, when bisam is imported."""
    SharpnessAware.__init__ = renamed(scale="scaler", perturbation="scope")(SharpnessAware.__init__)
    ModelOracle.__init__ = renamed(scale="scaler", perturbation="scope")(ModelOracle.__init__)
    Lookahead.__init__ = renamed(lam="alpha")(Lookahead.__init__)
    cast(Any, Lookahead).__setstate__ = _with_alpha(Lookahead.__setstate__)
    for owner, old, new in (
        (Lookahead, "lam", "alpha"),
        (Oracle, "alone", "is_local"),
        (Oracle, "still", "without_tracking"),
        (Vector, "agreed", "from_first_rank"),
        (Vector, "drawn", "random"),
    ):
        setattr(owner, old, _Alias(owner, old, new))
    cast(Any, Oracle).together = _together
    method.OLDER_NAMES.update(stateful="remembers", data_dependent="decides")
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())


def renamed(**new_names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that accepts keyword arguments by their old names, with a warning.

    Args:
        **new_names: the new name of each old name.
    """

    def around(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in new_names.keys() & kwargs.keys():
                new, owner = new_names[old], function.__qualname__.removesuffix(".__init__")
                if new in kwargs:
                    raise TypeError(f"{owner} got {old}= and {new}=, which are the same argument: leave out {old}=")
                _warn(f"{owner}({old}=)", f"{owner}({new}=)", level=3)
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return around


def attribute(name: str) -> Any:
    """Returns a public object of `bisam` by its old name.

    Raises:
        AttributeError: there was no such name.
    """
    if name == "lookahead":
        _warn("bisam.lookahead", "bisam.next_step", level=4)
        return next_step
    raise AttributeError(f"module 'bisam' has no attribute {name!r}")


class _Alias:
    """An attribute under its old name."""

    def __init__(self, owner: type, old: str, new: str) -> None:
        self._owner, self._old, self._new = owner.__name__, old, new

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        _warn(f"{self._owner}.{self._old}", f"{self._owner}.{self._new}", level=3)
        return getattr(instance, self._new)


def _together(oracle: Oracle, *queries: Mapping[str, Any]) -> list[Evaluation]:
    """Answers queries that are given as keyword arguments; now `Oracle.ask`."""
    _warn("Oracle.together({...}, ...)", "Oracle.ask([Query(...), ...])", level=3)
    return oracle.ask([Query(**query) for query in queries])


def _with_alpha(setstate: Callable[[Lookahead, dict[str, Any]], None]) -> Callable[[Lookahead, dict[str, Any]], None]:
    @wraps(setstate)
    def restore(self: Lookahead, state: dict[str, Any]) -> None:
        # No warning: loading a file of 0.1 is supported.
        setstate(self, {"alpha" if name == "lam" else name: value for name, value in state.items()})

    return restore


class _Finder(MetaPathFinder):
    """Finds modules by their old names."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        return ModuleSpec(fullname, _Moved(MODULES[fullname])) if fullname in MODULES else None


class _Moved(Loader):
    """Loads a module of an old name, whose attributes are those of the module that replaces it."""

    def __init__(self, new: str) -> None:
        self._new = new

    def exec_module(self, module: ModuleType) -> None:
        there = importlib.import_module(self._new)
        _warn(module.__name__, self._new, level=2)
        cast(Any, module).__getattr__ = lambda name: getattr(there, name)  # pyright: ignore


def _warn(old: str, new: str, level: int) -> None:
    text = f"{old} is now {new}; the old name will be gone in bisam 0.3"
    warnings.warn(text, DeprecationWarning, stacklevel=level)
