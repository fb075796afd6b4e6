"""Entries: a method as a row of the catalogue, and rows as a page."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

FAMILIES = {
    "plain": "plain",
    "geometry": "another neighbourhood or direction",
    "adversary": "another adversary: BiSAM",
    "combining": "gradients combined",
    "saving": "fewer gradients",
    "around": "micro-batches, noise, Bayes",
    "games": "min-max problems",
}

CAPTION = (
    "Gradients: batch gradients per step on average, with n the examples in a batch; f: forward passes besides. "
    "Memory: tensors of the size of the weights that are held while the model runs, more than in plain training, on "
    "one device; state is the part of them that is kept between steps. What climbs takes ascent=NegLog() or Tanh(), "
    "and any perturbation."
)


@dataclass(frozen=True)
class Entry:
    """A method of the catalogue. Costs are formulas of its settings, with n the examples in a batch."""

    name: str
    """As the field writes it."""
    expression: str
    """Template of the expression; what is in braces are settings of a recipe."""
    what: str
    """In a few words."""
    reference: str = ""
    """Author-year."""
    url: str = ""
    """Where the reference is."""
    gradients: str = "2"
    """Gradient evaluations of a batch in a step, on average; "1 to 2" where it depends on the run."""
    forwards: str = "0"
    """Forward passes of a batch in a step besides, on average."""
    memory: float = 1
    """Tensors of the size of the weights that are held while the model runs, more than in plain training."""
    state: str = ""
    """What of that is remembered between steps."""
    kept: float = 0
    """Its size, in weights."""
    rho: float | None = 0.05
    """Default radius, or what stands in its place."""
    advice: str = "0.05 to 0.2"
    """What to set it to."""
    family: str = "geometry"
    """What is done to SAM: the key of `FAMILIES`."""

    @property
    def cost(self) -> str:
        """Gradients and forward passes."""
        return self.gradients + (f" + {self.forwards} f" if self.forwards != "0" else "")

    @property
    def settings(self) -> set[str]:
        """The settings of a recipe that the expression takes."""
        return {name for _, name, _, _ in string.Formatter().parse(self.expression) if name}

    def written(self, **settings: Any) -> str:
        """The expression with these settings in place of the defaults."""
        values: dict[str, Any] = {"rho": self.rho, "eta": 0.0, "mu": 10.0 if "Tanh" in self.expression else 1.0}
        values |= {"alpha": 0.1} | {k: v for k, v in settings.items() if v is not None}
        return self.expression.format(**values)


def arxiv(number: str) -> str:
    """Where an arXiv paper is."""
    return f"https://arxiv.org/abs/{number}"


def page(methods: Mapping[str, Entry], games: Mapping[str, Entry]) -> str:
    """The page of methods for the docs."""
    head = [
        "# Methods",
        "",
        "Made by `bisam methods --to docs/methods.md`; a test counts what the table claims.",
        "",
        CAPTION,
    ]
    return "\n".join([*head, "", *_table(methods), "", "## Min-max problems", "", *_table(games), ""])


def _table(entries: Mapping[str, Entry]) -> list[str]:
    header = ("method", "expression", "what", "source", "gradients", "memory", "state", "set rho to")
    rows = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for e in entries.values():
        source = f"[{e.reference}]({e.url})" if e.url else e.reference
        cells = (e.name, f"`{e.written()}`", e.what, source, e.cost, f"{e.memory:g}", e.state or "–", e.advice or "–")
        rows.append(f"| {' | '.join(cells)} |")
    return rows
