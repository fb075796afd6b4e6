"""Study: a named set of recipes and a number of seeds, compared in one table or figure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from bisam.experiments.errors import unknown
from bisam.experiments.recipes.assumptions import Assumption
from bisam.experiments.recipes.catalogue import BASELINE
from bisam.experiments.recipes.changes import pairs, parsed
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.recipe import Recipe, both_given
from bisam.experiments.studies.papers import Exhibit


@dataclass(frozen=True)
class Analyses:
    """What `bisam analyse` measures of each finished run of a study, and how it is compared with the test error.

    Attributes:
        what: names of analyses, each with the settings in which it differs from `settings`.
        settings: the settings of all analyses that differ from the defaults, with one radius.
        measures: the measures that are compared: from the title of a column of these analyses to a name for the report.
        primary: name of the measure whose correlation with the test error was fixed as the primary comparison before
            the first run.
        control: name of the measure that others must beat.
        shown: names of the measures in the figure.
    """

    what: Mapping[str, Mapping[str, Any]] = field(hash=False)
    settings: Mapping[str, Any] = field(hash=False)
    measures: Mapping[str, str] = field(hash=False)
    primary: str
    control: str
    shown: tuple[str, ...]

    def settings_of(self, name: str) -> dict[str, Any]:
        """The settings of one of the analyses that differ from the defaults."""
        return {**self.settings, **self.what[name]}


@dataclass(frozen=True)
class Regret:
    """Comparison of what a radius that is too large costs a method and a control.

    Attributes:
        method: the method of the primary comparison.
        control: the method that regrets are compared with.
        factor: how much too large the radius of the primary comparison is.
        factors: all multiples of the optimum that are shown.
        optima: the optimum of a method (as recipes name it) at a level of label noise, which another study has found.
            Empty: it is the best radius of the study's own runs, and all comparisons are exploratory.
    """

    method: str
    control: str
    factor: float
    factors: tuple[float, ...]
    optima: Mapping[tuple[str, float], float] = field(default_factory=dict[tuple[str, float], float], hash=False)


@dataclass(frozen=True)
class Primary:
    """The comparison that a study has fixed before its first run.

    The report tests it by itself, at the full level of 5 %, and all other comparisons together:

        Study(..., primary=Primary("BiSAM (-log) against SAM with label noise", "bisam_log", where={"noise": 0.4}))

    It is the difference in the headline test score, paired by seed, two-sided. If several settings of the study have
    it, they are adjusted together (Holm). A study whose comparison is another one (of flips, or a difference of
    differences) gives `words` alone, and a section of its own tests it; all rows of the table are then exploratory.

    Attributes:
        words: what is compared with what, without a full stop, in Markdown.
        method: the recipe's method; "" if a section of the study's own tests the comparison.
        against: the method that it is compared with, which shares its setting; it need not be one of `Study.baselines`.
        where: values of fields of the recipes of `method` that it is about, defaults of the method included.
        seeds: the seeds that test it, all of them; None: those of the study. With fewer of them nothing is decided, and
            runs of other seeds have no part in it.
    """

    words: str
    method: str = ""
    against: str = BASELINE
    where: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)
    seeds: range | None = None


@dataclass(frozen=True)
class Study:
    """A named comparison."""

    name: str
    title: str
    recipes: Callable[[int | None], list[Recipe]]
    """Maps a number of epochs (None: the study's own epochs or steps) to the recipes, in the order of the table.

    The recipes are in the same order for each number, and their epochs are proportional to it up to rounding, as the
    twice as many of SGD.
    """
    seeds: int
    figures: tuple[str, ...] = ("accuracy", "flips")
    """Names of functions in `figures`."""
    first_seed: int = 0
    note: str = ""
    """Explanation in the report of how to read it."""
    baselines: tuple[str, ...] = (BASELINE,)
    """The methods that others are compared with."""
    shared: str = ""
    """Name of another study whose run folders this one uses, because they have runs in common."""
    exhibit: Exhibit | None = None
    """The table or figure of a paper that it reproduces; None if it is in no paper."""
    labels: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)
    """Names of the methods that are expressions, for reports; an expression has the same name in all studies."""
    assumptions: tuple[Assumption, ...] = ()
    """The values that no public source of the paper gives; the report marks them."""
    tunes: bool = False
    """Whether it tries values of settings to choose one; the report says which."""
    analyses: Analyses | None = None
    """What is measured of its finished runs, and correlated with their test error; None: nothing."""
    regret: Regret | None = None
    """What a wrong radius costs, and which costs are compared; None: the report has no such section."""
    primary: Primary | None = None
    """The comparison that was fixed before the first run; None: all comparisons are adjusted together."""

    @property
    def registered(self) -> Primary | None:
        """The primary comparison with its seeds."""
        if self.primary is None or self.primary.seeds is not None:
            return self.primary
        return replace(self.primary, seeds=range(self.first_seed, self.first_seed + self.seeds))

    @property
    def folder(self) -> str:
        """Name of the folder with its runs."""
        return self.shared or self.name

    def changed(self, epochs: int | None, changes: Sequence[str]) -> list[Recipe]:
        """The recipes with another number of epochs or steps, and with other values of fields.

        Args:
            epochs: number of epochs of each run (of SAM, where other methods have more or fewer at equal gradients).
            changes: texts "field=value"; settings of methods are changed in the recipes whose method has them. Epochs
                and steps keep the proportions of the study, as the twice as many of SGD.

        Raises:
            ValueError: a field or value is unknown, or no recipe can have it.
        """
        texts = pairs(changes, "epochs=1")
        known = [one.name for one in fields(Recipe) if one.name != "version"]
        for name in texts:
            if name not in known:
                raise unknown("field", name, known, "bisam train --help")
        values = {name: parsed(name, text, f"--set {name}={text}") for name, text in texts.items()}
        for name in ("seed", "method"):
            if name in values:
                raise ValueError(f"--set {name}={values[name]} is refused: a study has its own ({_INSTEAD[name]})")
        if "epochs" in values:
            if epochs is not None:
                raise ValueError(f"--epochs {epochs} and --set epochs={values['epochs']} are both given: leave one out")
            epochs = values.pop("epochs")
        steps = values.pop("steps", None)
        if epochs is not None and steps is not None:
            raise both_given(epochs, steps)
        for name, count in (("epochs", epochs), ("steps", steps)):
            if count is not None and count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        settings = {name: values.pop(name) for name in SETTINGS if name in values}
        if steps is None:
            recipes = [replace(recipe, **values) for recipe in self.recipes(epochs)]
        else:
            recipes = [
                replace(recipe, **values, epochs=None, steps=max(1, round(many.length * steps / _MANY)))
                for recipe, many in zip(self.recipes(None), self.recipes(_MANY), strict=True)
            ]
        for name, value in settings.items():
            takes = [name in recipe.settings for recipe in recipes]
            if not any(takes):
                raise ValueError(f"--set {name}={value}: no method of {self.name} has {name} as a setting")
            recipes = [replace(r, **{name: value}) if t else r for r, t in zip(recipes, takes, strict=True)]
        return list(dict.fromkeys(recipes))


_MANY = 600  # epochs, a multiple of what studies divide by
_INSTEAD = {"seed": "--seeds says how many", "method": "bisam train --method runs another"}


def expand(recipes: Sequence[Recipe], seeds: int, first: int = 0) -> list[Recipe]:
    """Recipes with each seed: all recipes of one seed before the next, so that unfinished studies can be compared."""
    return [replace(recipe, seed=seed) for seed in range(first, first + seeds) for recipe in recipes]
