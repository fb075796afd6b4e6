"""Search: what is tuned and how, as a value, and the folder that belongs to it.

runs/tune/bisam_log-noise-0.4-1f0c22e9/
    optuna.db        the search and its trials, Optuna's SQLite storage; another search is refused in this folder
    trials/          the run folders, as those of `bisam train` but without a test
    best.toml        the recipe of the best trial, for `bisam train --config`
    report.html ...  the report, see report.py
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from bisam.experiments.errors import InUseError, RunError, unknown
from bisam.experiments.recipes.presets import started
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.files import make_folders
from bisam.experiments.tuning.space import Range, Space, filled, placeholders

SAMPLERS = ("tpe", "random", "grid")
PRUNERS = ("median", "none")
DATABASE = "optuna.db"
RUNS = "trials"
"""Name of the folder with the run folders."""
_LENGTHS = ("epochs", "steps")


@dataclass(frozen=True)
class Search:
    """A search for the values of some settings with the best mean validation score.

    Attributes:
        base: the other values, and the first seed.
        space: what is searched.
        method: the method's expression with names in braces, where arguments of it are searched; else None.
        sampler: how values are chosen, one of `SAMPLERS`.
        pruner: which trials are stopped early, one of `PRUNERS`.
        seeds: runs of a trial, each with another seed.

    Raises:
        ValueError: a value is refused; the message names the flag.
    """

    base: Recipe
    space: Space = field(hash=False)
    method: str | None = None
    sampler: str = "tpe"
    pruner: str = "median"
    seeds: int = 1

    def __post_init__(self) -> None:
        for name, value, known in (("sampler", self.sampler, SAMPLERS), ("pruner", self.pruner, PRUNERS)):
            if value not in known:
                raise unknown(name, value, known)
        if self.base.held_out == 0:
            raise ValueError(
                "--held-out 0 leaves no validation examples, and a search never uses the test examples: leave it out"
            )
        if self.sampler == "grid" and (name := next((n for n, d in self.space.items() if d.grid is None), None)):
            raise ValueError(
                f"--sampler grid tries all values, and --search {name}={self.space[name]} is a range without a step: "
                f"write choices, as in --search {name}=0.05,0.1,0.2"
            )
        if self.pruner != "none" and (lengths := [name for name in _LENGTHS if name in self.space]):
            raise ValueError(
                f"--search {lengths[0]}: trials of different lengths cannot be compared after an epoch: "
                "add --pruner none"
            )
        middle = {name: dimension.middle for name, dimension in self.space.items()}
        for name, dimension in self.space.items():
            for value in dimension.ends:
                try:
                    self.recipe({**middle, name: value}).check_trainable()
                except (TypeError, ValueError) as error:
                    raise ValueError(f"--search {name}={dimension}: {error}") from error

    def recipe(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with these values of what is searched, and the first seed."""
        arguments = () if self.method is None else placeholders(self.method)
        changes = {name: value for name, value in values.items() if name not in arguments}
        recipe = started(self.base, changes)
        return recipe if self.method is None else replace(recipe, method=filled(self.method, values))

    def runs(self, values: Mapping[str, Any]) -> tuple[Recipe, ...]:
        """The recipes of the runs of a trial, one for each seed."""
        recipe = self.recipe(values)
        return tuple(replace(recipe, seed=recipe.seed + i) for i in range(self.seeds))

    @property
    def fresh_seed(self) -> int:
        """The first seed that no trial has."""
        return self.base.seed + self.seeds

    @property
    def first(self) -> dict[str, Any] | None:
        """The values of the recipe as it is given, if all of them are in the space: they are tried first."""
        if self.method is not None or self.sampler == "grid":
            return None
        values = {name: self.base.setting(name) for name in self.space}
        return values if all(value in self.space[name] for name, value in values.items()) else None

    @property
    def grid(self) -> list[dict[str, Any]]:
        """All combinations of values, in the order in which a grid tries them."""
        lists = {name: dimension.grid or () for name, dimension in self.space.items()}
        return [dict(zip(lists, values, strict=True)) for values in product(*lists.values())]

    @property
    def ranges(self) -> dict[str, Range]:
        """The ranges among the dimensions of the space."""
        return {name: one for name, one in self.space.items() if isinstance(one, Range)}

    def to_dict(self) -> dict[str, Any]:
        """Names and values as JSON, by which the storage recognises the search."""
        return {
            "recipe": self.base.to_dict(),
            "method": self.method,
            "search": {name: str(dimension) for name, dimension in self.space.items()},
            "sampler": self.sampler,
            "pruner": self.pruner,
            "seeds_per_trial": self.seeds,
        }


@contextmanager
def claimed(folder: Path) -> Generator[None]:
    """Hold the folder of a search, and create it if it does not exist.

    Raises:
        RunError: another process holds it, or it has files of something else.
        OSError: the disk is full or read-only.
    """
    there = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if not {DATABASE, RUNS} & {*there} and any(not name.startswith(".") for name in there):
        raise RunError(f"{folder} has files of something else: give another --out")
    make_folders(folder)
    try:
        with FileLock(folder / ".lock", timeout=0):  # the system releases it when the process is killed
            yield
    except Timeout:
        raise InUseError(f"{folder} is in use by another process: let it finish, or give another --out") from None


def differences(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """What differs between two searches, as `Search.to_dict` describes them."""
    here, there = _flat(here), _flat(there)
    return [
        f"{name} is {there.get(name, 'not searched')} there and {here.get(name, 'not searched')} here"
        for name in dict.fromkeys((*here, *there))
        if here.get(name) != there.get(name)
    ]


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values with those of the recipe and of the space beside the others; later fields have their defaults."""
    recipe: Mapping[str, Any] = values.get("recipe") or {}
    with suppress(TypeError, ValueError, RunError):  # else it differs by what it has
        recipe = Recipe.from_dict(dict(recipe)).to_dict()
    space: Mapping[str, Any] = values.get("search") or {}
    rest = {name: value for name, value in values.items() if name not in ("recipe", "search", "method")}
    rest |= {f"--search {name}": value for name, value in space.items()}
    return {**recipe, "expression": values.get("method"), **rest}
