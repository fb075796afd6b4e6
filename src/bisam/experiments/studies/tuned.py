"""Tuned: the settings that a study of tuning has chosen for the methods of another study."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

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


@dataclass(frozen=True)
class Task(ABC):
    """A data set with its network, on which methods are compared under several conditions, each with its own setting.

    One study makes trials of the settings, and another one tests those that it has chosen, on other seeds.

    Attributes:
        name: of the study that tests.
        recipe: without a method and its setting.
        chosen: the settings that the study of the trials has chosen, by method and condition.
    """

    name: str
    recipe: Recipe
    chosen: Mapping[tuple[str, Condition], float] = field(
        default_factory=dict[tuple[str, Condition], float], hash=False, kw_only=True
    )
    methods: ClassVar[Sequence[str]]
    """Keys of the catalogue, or of `expressions`, in the order of the table."""
    expressions: ClassVar[Mapping[str, str]]
    """Templates of the expressions of methods that are not in the catalogue; the setting stands in the braces."""
    conditions: ClassVar[Sequence[float]]
    """Levels of label noise, or of imbalance."""
    suffix: ClassVar[str]
    """End of the name of the study that makes the trials."""

    @abstractmethod
    def trials_of(self, method: str, condition: float) -> tuple[float, ...]:
        """The settings that are tried, as many for each method under a condition."""

    @abstractmethod
    def trial(self, method: str, condition: float, setting: float, epochs: int | None) -> Recipe:
        """The recipe of a method with a setting."""

    @property
    def tuning(self) -> str:
        """Name of the study that makes the trials."""
        return self.name + self.suffix

    @property
    def settings(self) -> Settings:
        """The setting of each method under each condition; before it is chosen, the middle one of the trials."""
        before: dict[tuple[str, Condition], float] = {}
        for method in self.methods:
            for condition in self.conditions:
                trials = self.trials_of(method, condition)
                before[method, condition] = trials[len(trials) // 2]
        return Settings(self.tuning, before, "the middle of the trials, and all runs are trial runs", self.chosen)

    def trials(self, epochs: int | None) -> list[Recipe]:
        """The recipes of the study that makes the trials."""
        return [
            self.trial(method, condition, setting, epochs)
            for condition in self.conditions
            for method in self.methods
            for setting in self.trials_of(method, condition)
        ]

    def tests(self, epochs: int | None) -> list[Recipe]:
        """The recipes of the study that tests the chosen settings."""
        settings = self.settings
        return [
            self.trial(method, condition, settings[method, condition], epochs)
            for condition in self.conditions
            for method in self.methods
        ]

    def labels(self) -> dict[str, str]:
        """Names of the expressions."""
        return {
            template.format(setting): method
            for method, template in self.expressions.items()
            for condition in self.conditions
            for setting in self.trials_of(method, condition)
        }


def with_setting(recipe: Recipe, method: str, setting: float) -> Recipe:
    """The recipe with another method of the catalogue and its setting: its radius, or a weight decay if it has none."""
    name = "weight_decay" if METHODS[method].rho is None else "rho"
    return replace(recipe, method=method, **{name: setting})
