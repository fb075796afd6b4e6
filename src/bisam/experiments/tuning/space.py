"""Space: what a search varies, as the texts of `--search` and as values.

rho=0.01:1:log            a range on a logarithmic scale
momentum=0.5:0.95         a range on a linear scale
batch_size=16:128:16      the same, in steps
schedule=cosine,linear    choices

A name is a field of the recipe, or stands in braces in the expression of its method: "SAM(L2({radius}))".
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from math import isfinite, sqrt
from typing import Any

from bisam.experiments.errors import unknown
from bisam.experiments.recipes.changes import kinds, pairs, parsed
from bisam.experiments.recipes.fields import Fields
from bisam.experiments.recipes.recipe import Recipe

EXAMPLE = "rho=0.01:1:log"
DIGITS = 4
"""Significant digits of the numbers that are tried: more of them change no run that can be told from another."""
_PROBLEM = (
    *("dataset", "model", "weights", "noise", "validation_noise", "limit", "train_examples", "imbalance", "held_out"),
    *("measured", "measured_epochs", "precision", "version"),
)
"""Fields that decide what is learned or measured, and not how."""
_INSTEAD = {
    "seed": "--seeds-per-trial says how many seeds a trial has",
    "method": "give each method a search of its own, with as many trials, and compare their best recipes on new seeds",
    **dict.fromkeys(_PROBLEM, "it decides what is learned or measured: give it a value"),
}


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included.

    Attributes:
        low: smallest number.
        high: largest number.
        log: whether the scale is logarithmic.
        step: distance between two numbers, or None.
        whole: whether they are whole numbers.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high

    @property
    def ends(self) -> tuple[Any, ...]:
        """The smallest and the largest value."""
        return self.value(self.low), self.value(self.high)

    @property
    def middle(self) -> Any:
        """The value in the middle of the scale."""
        return self.value(sqrt(self.low * self.high) if self.log else (self.low + self.high) / 2)

    @property
    def grid(self) -> tuple[Any, ...] | None:
        """All values, or None if there is no step."""
        step = self.step or (1 if self.whole and not self.log else None)
        if step is None:
            return None
        count = int((self.high - self.low) / step + 1e-9) + 1
        return tuple(self.value(self.low + i * step) for i in range(count))

    def value(self, number: float) -> Any:
        """A number of the range as the value that is tried: a whole number, or rounded to `DIGITS`."""
        if self.whole:
            return round(number)
        return float(min(max(float(f"{number:.{DIGITS}g}"), self.low), self.high))

    def __str__(self) -> str:
        ends = f"{_number(self.low)}:{_number(self.high)}"
        return ends + (":log" if self.log else "" if self.step is None else f":{_number(self.step)}")


@dataclass(frozen=True)
class Choices:
    """Several values."""

    values: tuple[Any, ...]

    def __contains__(self, value: object) -> bool:
        return value in self.values

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    @property
    def middle(self) -> Any:
        """One of the values."""
        return self.values[len(self.values) // 2]

    @property
    def grid(self) -> tuple[Any, ...]:
        """All values."""
        return self.values

    @property
    def numeric(self) -> bool:
        """Whether all values are numbers."""
        return all(type(value) in (int, float) for value in self.values)

    def value(self, value: Any) -> Any:
        """A choice as it is."""
        return value

    def __str__(self) -> str:
        return ",".join(_number(v) if isinstance(v, float) else str(v).lower() for v in self.values)


Dimension = Range | Choices
Space = Mapping[str, Dimension]


def placeholders(method: str) -> tuple[str, ...]:
    """The names that stand in braces in an expression, each once.

    Raises:
        ValueError: braces do not contain a name.
    """
    try:
        parts = list(string.Formatter().parse(method))
    except ValueError as error:
        raise ValueError(f"--method {method!r}: {error}: a searched argument is written as in SAM(L2({{r}}))") from None
    found = [(name, spec, conversion) for _, name, spec, conversion in parts if name is not None]
    for name, spec, conversion in found:
        if not name.isidentifier() or spec or conversion:
            raise ValueError(f"--method {method!r}: braces contain a name that --search has, as in SAM(L2({{r}}))")
    return tuple(dict.fromkeys(name for name, *_ in found))


def filled(method: str, values: Mapping[str, Any]) -> str:
    """An expression with values in place of the names in braces."""
    return method.format(**{name: repr(values[name]) for name in placeholders(method)})


def parse(texts: Iterable[str], arguments: Iterable[str] = ()) -> dict[str, Dimension]:
    """The space that the values of `--search` describe.

    Args:
        texts: as in the examples above.
        arguments: the names in braces of the method's expression. Their numbers are whole if both ends are written so.

    Raises:
        ValueError: a text is no range and no choice, or its name is none that can be searched, or an argument has none.
    """
    arguments, space = tuple(arguments), dict[str, Dimension]()
    for name, text in pairs(texts, EXAMPLE, "--search").items():
        typed = f"--search {name}={text}"
        if name not in arguments:
            _check_field(name)
        space[name] = _dimension(name, text, typed, name in arguments)
    if missing := [name for name in arguments if name not in space]:
        raise ValueError(f"--method has {{{missing[0]}}}, and no --search: add --search {missing[0]}=0.01:1:log")
    return space


def default_space(recipe: Recipe, grid: bool) -> dict[str, Dimension]:
    """The space of a method: its radius around the default, or the weight decay if it has none.

    Args:
        recipe: with a method of the catalogue.
        grid: whether all values are tried, so that there must be few.

    Raises:
        ValueError: its method is an expression.
    """
    if "(" in recipe.method:
        raise ValueError(
            f"what is searched? --method {recipe.method} is an expression: write a name in braces for an argument, "
            'as in --method "SAM(L2({r}))" --search r=0.01:1:log, or search a field: --search learning_rate=0.01:1:log'
        )
    if "rho" in recipe.settings:
        from bisam.experiments.recipes.catalogue import METHODS

        rho = METHODS[recipe.method].rho
        assert rho is not None
        if grid:
            return {"rho": Choices(tuple(_rounded(rho * factor) for factor in (0.25, 0.5, 1, 2, 4)))}
        return {"rho": Range(_rounded(rho / 10), _rounded(rho * 20), log=True)}
    if grid:
        decays = (1e-4, 5e-4, 2e-3, 5e-3, 2e-2) if recipe.optimizer == "sgd" else (1e-3, 1e-2, 0.05, 0.1, 0.3)
        return {"weight_decay": Choices(decays)}
    return {"weight_decay": Range(5e-5, 5e-2, log=True) if recipe.optimizer == "sgd" else Range(1e-3, 1.0, log=True)}


def describe(space: Space) -> str:
    """A space in words."""
    return ", ".join(f"{name} {_words(dimension)}" for name, dimension in space.items())


def _words(dimension: Dimension) -> str:
    if isinstance(dimension, Choices):
        return f"in {', '.join(str(dimension).split(','))}"
    scale = " (log)" if dimension.log else "" if dimension.step is None else f" in steps of {_number(dimension.step)}"
    return f"{_number(dimension.low)} to {_number(dimension.high)}{scale}"


def _check_field(name: str) -> None:
    names = [field.name for field in fields(Fields)]
    if name not in names:
        known = [one for one in names if one not in _INSTEAD]
        raise unknown("setting to search", name, known, "bisam tune --help")
    if name in _INSTEAD:
        raise ValueError(f"--search {name} is refused: {_INSTEAD[name]}")


def _dimension(name: str, text: str, typed: str, argument: bool) -> Dimension:
    if ":" not in text:
        parts = [part.strip() for part in text.split(",")]
        values = tuple(_choice(name, part, typed, argument) for part in parts)
        if len(values) < 2 or len(set(values)) < len(values):
            raise ValueError(
                f"{typed} has {'one value' if len(values) < 2 else 'a value twice'}: write a range, as in "
                f"--search {name}=0.01:1:log, or choices, as in --search {name}=0.05,0.1,0.2"
            )
        return Choices(values)
    if not argument and not {int, float} & set(kinds(name)):
        raise ValueError(f"{typed} is a range, and {name} is no number: write its choices, as in {name}=a,b")
    low, high, *rest = (part.strip() for part in text.split(":"))
    written_whole = all(_is_whole(part) for part in (low, high))
    whole = written_whole if argument else int in kinds(name)
    if len(rest) > 1:
        raise ValueError(f"{typed} has too many parts: write it as in --search {EXAMPLE}")
    ends = tuple(_finite(part, typed, whole) for part in (low, high))
    log = rest == ["log"]
    step = _finite(rest[0], typed, whole) if rest and rest[0] not in ("log", "linear") else None
    if ends[0] >= ends[1]:
        raise ValueError(f"{typed} is empty: its first number must be below the second")
    if log and ends[0] <= 0:
        raise ValueError(f"{typed}: a logarithmic range begins above 0")
    if step is not None and not 0 < step <= ends[1] - ends[0]:
        raise ValueError(f"{typed}: the step must be above 0 and at most {_number(ends[1] - ends[0])}")
    if step is not None:
        ends = ends[0], float(f"{ends[0] + step * int((ends[1] - ends[0]) / step + 1e-9):.12g}")
    return Range(*ends, log=log, step=step, whole=whole)


def _choice(name: str, text: str, typed: str, argument: bool) -> Any:
    if not text:
        raise ValueError(f"{typed} has an empty value: write it as in --search {EXAMPLE}")
    if argument:
        return int(text) if _is_whole(text) else _finite(text, typed, whole=False)
    value = parsed(name, text, typed)
    if isinstance(value, float) and not isfinite(value):
        raise ValueError(f"{typed}: {text!r} is not a finite number")
    return value


def _is_whole(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True


def _finite(text: str, typed: str, whole: bool) -> float:
    try:
        number = int(text) if whole else float(text)
    except ValueError:
        what = "a whole number" if whole else "a number"
        raise ValueError(f"{typed}: {text!r} is not {what}: write it as in --search {EXAMPLE}") from None
    if not isfinite(number):
        raise ValueError(f"{typed}: {text!r} is not a finite number")
    return number


def _rounded(number: float) -> float:
    return float(f"{number:.3g}")


def _number(number: float) -> str:
    return f"{number:.12g}"
