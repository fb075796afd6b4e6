"""Base optimizers: the optimizer of a recipe as text, of torch or of another package, with arguments of its own.

adamw
RMSprop(alpha=0.95)
timm:muon
schedulefree:AdamWScheduleFree(warmup_steps=100)

A name alone is a class of torch.optim. Learning rate, weight decay and momentum are fields of the recipe, and passed
where an optimizer takes them.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from bisam.experiments.errors import is_out_of_memory, reason, unknown

SGD = "sgd"
"""The default, SGD of torch; its text is older than the others, which have the names of their classes."""
ADAMW = "adamw"
PACKAGES = ("timm", "schedulefree")
"""Packages besides torch whose optimizers have names: `timm:lion`, `schedulefree:SGDScheduleFree`."""

_OLD = {"SGD": SGD, "AdamW": ADAMW}
_NEW = {old: new for new, old in _OLD.items()}
_FIELDS = {"lr": "learning_rate", "weight_decay": "weight_decay", "momentum": "momentum"}
_LONGEST = 500


@dataclass(frozen=True)
class BaseOptimizer:
    """A base optimizer by name.

    Attributes:
        package: "torch", or one of `PACKAGES`.
        name: of a class, or of timm's registry.
        arguments: of its own, by name.
    """

    package: str
    name: str
    arguments: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        name = _OLD.get(self.name, self.name) if self.package == "torch" else f"{self.package}:{self.name}"
        return f"{name}({', '.join(f'{key}={value!r}' for key, value in self.arguments)})" if self.arguments else name

    def takes(self, argument: str) -> bool:
        """Whether it has an argument, such as momentum.

        Raises:
            ValueError: the package is missing, or has no such optimizer.
        """
        if self.package == "timm" and argument == "momentum":
            return bool(_timm(self.name).get_optimizer_info(self.name).has_momentum)
        return argument in signature(self._kind()).parameters

    @property
    def averages(self) -> bool:
        """Whether it evaluates other weights than those at which it takes gradients, and changes no learning rate."""
        return self.package == "schedulefree"

    def build(self, weights: Iterable[Tensor], lr: float, weight_decay: float, momentum: float) -> Optimizer:
        """Return the optimizer of some weights.

        Args:
            weights: parameters.
            lr: learning rate.
            weight_decay: on all parameters; without effect if the optimizer has none.
            momentum: the same.

        Raises:
            ValueError: the package is missing or has no such optimizer, or the optimizer refuses an argument, or the
                shape of a parameter.
        """
        own = dict(self.arguments)
        if self.package == "timm":
            create: Callable[..., Optimizer] = _timm(self.name).create_optimizer_v2
            given = {"opt": self.name, "weight_decay": weight_decay, "momentum": momentum, "filter_bias_and_bn": False}
        else:
            create = self._kind()
            shared = {"weight_decay": weight_decay, "momentum": momentum}
            given = {name: value for name, value in shared.items() if self.takes(name)}
        try:
            return create(list(weights), lr=lr, **given, **own)
        except Exception as error:  # each optimizer raises another type of error
            if is_out_of_memory(error):
                raise
            muon = "; timm:muon trains all other parameters with AdamW" if str(self).startswith("Muon") else ""
            raise ValueError(f"optimizer {str(self)!r}: {reason(error)}{muon}") from error

    def _kind(self) -> Any:
        """Its class.

        Raises:
            ValueError: there is none.
        """
        if self.package == "timm":
            return _timm(self.name).get_optimizer_class(self.name, bind_defaults=False)
        if self.package == "torch":
            return _of_torch()[_NEW.get(self.name, self.name)]
        known = _of_package(_package(self.package))
        if self.name not in known:
            raise unknown("optimizer", f"{self.package}:{self.name}", [f"{self.package}:{name}" for name in known])
        return known[self.name]


@cache
def parsed(text: str) -> BaseOptimizer:
    """Return the optimizer that a text names; of another package it may not exist, which `BaseOptimizer.build` checks.

    Upper and lower case are the same in names of torch's optimizers.

    Raises:
        ValueError: the text has another form, names no optimizer of torch, or sets what a field of the recipe sets.
    """
    package, colon, rest = text.partition(":")
    if not colon or "(" in package:
        package, rest = "torch", text
    elif package not in PACKAGES:
        raise ValueError(
            f"optimizer {text!r}: a name alone is one of torch.optim, and other packages are {', '.join(PACKAGES)}"
        )
    name, arguments = _called(rest, text)
    if package == "torch":
        known = {one.lower(): one for one in _of_torch()}
        if name.lower() not in known:
            raise unknown("optimizer", name, [SGD, ADAMW, *(one for one in _of_torch() if one not in _OLD)])
        name = known[name.lower()]
    return BaseOptimizer(package, name, arguments)


def _called(rest: str, text: str) -> tuple[str, tuple[tuple[str, Any], ...]]:
    """The name and the arguments of a call, whose values are literals."""
    wanted = f"optimizer {text!r} is no name with arguments, such as NAdam(betas=(0.9, 0.99))"
    if len(text) > _LONGEST:
        raise ValueError(f"an optimizer must have at most {_LONGEST} characters, got {len(text)}")
    try:
        tree = ast.parse(rest.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError(wanted) from None
    if isinstance(tree, ast.Name):
        return tree.id, ()
    if not isinstance(tree, ast.Call) or not isinstance(tree.func, ast.Name) or tree.args:
        raise ValueError(wanted)
    arguments: dict[str, Any] = {}
    for one in tree.keywords:
        if one.arg is None or one.arg in arguments:
            raise ValueError(wanted)
        if (field := _FIELDS.get(one.arg)) is not None:
            raise ValueError(f"optimizer {text!r}: {one.arg} is the field {field} of the recipe, leave it out here")
        try:
            arguments[one.arg] = ast.literal_eval(one.value)
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"optimizer {text!r}: {one.arg} must be a number or another literal of Python") from None
    return tree.func.id, tuple(sorted(arguments.items()))


def _of_torch() -> dict[str, Any]:
    """The optimizers of torch that take a step from a dense gradient, without a closure."""
    return {name: kind for name, kind in _of_package(torch.optim).items() if name not in ("LBFGS", "SparseAdam")}


def _of_package(module: Any) -> dict[str, Any]:
    kinds = {name: getattr(module, name) for name in dir(module)}
    return {
        name: kind
        for name, kind in kinds.items()
        if isinstance(kind, type)
        and issubclass(kind, Optimizer)
        and kind is not Optimizer
        and "Closure" not in name  # their step needs one
        and "Wrapper" not in name  # they take an optimizer
    }


def _timm(name: str) -> Any:
    """timm.optim, which has the optimizer."""
    module = _package("timm", "timm.optim")
    known = module.list_optimizers()
    if name not in known:
        raise unknown("optimizer", f"timm:{name}", [f"timm:{one}" for one in known], "timm.optim.list_optimizers()")
    if module.get_optimizer_info(name).second_order:
        raise ValueError(f"optimizer 'timm:{name}' needs second derivatives, which a method does not compute")
    return module


def _package(package: str, module: str | None = None) -> Any:
    try:
        return import_module(module or package)
    except ImportError as error:
        raise ValueError(f"an optimizer {package}:NAME needs {package}: pip install {package}") from error
