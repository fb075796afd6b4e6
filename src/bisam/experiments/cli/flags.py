"""Flags of `bisam train`: those that are fields of a recipe, and those of the BiSAM authors.

Names, types, defaults and help of the former are derived from `recipes.fields`, which needs no torch.

The parser passes only the flags that were given, so that others can come from a preset:

    flags = RecipeFlags(method="sam", rho=0.1)
    flags.given          # {"method": "sam", "rho": 0.1}
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from textwrap import dedent
from typing import Annotated, Any, cast, get_type_hints

from cyclopts import Parameter, Token

from bisam.experiments.cli import completion
from bisam.experiments.cli.groups import OF_FIELD
from bisam.experiments.recipes.fields import Fields


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

ALIASES = {"method": ("--optim", "--opt"), "learning_rate": ("--lr",), "optimizer": ("--base-optimizer",)}
"""Other spellings of flags: the BiSAM authors' (their parser also takes the beginning of a flag) and common ones."""
NO_FLAG = {"version"}
"""Fields of a recipe that no flag sets."""


_COMPLETED = {"dataset": completion.datasets, "model": completion.models, "method": completion.methods}


class RecipeFlags:
    """The fields of a recipe that were given as flags, with their values."""

    def __init__(self, **given: Any) -> None:
        self.given = given


@dataclass(frozen=True)
class AuthorsFlags:
    """Flags of the authors' script. Those that `bisam train` has under the same name are fields of `Recipe`."""

    adaptive: str | None = None
    """True: their Adaptive SAM, which is --method asam, abisam_log or abisam_tanh here (their radius is 0.05)."""
    adam: Annotated[bool, Parameter(negative="")] = False
    """AdamW: --optimizer adamw here."""
    valid: Annotated[bool, Parameter(negative="")] = False
    """No effect, as in their script: a tenth of the training images is always held out for validation."""
    threads: Whole | None = None
    """Processes that load data: --loaders here; CIFAR is in memory and needs none."""
    dropout: float | None = None
    """Dropout of their WideResNets: 0, because the networks here have none."""
    depth: Whole | None = None
    """Their script does not read it: --model names the network."""
    width_factor: Whole | None = None
    """Their script does not read it: --model names the network."""


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
    hints, docs = get_type_hints(Fields), field_docs(Fields)
    converted: dict[Any, Any] = {int: Whole, int | None: cast(Any, Whole) | None}
    flags = [
        inspect.Parameter(
            one.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=one.default,
            annotation=Annotated[
                converted.get(hints[one.name], hints[one.name]),
                Parameter(
                    alias=ALIASES.get(one.name),
                    help=docs.get(one.name),
                    group=OF_FIELD[one.name],
                    completer=_COMPLETED.get(one.name),
                ),
            ],
        )
        for one in fields(Fields)
        if one.name not in NO_FLAG
    ]
    return inspect.Signature([inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD), *flags])


# The parser reads the flags from the signature, and passes those that were given.
cast(Any, RecipeFlags.__init__).__signature__ = _signature()
