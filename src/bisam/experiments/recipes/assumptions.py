"""Assumptions: the values of presets and studies that no public source of their paper gives, for their reports.

Assumption("rho", 0.01, Kind.RECOLLECTED, "the radius at 80 % noise", where={"noise": 0.8})
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any

from bisam.experiments.recipes.recipe import Recipe

SEEDS = "seeds"
"""Subject of an assumption about the number of seeds."""

_FIELDS = {one.name for one in fields(Recipe)}


class Kind(StrEnum):
    """Where an assumed value comes from."""

    RECOLLECTED = "recollected"
    """Remembered from the paper, whose text is not at hand; not a claim of the paper."""
    CHOSEN = "chosen here"
    """Decided by this project."""


@dataclass(frozen=True)
class Assumption:
    """A value that no public source of the paper gives.

    Attributes:
        subject: what has the value: a field of `Recipe`, `SEEDS`, or in words what has no field of its own.
        value: the value; a tuple lists several. For a field of `Recipe` the assumption concerns only recipes that have
            it.
        kind: where the value comes from.
        reason: what is known, and why this value.
        where: fields of the recipes that it concerns, with their values; a tuple lists alternatives.
    """

    subject: str
    value: Any
    kind: Kind
    reason: str
    where: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    def concerns(self, recipe: Recipe) -> bool:
        """Whether a recipe has the assumed value."""
        wanted = {**self.where, **({self.subject: self.value} if self.subject in _FIELDS else {})}
        return all(
            recipe.setting(name) in (value if isinstance(value, tuple) else (value,)) for name, value in wanted.items()
        )


AE_SAM = Assumption(
    "c and delta",
    "1 to -1, and 0.9",
    Kind.RECOLLECTED,
    "AE-SAM's thresholds and decay, which no public source confirms",
    {"method": "ae_sam"},
)
"""Every study with AE-SAM makes this assumption."""
