"""Settings: the settings of analyses, as one value."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from bisam.experiments.errors import unknown
from bisam.experiments.runs.results import WEIGHTS as WEIGHTS, Result, headline
from bisam.validation import positive, whole

SPLITS = ("train", "validation", "test")
FILE = "file"
"""The weights of a file, which belong to no run."""
HEADLINE = "headline"
"""Stands for the weights whose test score reports show and compare: best or last, see `runs.results.headline`."""

SHARED = ("split", "examples", "batch_size", "weights", "seed")
"""Settings that all analyses have: which examples and weights they are of."""


@dataclass(frozen=True)
class Settings:
    """The settings of analyses; each analysis has the shared ones, and those that it names.

    Attributes:
        rho: radii of the balls, in which what has a radius is measured one after the other.
        steps: steps of each ascent.
        split: train (with the label noise of the run, without augmentation), validation or test.
        examples: largest number of examples; the seed chooses them, the same for all runs of one seed on the same data.
        batch_size: examples of a batch, which has a displacement of its own in flips and m-sharpness.
        weights: headline, best (of the latest epoch with the best validation score), last, or ema (the average of the
            weights).
        seed: seeds the choice of the examples, random directions and random vectors.

    Raises:
        TypeError: a value has another type.
        ValueError: a value is outside its range.
    """

    rho: tuple[float, ...] = (0.05,)
    steps: int = 20
    split: str = "train"
    examples: int = 2000
    batch_size: int = 128
    weights: str = HEADLINE
    seed: int = 0

    def __post_init__(self) -> None:
        for radius in self.rho:
            positive("rho", radius)
        object.__setattr__(self, "rho", tuple(float(radius) for radius in dict.fromkeys(self.rho)))
        if not self.rho:
            raise ValueError("rho has no radius: give at least one, such as 0.05")
        for name in ("steps", "examples", "batch_size"):
            whole(name, getattr(self, name))
        whole("seed", self.seed, least=0, most=2**32 - 1)
        if self.split not in SPLITS:
            raise unknown("split", self.split, SPLITS)
        if self.weights not in (HEADLINE, *WEIGHTS, FILE):
            raise unknown("weights of a run", self.weights, WEIGHTS)

    def of(self, result: Result) -> Settings:
        """The settings for a run: its headline weights by their name."""
        return replace(self, weights=headline(result)) if self.weights == HEADLINE else self

    @property
    def radius(self) -> float:
        """The radius, of settings with one."""
        (radius,) = self.rho
        return radius

    def each(self, own: Collection[str]) -> list[Settings]:
        """Settings with one radius each; only one of them for an analysis whose `own` settings have no radius."""
        return [replace(self, rho=(radius,)) for radius in self.rho[: None if "rho" in own else 1]]

    def relevant(self, own: Collection[str]) -> dict[str, Any]:
        """The values on which an analysis with these `own` settings depends, for JSON; for settings with one radius."""
        values: dict[str, Any] = {"rho": self.radius, "steps": self.steps}
        return {name: getattr(self, name) for name in SHARED} | {k: v for k, v in values.items() if k in own}
