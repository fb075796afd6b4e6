"""Flags of `bisam train` that are fields of a recipe, derived from `Recipe`: names, types, defaults and help.

The parser passes only the flags that were given, so that others can come from a preset:

    flags = RecipeFlags(method="sam", rho=0.1)
    flags.given          # {"method": "sam", "rho": 0.1}
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any, cast, get_type_hints

from cyclopts import Parameter, Token

from bisam.experiments.recipes.recipe import Recipe


def whole(type_: Any, tokens: Sequence[Token]) -> int:
    """The value of a flag as a whole number; the parser alone would round 1.5 to 2.

    Raises:
        ValueError: the value is not a whole number.
    """
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not a whole number") from None


Whole = Annotated[int, Parameter(converter=whole)]

ALIASES = {"method": ("--optim", "--opt"), "learning_rate": ("--lr",)}
"""Other spellings of flags: the BiSAM authors' (their parser also takes the beginning of a flag) and a common one."""
NO_FLAG = {"version"}
"""Fields of a recipe that no flag sets."""


class RecipeFlags:
    """The fields of a recipe that were given as flags, with their values."""

    def __init__(self, **given: Any) -> None:
        self.given = given


def field_docs(owner: type) -> dict[str, str]:
    """The docstrings below the fields of a class."""
    (body,) = (node.body for node in ast.parse(dedent(inspect.getsource(owner))).body if isinstance(node, ast.ClassDef))
    docs: dict[str, str] = {}
    for node, following in pairwise(body):
        match node, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str() as text)):
                docs[name] = inspect.cleandoc(text)
            case _:
                pass
    return docs


def _signature() -> inspect.Signature:
    hints, docs = get_type_hints(Recipe), field_docs(Recipe)
    converted: dict[Any, Any] = {int: Whole, int | None: cast(Any, Whole) | None}
    flags = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=one.default,
            annotation=Annotated[
                converted.get(hints[one.name], hints[one.name]),
                Parameter(alias=ALIASES.get(one.name), help=docs.get(one.name)),
            ],
        )
        for one in fields(Recipe)
        if one.name not in NO_FLAG
    ]
    return inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *flags])


# The parser reads the flags from the signature, and passes those that were given.
cast(Any, RecipeFlags.__init__).__signature__ = _signature()
