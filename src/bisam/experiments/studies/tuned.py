"""Tuned: the settings that a study of tuning has chosen for the methods of another study."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.recipe import Recipe

Condition = float | str
"""What the settings of a method are chosen for: a level of label noise, or a task."""


@dataclass(frozen=True)
class Settings:
    """A setting of each method under each condition.

    What the section "Chosen settings" of the tuning study's report says is entered in `chosen`.

    Attributes:
        study: name of the study that chooses the settings.
        before: the settings until then, by method and condition.
        origin: where these are from, for the note.
        chosen: the settings that the study has chosen, by method and condition.
    """

    study: str
    before: Mapping[tuple[str, Condition], float] = field(hash=False)
    origin: str
    chosen: Mapping[tuple[str, Condition], float] = field(
        default_factory=dict[tuple[str, Condition], float], hash=False
    )

    def __post_init__(self) -> None:
        if unknown := [key for key in self.chosen if key not in self.before]:
            raise ValueError(f"settings of {self.study} that no recipe has: {unknown}")

    def __getitem__(self, of: tuple[str, Condition]) -> float:
        """The setting of a method under a condition."""
        return self.chosen[of] if of in self.chosen else self.before[of]

    def note(self) -> str:
        """Says which settings are not chosen yet, for the note of a study; empty once all are."""
        missing = [key for key in self.before if key not in self.chosen]
        if not missing:
            return ""
        of = "all methods" if len(missing) == len(self.before) else ", ".join(f"{name} ({at})" for name, at in missing)
        return (
            f" **Not tuned yet**: {of}. Until `bisam run {self.study}` is finished, these settings are {self.origin}."
        )


def with_setting(recipe: Recipe, method: str, setting: float) -> Recipe:
    """The recipe with another method of the catalogue and its setting: its radius, or a weight decay if it has none."""
    name = "weight_decay" if METHODS[method].rho is None else "rho"
    return replace(recipe, method=method, **{name: setting})
