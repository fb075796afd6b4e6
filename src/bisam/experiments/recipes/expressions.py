"""Expressions: a method as text, in the syntax of Python calls and arithmetic, and nothing else of Python.

KSAM(32, RSAM(0.01, EBiSAM(0.1)))
GSAM(L2(Follow(optimizer, high=0.4, low=0.1)))
XSAM(every=epoch)
"""

from __future__ import annotations

import ast
import inspect
import operator
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import MappingProxyType, ModuleType
from typing import Any, cast

import torch
from torch import nn

import bisam
from bisam import SharpnessAware, masks, objectives, perturbations, proximal, schedules
from bisam.experiments.errors import is_out_of_memory, unknown
from bisam.methods import Method
from bisam.methods.longtail import Tail
from bisam.methods.method import indexed
from bisam.objectives import LowerBound

_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
}
_MODULES: tuple[ModuleType, ...] = (bisam, objectives, perturbations, masks, schedules, proximal)
_HIDDEN = {
    "Around",
    "CrossEntropy",
    "Decoupled",
    "Evaluation",
    "Lookahead",
    "LowerBound",
    "Method",
    "ModelOracle",
    "Only",  # takes a function, which an expression cannot contain
    "Named",
    "OfClasses",
    "Oracle",
    "Prox",
    "ProximalPoint",
    "Query",
    "SWAD",
    "Separable",
    "SharpnessAware",
    "Vector",
}

VOCABULARY: dict[str, Callable[..., Any]] = {
    name: value
    for module in _MODULES
    for name, value in ((name, getattr(module, name)) for name in dir(module))  # bisam loads a name when asked for it
    if getattr(value, "__module__", "").startswith("bisam.")
    and callable(value)
    and (name[0].isupper() or name in ("next_step", "cross_entropy"))
    and name not in _HIDDEN
} | {"lookahead": bisam.next_step}  # the spelling of bisam 0.1, for its run folders
"""Callables of expressions: methods, perturbations, masks, schedules, proximal operators, objectives, `next_step`."""


