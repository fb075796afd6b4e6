"""Deprecated: the names of bisam 0.1. They warn, and bisam 0.3 removes them.

This file contains all code for them, and imports nothing of bisam before an old name is used: `import bisam` must not
import torch. To remove them, delete this file, its two imports (in `bisam` and in
`bisam.integrations.transformers.trainer`), `OLDER_NAMES` of `bisam.methods.method`, and `tests/test_deprecated.py`.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from bisam.evaluation import Evaluation
    from bisam.optim import Lookahead
    from bisam.oracle import Oracle

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
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


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
        from bisam.optim import next_step

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
    from bisam.oracle import Query

    _warn("Oracle.together({...}, ...)", "Oracle.ask([Query(...), ...])", level=3)
    return oracle.ask([Query(**query) for query in queries])


def _with_alpha(setstate: Callable[[Lookahead, dict[str, Any]], None]) -> Callable[[Lookahead, dict[str, Any]], None]:
    @wraps(setstate)
    def restore(self: Lookahead, state: dict[str, Any]) -> None:
        # No warning: loading a file of 0.1 is supported.
        setstate(self, {"alpha" if name == "lam" else name: value for name, value in state.items()})

    return restore


def _loss(module: Any) -> None:
    module.SharpnessAware.__init__ = renamed(scale="scaler", perturbation="scope")(module.SharpnessAware.__init__)


def _model_oracle(module: Any) -> None:
    module.ModelOracle.__init__ = renamed(scale="scaler", perturbation="scope")(module.ModelOracle.__init__)


def _lookahead(module: Any) -> None:
    owner = module.Lookahead
    owner.__init__ = renamed(lam="alpha")(owner.__init__)
    owner.__setstate__ = _with_alpha(owner.__setstate__)
    owner.lam = _Alias(owner, "lam", "alpha")


def _oracle(module: Any) -> None:
    owner = module.Oracle
    owner.alone = _Alias(owner, "alone", "is_local")
    owner.still = _Alias(owner, "still", "without_tracking")
    owner.together = _together


def _vector(module: Any) -> None:
    owner = module.Vector
    owner.agreed = _Alias(owner, "agreed", "from_first_rank")
    owner.drawn = _Alias(owner, "drawn", "random")


def _method(module: Any) -> None:
    module.OLDER_NAMES.update(stateful="remembers", data_dependent="decides")


_CHANGED: dict[str, Callable[[Any], None]] = {
    "bisam.loss": _loss,
    "bisam.methods.method": _method,
    "bisam.model.oracle": _model_oracle,
    "bisam.optim.lookahead": _lookahead,
    "bisam.oracle": _oracle,
    "bisam.vector": _vector,
}
"""The change to each module, applied after it is loaded."""


class _Finder(MetaPathFinder):
    """Finds modules by their old names, and adds old names to the modules that have them."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        if fullname in MODULES:
            return ModuleSpec(fullname, _Moved(MODULES[fullname]))
        if fullname not in _CHANGED or (spec := PathFinder.find_spec(fullname, path, target)) is None:
            return None
        loader = cast(Any, spec.loader)
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            _CHANGED[fullname](module)

        loader.exec_module = exec_module
        return spec


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
