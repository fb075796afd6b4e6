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
    "Gradients: batch gradients per step on average, with n the examples in a batch; one of a part: the first of them "
    "is computed for the displaced weights only; f: additional forward passes. "
    "Memory: tensors of the size of the weights that are held while the model runs, more than in plain training, on "
    "one device; state is the part of them that is kept between steps. A method with an ascent step takes "
    "ascent=NegLog() or Tanh(), and any perturbation."
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
    partial: bool = False
    """Whether the first gradient of a step is that of a part of the weights only."""
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
    """BiSAM's bound in the expression; the defaults of mu and alpha are its own."""
    own_fields: tuple[str, ...] = ()
    """Fields of recipes that come with the method: it is compared with methods that differ in them."""
    tuned: tuple[str, ...] = ()
    """Fields of recipes that are chosen for the method as a radius is for others: it is compared with methods that
    differ in them, and reports show them."""

    @property
    def cost(self) -> str:
        """Gradients and forward passes of a step, as a formula."""
        forwards = f" + {self.forwards} f" if self.forwards != "0" else ""
        return self.gradients + forwards + (", one of a part" if self.partial else "")

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


ADVERSARIES: tuple[tuple[str, str, str, str], ...] = (
    (
        "BiSAM with a rising mu",
        "BiSAM(0.05, NegLog(Linear(1, 10, steps)))",
        "a bound that comes closer to the 0-1 loss; any schedule",
        "",
    ),
    (
        "wrong classes",
        "BiSAM(0.05, WrongClasses(NegLog()))",
        "a bound without the label's own class, whose gradient does not vanish on confident correct examples",
        "",
    ),
    (
        "wrong classes near the boundary",
        "BiSAM(0.05, WrongClasses(NegLog(), margin=2.0))",
        "the same, with a weight that falls with the margin of correct examples",
        "",
    ),
    (
        "OBF",
        "SAM(L2(0.05), ascent=OBF(gamma=1.0))",
        "output bias forgetting; their gamma is 1 or 1e-12",
        "[Vani et al., 2024](https://arxiv.org/abs/2406.06700)",
    ),
    (
        "SAM at a flip rate",
        "SAM(FlipRate(0.06))",
        "a radius that follows the share of predictions that the ascent step flips; also BiSAM and ASAM",
        "",
    ),
)
"""Adversaries that are no method of the catalogue: a name, an expression, a description, and the source if any."""


def arxiv(number: str) -> str:
    """Address of an arXiv paper."""
    return f"https://arxiv.org/abs/{number}"


def page(methods: Mapping[str, Entry], games: Mapping[str, Entry]) -> str:
    """The page of methods for the documentation."""
    head = [
        "# Methods",
        "",
        "Generated by `bisam methods --to docs/methods.md`; a test counts the costs in the table.",
        "",
        CAPTION,
    ]
    return "\n".join(
        [
            *head,
            "",
            *_table(methods),
            "",
            "## Other adversaries",
            "",
            "They cost what SAM costs. Those without a source are this library's. `bisam run recover` compares them "
            "with SAM on digits: [none is shown to be better](reproduction/recover/report.md).",
            "",
            "| adversary | expression | what | source |",
            "|---|---|---|---|",
            *[f"| {name} | `{expression}` | {what} | {source} |" for name, expression, what, source in ADVERSARIES],
            "",
            "## Min-max problems",
            "",
            *_table(games),
            "",
        ]
    )


def _table(entries: Mapping[str, Entry]) -> list[str]:
    header = ("method", "expression", "what", "source", "gradients", "memory", "state", "set rho to")
    rows = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for e in entries.values():
        source = f"[{e.reference}]({e.url})" if e.url else e.reference
        cells = (e.name, f"`{e.written()}`", e.what, source, e.cost, f"{e.memory:g}", e.state or "–", e.advice or "–")
        rows.append(f"| {' | '.join(cells)} |")
    return rows