def build(expression: str, **names: Any) -> Method:
    """The method that an expression describes.

    Args:
        expression: calls of the names in `VOCABULARY`. Their arguments are numbers, strings, None, arithmetic, other
            calls, and `names`.
        **names: values that the expression may use besides, such as the optimizer.

    Raises:
        ValueError: the expression has another form, or an argument has a value that its method refuses; the message
            names it.
    """
    if len(expression) > _LONGEST:
        raise ValueError(f"an expression has at most {_LONGEST} characters, got {len(expression)}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError) as error:
        # Without the place that a SyntaxError adds, "(<unknown>, line 1)".
        said = error.msg if isinstance(error, SyntaxError) else error
        raise ValueError(f"{expression!r} is no expression ({said}): write it as in SAM(L2(0.1))") from None
    except (RecursionError, MemoryError):  # the parser's errors for a deep nest
        raise _too_deep(expression) from None
    _check_depth(expression, tree.body)
    try:
        method = _value(tree.body, names)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(f"{expression}: {error}") from error
    if not callable(method):
        raise ValueError(f"{expression!r} is no method: write a call, such as SAM(L2(0.1))")
    return cast(Method, method)


@cache
def check(expression: str) -> None:
    """Check syntax, names and arguments of an expression; no gradient is computed.

    Raises:
        ValueError: see `build`.
    """
    _built(expression)


@cache
def contained(expression: str) -> Mapping[str, float]:
    """The values of rho, mu, alpha and eta that an expression contains; no gradient is computed.

    mu and alpha are those of BiSAM's bound. In place of the radius stands the rate that a `FlipRate` follows. A setting
    with several values, or with a schedule in place of a number, is left out.

    Raises:
        ValueError: see `build`.
    """
    found: dict[str, set[float]] = defaultdict(set)
    for part in _parts(_built(expression)):
        names = {"rho"} | ({"eta"} if isinstance(part, perturbations.Adaptive) else set())
        names |= {"mu", "alpha"} if isinstance(part, LowerBound) else set()
        for name in names:
            value = getattr(part, name, None)
            if isinstance(value, schedules.FlipRate):
                value = value.target
            if isinstance(value, int | float):
                found[name].add(float(value))
    return MappingProxyType({name: values.pop() for name, values in found.items() if len(values) == 1})


@cache
def is_concurrent(expression: str) -> bool:
    """Whether the gradients of a step of a method do not depend on each other (its trait `concurrent`).

    Raises:
        ValueError: see `build`.
    """
    return getattr(_built(expression), "concurrent", False)


def _parts(value: Any) -> Iterator[Any]:
    """The methods, perturbations and objectives of a nest, from the outside to the inside."""
    if is_dataclass(value) and not isinstance(value, type):
        yield value
        for field in fields(value):
            yield from _parts(getattr(value, field.name))


def _built(expression: str) -> Method:
    return build(expression, optimizer=_Unused(), **_run(_UNKNOWN_STEPS))


class _Unused(torch.optim.SGD):
    """Stands for the optimizer of a run where no step is taken: torch's first optimizer takes seconds to make.

    Its constructor imports torch's compiler.
    """

    def __init__(self) -> None:
        self.param_groups = [{"params": [], "lr": 0.1}]


@cache
def names_called(expression: str) -> frozenset[str]:
    """The names that a valid expression calls."""
    tree = ast.parse(expression.strip(), mode="eval")
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return frozenset(name.id for name in calls if isinstance(name, ast.Name))


@cache
def check_step(expression: str, batch_size: int, mixed: bool = False) -> None:
    """Check that the method of an expression can take a step, by one step on a small model.

    Args:
        expression: see `build`.
        batch_size: examples in a step.
        mixed: whether the labels are class probabilities, those of mixtures.

    Raises:
        ValueError: see `build`; or the step fails, and the message gives the reason.
    """
    try:
        take_steps(expression, batch_size, 1, mixed=mixed)
    except Exception as error:  # an expression can put any callable in the place of a method
        if is_out_of_memory(error):
            raise
        raise (
            error
            if isinstance(error, ValueError) and expression in str(error)
            else ValueError(f"{expression} is no method that can take a step{' on mixtures' if mixed else ''}: {error}")
        ) from error


@cache
def least_classes(expression: str) -> int:
    """The number of classes that the method of an expression needs: 2, or more for a top-k error or for a tail.

    Raises:
        ValueError: see `build`.
    """
    parts = list(_parts(_built(expression)))
    top = [part.k + 1 for part in parts if isinstance(part, objectives.TopK)]
    tail = [label + 1 for part in parts if isinstance(part, Tail) for label in cast("tuple[int, ...]", part.classes)]
    return max([2, *top, *tail])


_MOST_CLASSES = 10_000  # of the small model
_UNKNOWN_STEPS = 10**9  # stands for the steps of a run before they are known


def take_steps(
    expression: str,
    batch_size: int,
    steps: int,
    wrap: Callable[[Method], Method] = lambda method: method,
    total: int = _UNKNOWN_STEPS,
    mixed: bool = False,
) -> None:
    """Take steps with a method on a small model.

    Args:
        expression: see `build`.
        batch_size: examples in a step.
        steps: number of steps.
        wrap: puts a wrapper around the method, for example one that counts its queries.
        total: steps of the whole run, for methods that depend on it.
        mixed: whether the labels are class probabilities.

    Raises:
        ValueError: see `build`.
    """
    classes = min(least_classes(expression), _MOST_CLASSES)
    with torch.random.fork_rng([]):
        model = nn.Sequential(nn.Linear(2, classes), nn.LayerNorm(classes))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        method = build(expression, optimizer=optimizer, **_run(total))
        sharp = SharpnessAware(model, wrap(method), bisam.cross_entropy)
        labels = torch.zeros(batch_size, dtype=torch.long)
        if mixed:
            labels = torch.full((batch_size, classes), 1 / classes)
        for _ in range(steps):
            named = {"indices": torch.arange(batch_size)} if indexed(method) else {}
            sharp(torch.randn(batch_size, 2), labels, **named).backward()


def _run(steps: int) -> dict[str, int]:
    return {"steps": steps, "epoch": 10**6, "examples": 10**6}  # SAF keeps outputs of each


_LONGEST = 1000
_DEEPEST = 100  # levels of the syntax tree: a method calls the one inside it, and Python limits the depth of calls


def _too_deep(expression: str) -> ValueError:
    return ValueError(f"{expression[:40]}... has more than {_DEEPEST} levels of calls and operations: nest fewer")


def _check_depth(expression: str, node: ast.expr) -> None:
    level: list[ast.AST] = [node]
    for _ in range(_DEEPEST):
        level = [child for one in level for child in ast.iter_child_nodes(one)]
        if not level:
            return
    raise _too_deep(expression)


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
                raise unknown("name", name, VOCABULARY, "bisam methods")
            given = [k.arg for k in keywords]
            if None in given or len(set(given)) < len(given):
                raise ValueError(f"{ast.unparse(node)!r} must name each argument once")
            arguments = {str(k.arg): _value(k.value, names) for k in keywords}
            _check_names(name, arguments)
            return VOCABULARY[name](*(_value(a, names) for a in args), **arguments)
        case _:
            raise ValueError(f"{ast.unparse(node)!r} is neither a number nor a call of a method")


def _check_names(called: str, given: Collection[str]) -> None:
    if not given:
        return
    taken = list(inspect.signature(VOCABULARY[called]).parameters)
    for name in given:
        if name not in taken:
            of_radius = name == "rho" and "perturb" in taken
            remedy = f"; the radius is its perturb, as in {called}(perturb=0.1)" if of_radius else ""
            raise ValueError(f"{called} has no argument {name!r}: it takes {', '.join(taken) or 'none'}{remedy}")


def _number(node: ast.expr, names: dict[str, Any]) -> Any:
    value = _value(node, names)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{ast.unparse(node)!r} is no number")
    return value
