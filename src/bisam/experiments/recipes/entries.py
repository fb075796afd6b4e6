"""Entries: rows of the catalogue of methods, and the page of the documentation that shows them."""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bisam.objectives import NegLog, Tanh
from bisam.perturbations import Adaptive

SETTINGS = ("rho", "mu", "alpha", "eta")
"""Fields of a recipe that set a value in the expression of its method."""

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
    """A method of the catalogue. Costs are formulas of its settings; n is the number of examples in a batch."""

    name: str
    """Name in the literature."""
    expression: str
    """Template of the expression; settings of a recipe stand in braces."""
    what: str
    """Description in a few words."""
    reference: str = ""
    """Author-year."""
    url: str = ""
    """Address of the reference."""
    gradients: str = "2"
    """Gradient evaluations of a batch in a step, on average; "1 to 2" where it depends on the run."""
    forwards: str = "0"
    """Forward passes of a batch in a step besides, on average."""
    memory: float = 1
    """Tensors of the size of the weights that are held while the model runs, more than in plain training."""
    state: str = ""
    """The part of that memory that is kept between steps."""
    kept: float = 0
    """Size of the state, in tensors of the size of the weights."""
    rho: float | None = 0.05
    """Default radius, or the number that takes its place; None for methods without perturbation."""
    advice: str = "0.05 to 0.2"
    """Recommended values of rho."""
    family: str = "geometry"
    """Kind of change to SAM: a key of `FAMILIES`."""
    bound: type[NegLog] | type[Tanh] | None = None
    """Lower bound of the 0-1 loss in the expression; the defaults of mu and alpha are its own."""
    own_fields: tuple[str, ...] = ()
    """Fields of recipes that come with the method: it is compared with methods that differ in them."""

    @property
    def cost(self) -> str:
        """Gradients and forward passes of a step, as a formula."""
        return self.gradients + (f" + {self.forwards} f" if self.forwards != "0" else "")

    @property
    def settings(self) -> set[str]:
        """The fields of a recipe that the expression takes."""
        return {name for _, name, _, _ in string.Formatter().parse(self.expression) if name}

    @property
    def defaults(self) -> dict[str, Any]:
        """Default values of the settings: the entry's own radius, and the library's defaults."""
        values = {"rho": self.rho, "mu": getattr(self.bound, "mu", None), "alpha": Tanh.alpha, "eta": Adaptive.eta}
        return {name: value for name, value in values.items() if name in self.settings}

    def written(self, **settings: Any) -> str:
        """The expression with these settings in place of the defaults."""
        return self.expression.format(**{**self.defaults, **{k: v for k, v in settings.items() if v is not None}})


def arxiv(number: str) -> str:
    """Address of an arXiv paper."""
    return f"https://arxiv.org/abs/{number}"


def page(methods: Mapping[str, Entry], games: Mapping[str, Entry]) -> str:
    """The page of methods for the documentation."""
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
