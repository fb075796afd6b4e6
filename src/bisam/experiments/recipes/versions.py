"""Versions: which changes of bisam altered the results of recipes whose fields are the same.

A recipe keeps the version of its results. Results of different versions are reported in groups of their own, and only
recipes of the latest version are trained.
"""

from __future__ import annotations

from collections.abc import Iterable, Set as AbstractSet
from dataclasses import dataclass

VERSION = 3
"""Latest version of the meaning of the fields; see `Recipe.version`."""


@dataclass(frozen=True)
class Change:
    """A change of results under unchanged fields.

    Attributes:
        why: what is done since then, for messages.
        names: the recipes whose expression calls one of these names are concerned; None: all recipes are.
    """

    why: str
    names: frozenset[str] | None = None

    def concerns(self, called: AbstractSet[str]) -> bool:
        """Whether it changed the results of a recipe whose expression calls these names."""
        return self.names is None or bool(self.names & called)


CHANGES: dict[int, Change] = {
    2: Change(
        "ESAM draws its mask before the first pass, and its selection is strict",
        frozenset({"ESAM", "EBiSAM", "RandomMask"}),
    ),
    3: Change("the latest of tied validation epochs is tested, and small data sets are split anew for each seed"),
}
"""The change that each version made. Recipes that it does not concern keep their results, folders and fingerprints."""


def changed_in(version: int, called: AbstractSet[str]) -> int:
    """Return the latest version up to `version` that changed the results of a recipe; 1 if none did.

    Args:
        version: of the recipe.
        called: the names that its expression calls.
    """
    return max((each for each in _concerning(called) if each <= version), default=1)


def latest_alike(version: int, called: AbstractSet[str]) -> int:
    """Return the latest version that gives the results of `version`: recipes that differ in these two are equal."""
    return min((each for each in _concerning(called) if version < each <= VERSION), default=VERSION + 1) - 1


def changed_since(version: int, called: AbstractSet[str]) -> str:
    """Return what has changed for a recipe of an earlier version, in words."""
    return "; ".join(CHANGES[each].why for each in _concerning(called) if version < each <= VERSION)


def _concerning(called: AbstractSet[str]) -> Iterable[int]:
    return [version for version, change in sorted(CHANGES.items()) if change.concerns(called)]
