"""Expressions: a method as text, as one would write it in Python, and nothing else that Python can do.

KSAM(32, RSAM(0.01, EBiSAM(0.1)))
GSAM(L2(Follow(optimizer, high=0.4, low=0.1)))
XSAM(every=epoch)
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable
from functools import cache
from types import ModuleType
from typing import Any, cast

import torch
from torch import nn

import bisam
from bisam import SharpnessAware, masks, perturbations, schedules
from bisam.experiments.errors import unknown
from bisam.methods import Method

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_MODULES: tuple[ModuleType, ...] = (bisam, perturbations, masks, schedules)
_HIDDEN = {
    "Around",
    "Evaluation",
    "Lookahead",
    "LowerBound",
    "Method",
    "ModelOracle",
    "Oracle",
    "Query",
    "SharpnessAware",
    "Vector",
}

VOCABULARY: dict[str, Callable[..., Any]] = {
    name: value
    for module in _MODULES
    for name, value in vars(module).items()
    if getattr(value, "__module__", "").startswith("bisam.")
    and callable(value)
    and (name[0].isupper() or name in ("next_step", "cross_entropy"))
    and name not in _HIDDEN
} | {"lookahead": bisam.next_step}  # as recipes of version 0.1 spell it
"""What an expression may call: methods, perturbations, masks, schedules, bounds, `next_step`."""


def build(expression: str, **names: Any) -> Method:
    """The method that an expression describes.

    Args:
        expression: calls of the names in `VOCABULARY` with numbers, strings, None, sums and products, each other and
            `names`.
        **names: what it may speak of besides, such as the optimizer.

    Raises:
        ValueError: it is no such expression, or an argument has a value that the method refuses; with what and where.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"an expression has at most {_LONGEST} characters, got {len(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{expression!r} is no expression ({error}): write it as in SAM(L2(0.1))") from None
    try:
        method = _value(tree.body, names)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{expression}: {error}") from error
    if not callable(method):
        raise ValueError(f"{expression!r} is no method: write a call, such as SAM(L2(0.1))")
    return cast(Method, method)


@cache
def check(expression: str, batch_size: int) -> None:
    """Make sure that an expression describes a method, by one step on a toy, before there is a run.

    Args:
        expression: see `build`.
        batch_size: examples in a step.

    Raises:
        ValueError: see `build`; or the step fails, and why.
    """
    try:
        toy(expression, batch_size, 1)
    except Exception as error:  # whatever it is that stands in a method's place
        raise (
            error
            if isinstance(error, ValueError) and expression in str(error)
            else ValueError(f"{expression} is no method that can take a step: {error}")
        ) from error


def toy(
    expression: str,
    batch_size: int,
    steps: int,
    around: Callable[[Method], Method] = lambda method: method,
    run: int = 10**9,
) -> None:
    """Take steps with a method on a toy.

    Args:
        expression: see `build`.
        batch_size: examples in a step.
        steps: how many.
        around: what to put around the method, to watch it.
        run: steps that it is told the whole run has.

    Raises:
        ValueError: see `build`.
    """
    with torch.random.fork_rng([]):
        model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = build(expression, optimizer=optimizer, steps=run, epoch=10**6, examples=10**9)
        sharp = SharpnessAware(model, around(method), bisam.cross_entropy)
        for _ in range(steps):
            sharp(torch.randn(batch_size, 2), torch.zeros(batch_size, dtype=torch.long)).backward()


_LONGEST = 1000


def _value(node: ast.expr, names: dict[str, Any]) -> Any:
    match node:
        case ast.Constant(value=int() | float() | str() | None as value):  # a bool is an int
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return -_number(operand, names)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _ARITHMETIC:
            return _ARITHMETIC[type(op)](_number(left, names), _number(right, names))
        case ast.Name(id=name) if name in names:
            return names[name]
        case ast.Name(id="cross_entropy"):
            return bisam.cross_entropy
        case ast.Name(id=name):
            if name in VOCABULARY:
                raise ValueError(f"{name} is no value: write a call, such as {name}(...)")
            raise unknown("name", name, names)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
            if name not in VOCABULARY:
                raise unknown("name", name, VOCABULARY)
            given = [k.arg for k in keywords]
            if None in given or len(set(given)) < len(given):
                raise ValueError(f"{ast.unparse(node)!r} must name each argument once")
            arguments = {str(k.arg): _value(k.value, names) for k in keywords}
            return VOCABULARY[name](*(_value(a, names) for a in args), **arguments)
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is neither a number nor a call of a method")


def _number(node: ast.expr, names: dict[str, Any]) -> Any:
    value = _value(node, names)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{ast.unparse(node)!r} is no number")
    return value
