"""Expressions: a method as text, as one would write it in Python, and nothing else that Python can do.

KSAM(32, RSAM(0.01, EBiSAM(0.1)))
GSAM(L2(Follow(optimizer, high=0.4, low=0.1)))
XSAM(every=epoch)
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import torch

import bisam
from bisam import masks, perturbations, schedules
from bisam.experiments.names import unknown
from bisam.methods import Method

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_MODULES: tuple[ModuleType, ...] = (bisam, perturbations, masks, schedules)
_HIDDEN = {"Around", "Evaluation", "Lookahead", "LowerBound", "ModelOracle", "Oracle", "SharpnessAware", "Vector"}

VOCABULARY: dict[str, Callable[..., Any]] = {
    name: value
    for module in _MODULES
    for name, value in vars(module).items()
    if getattr(value, "__module__", "").startswith("bisam.")
    and callable(value)
    and (name[0].isupper() or name in ("lookahead", "cross_entropy"))
    and name not in _HIDDEN
}
"""What an expression may call: methods, perturbations, masks, schedules, bounds, `lookahead`."""


def build(expression: str, **names: Any) -> Method:
    """The method that an expression describes.

    Args:
        expression: calls of the names in `VOCABULARY` with numbers, strings, None, sums and products, each other and
            `names`.
        **names: what it may speak of besides, such as the optimizer.

    Raises:
        ValueError: it is no such expression, or an argument has a value that the method refuses; with what and where.
    """
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except SyntaxError as error:
        raise ValueError(
            f"{expression!r} is no expression ({error.msg}): write it as in Python, SAM(L2(0.1))"
        ) from None
    try:
        method = _value(tree.body, names)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{expression}: {error}") from error
    if not callable(method) or isinstance(method, type):
        raise ValueError(f"{expression!r} is no method: write a call, such as SAM(L2(0.1))")
    return cast(Method, method)


def check(expression: str) -> None:
    """Make sure that an expression describes a method, before there is a run that it could speak of.

    Raises:
        ValueError: see `build`.
    """
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    build(expression, optimizer=optimizer, steps=1000, epoch=100, examples=1000)


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() | None as value):  # a bool is an int
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_value(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_value(left, names), _value(right, names))
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id=name) if name == "cross_entropy":
            return VOCABULARY[name]
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            if name not in VOCABULARY:
                raise unknown("name", name, VOCABULARY)
            arguments = {k.arg: _value(k.value, names) for k in keywords if k.arg is not None}
            return VOCABULARY[name](*(_value(a, names) for a in args), **arguments)
        case ast.Name(id=name):
            raise unknown("name", name, names) if names else ValueError(f"{name!r} is not known here")
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is neither a number nor a call of a method")
