"""Config: a recipe in a file, TOML or JSON, with the names of its fields as keys.

    method = "bisam_log"
    rho = 0.1
    noise = 0.4

A run's own recipe.json is one. `read` makes a recipe of it, and `changes` what it changes in the recipes of a study.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from bisam.experiments.errors import unknown
from bisam.experiments.recipes.changes import parsed
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.recipe import Recipe

SUFFIXES = (".toml", ".json")


def read(path: Path) -> Recipe:
    """Return the recipe in a file; fields that it leaves out have their defaults.

    Args:
        path: of a file of TOML or JSON.

    Raises:
        ValueError: the file is missing or no such file, or a field or its value is refused; the message names it.
        RunError: the recipe has a later version.
    """
    return _recipe(path, _fields(path))


def _recipe(path: Path, found: Mapping[str, Any]) -> Recipe:
    try:
        return Recipe.from_dict({"version": Recipe.version, "method": Recipe.method, **found})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def changes(path: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the fields of a file as changes of the recipes of a study, and the names of those that are none.

    A study has its own methods and seeds: a method in the file is left out with its settings (rho, mu, alpha, eta), and
    so is the seed.

    Args:
        path: of a file of TOML or JSON.

    Returns:
        Changes "name=value", and the names of the fields that are left out.

    Raises:
        ValueError: the file is missing or no such file, or a field or the type of its value is refused.
        RunError: the recipe has a later version.
    """
    found = _fields(path)
    _recipe(path, {"version": found.pop("version", Recipe.version)})  # in a later one fields may mean something else
    own = [name for name in ("method", *(SETTINGS if "method" in found else ()), "seed") if name in found]
    texts = {name: str(value) for name, value in found.items() if name not in own}
    for name, value in texts.items():
        parsed(name, value, f"{path}: {name}")
    left_out = tuple(name for name in own if found[name] is not None)
    return tuple(f"{name}={value}" for name, value in texts.items()), left_out


def _fields(path: Path) -> dict[str, Any]:
    """The fields in a file, whose names are those of a recipe."""
    _check(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a mark at the begin
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no text in UTF-8") from error
    try:
        values: Any = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(f"{path} is nested too deeply for a recipe: give one value for each field") from error
    except ValueError as error:  # of both parsers
        raise ValueError(f"{path} is no {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f'{path} has no fields of a recipe, as in {{"method": "sam"}}')
    found: dict[str, Any] = {str(name): value for name, value in values.items()}  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
    for name, value in found.items():
        if name not in _NAMES:
            raise ValueError(f"{path}: {unknown('field of a recipe', name, _NAMES, 'bisam train --help')}")
        if isinstance(value, dict | list):
            raise ValueError(f"{path}: {name} must be one value, got {value}")
    return found


def text(recipe: Recipe, path: Path) -> str:
    """Return a recipe as the content of a file, which `read` turns into the same recipe.

    Args:
        recipe: any recipe.
        path: the file, whose name says whether it is TOML or JSON.

    Raises:
        ValueError: its name ends in something else.
    """
    _check(path)
    if path.suffix == ".json":
        return json.dumps(recipe.to_dict(), indent=2) + "\n"
    import tomli_w  # not at the top: reading needs the standard library alone

    return tomli_w.dumps({name: value for name, value in recipe.to_dict().items() if value is not None})


def _once(found: list[tuple[str, Any]]) -> dict[str, Any]:
    """The object with these entries, of which JSON allows two of one name, as TOML does not.

    Raises:
        ValueError: there are two.
    """
    values = dict[str, Any]()
    for name, value in found:
        if name in values:
            raise ValueError(f"{name} is given twice, as {values[name]} and {value}")
        values[name] = value
    return values


_NAMES = [field.name for field in fields(Recipe)]


def _check(path: Path) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path}: the name of a recipe's file ends in {' or '.join(SUFFIXES)}")
