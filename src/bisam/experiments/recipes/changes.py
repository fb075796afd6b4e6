"""Changes: values of fields of a recipe as text, as those of `--set`."""

from __future__ import annotations

from collections.abc import Iterable
from types import NoneType
from typing import Any, get_args, get_type_hints

from bisam.experiments.recipes.fields import Fields


def pairs(changes: Iterable[str], example: str, flag: str = "--set") -> dict[str, str]:
    """Names and values of changes "name=value"; hyphens in names become underscores.

    Args:
        changes: the values of the flag.
        example: a valid change, for the message of the error.
        flag: for the same message.

    Raises:
        ValueError: a change has no value, or a name has two.
    """
    found: dict[str, str] = {}
    for change in changes:
        name, equals, value = change.partition("=")
        if not equals:
            raise ValueError(f"{flag} {change!r} has no value: write it as in {flag} {example}")
        name, value = name.strip().replace("-", "_"), value.strip()
        if name in found:
            raise ValueError(f"{flag} {name} is given twice, as {found[name]} and {value}: leave one out")
        found[name] = value
    return found


def kinds(name: str) -> tuple[type, ...]:
    """The types of a field of a recipe."""
    hint = get_type_hints(Fields)[name]
    return get_args(hint) or (hint,)


def parsed(name: str, text: str, where: str) -> Any:
    """The value of a field of a recipe in a text; "none" is None where the field can be.

    Args:
        name: of the field.
        text: the value.
        where: what was typed, for the message of the error.

    Raises:
        ValueError: the text is no value of that type.
    """
    if NoneType in kinds(name) and text.lower() == "none":
        return None
    kind = next(k for k in kinds(name) if k is not NoneType)
    try:
        return _TRUTH[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        what = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
        raise ValueError(f"{where}: {text!r} is not {what}") from None


_TRUTH = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
