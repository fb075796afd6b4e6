"""Catalogue: every method of the library, how it is written, where it is from, and what it costs.

`bisam methods` prints it, the table in the docs is generated from it, recipes take their methods from it, and a test
compares its costs with what an oracle counts.
"""

from __future__ import annotations

import string
from dataclasses import dataclass, replace
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


def _arxiv(number: str) -> str:
    return f"https://arxiv.org/abs/{number}"


_FORET, _KWON, _XIE = _arxiv("2010.01412"), _arxiv("2102.11600"), _arxiv("2407.12993")

_SAMPA = Entry(
    "SAMPa-0.2",
    "SAMPa(L2({rho}), ahead=lookahead(optimizer), lam=0.2)",
    "two gradients that two devices can take at once",
    "Xie et al., 2024",
    _arxiv("2410.10683"),
    state="gradient, batch",
    kept=1,
    memory=5,
    rho=0.1,
    advice="0.1",
    family="saving",
)

METHODS: dict[str, Entry] = {
    # What everything is compared with.
    "sgd": Entry("SGD", "ERM()", "the plain loss", gradients="1", memory=0, rho=None, advice="", family="plain"),
    "sam": Entry(
        "SAM", "SAM(L2({rho}))", "climb the training loss in a ball", "Foret et al., 2021", _FORET, family="plain"
    ),
    # Another adversary.
    "bisam_log": Entry(
        "BiSAM (-log)",
        "BiSAM({rho}, NegLog({mu}))",
        "climb a lower bound of the 0-1 loss",
        "Xie et al., 2024",
        _XIE,
        advice="SAM's; mu 1",
        family="adversary",
    ),
    "bisam_tanh": Entry(
        "BiSAM (tanh)",
        "BiSAM({rho}, Tanh({mu}, {alpha}))",
        "climb another lower bound of it",
        "Xie et al., 2024",
        _XIE,
        advice="SAM's; mu 10, alpha 0.1",
        family="adversary",
    ),
    "abisam_log": Entry(
        "A-BiSAM (-log)",
        "ABiSAM({rho}, NegLog({mu}), {eta})",
        "BiSAM in ASAM's neighbourhood",
        "Xie et al., 2024",
        _XIE,
        rho=2.0,
        advice="ASAM's",
        family="adversary",
    ),
    "abisam_tanh": Entry(
        "A-BiSAM (tanh)",
        "ABiSAM({rho}, Tanh({mu}, {alpha}), {eta})",
        "the same with the tanh bound",
        "Xie et al., 2024",
        _XIE,
        rho=2.0,
        advice="ASAM's",
        family="adversary",
    ),
    "ebisam": Entry(
        "E-BiSAM (-log)",
        "EBiSAM({rho}, NegLog({mu}), beta=0.6, gamma=0.5)",
        "BiSAM with ESAM's savings",
        "Xie et al., 2024",
        _XIE,
        gradients="1 + gamma",
        forwards="1",
        memory=2,
        advice="ESAM's",
        family="adversary",
    ),
    "gbisam": Entry(
        "G-BiSAM (-log)",
        "GBiSAM({rho}, NegLog({mu}), alpha=0.4)",
        "BiSAM with GSAM's gap",
        "Zhuang et al., 2022; Xie et al., 2024",
        _arxiv("2203.08065"),
        gradients="3",
        memory=2,
        advice="GSAM's",
        family="adversary",
    ),
    # Another neighbourhood or direction.
    "asam": Entry(
        "ASAM",
        "ASAM({rho}, {eta})",
        "a neighbourhood that scales with the weights",
        "Kwon et al., 2021",
        _KWON,
        rho=2.0,
        advice="2.0; 0.5 with the authors' choice of parameters and eta 0.01",
    ),
    "sam_on": Entry(
        "SAM-ON",
        "SAMON({rho})",
        "perturb normalisation layers alone",
        "Mueller et al., 2023",
        _arxiv("2306.04226"),
        rho=0.5,
        advice="larger than SAM's",
    ),
    "fsam": Entry(
        "F-SAM",
        "FSAM({rho}, sigma=1.0, lam=0.9)",
        "climb what is particular to the batch",
        "Li et al., 2024",
        _arxiv("2403.12350"),
        state="average gradient",
        kept=1,
        memory=3,
        advice="SAM's; lam 0.6 to 0.95",
    ),
    "vasso": Entry(
        "VaSSO",
        "VaSSO({rho}, theta=0.9)",
        "climb an average of gradients",
        "Li and Giannakis, 2023",
        _arxiv("2309.15639"),
        state="average gradient",
        kept=1,
        memory=3,
        advice="SAM's",
    ),
    "zsharp": Entry(
        "ZSharp",
        "ZSharp({rho}, keep=0.05)",
        "climb the entries that stand out",
        "Yun, 2025",
        _arxiv("2505.02369"),
        advice="SAM's",
    ),
    "le_sam": Entry(
        "LE-SAM",
        "LESAM({rho}, rho_max=0.5)",
        "a rise of the loss in place of a radius",
        "Wang et al., 2026",
        _arxiv("2605.10183"),
        advice="sigma is a rise of the loss; the authors' value was not found",
    ),
    "fisher_sam": Entry(
        "Fisher SAM",
        "FisherSAM({rho}, keep=0.1, every=100)",
        "perturb where the Fisher information is largest",
        "Zhong et al., 2022",
        _arxiv("2210.05497"),
        state="mask",
        kept=0.25,
        memory=1.5,
        advice="SAM's",
    ),
    "ssam_f": Entry(
        "SSAM-F",
        "SSAMF(L2({rho}), keep=0.8, every=5 * epoch, samples=16)",
        "the same, from single examples",
        "Mi et al., 2022",
        _arxiv("2210.05177"),
        gradients="2 + samples / n / every",
        state="mask",
        kept=0.25,
        memory=1.5,
        advice="SAM's",
    ),
    "ssam_d": Entry(
        "SSAM-D",
        "SSAMD({rho}, keep=0.5, every=5 * epoch, steps=steps)",
        "perturb a sparse part that wanders",
        "Mi et al., 2022",
        _arxiv("2210.05177"),
        state="mask",
        kept=0.25,
        memory=1.5,
        advice="SAM's",
    ),
    "multistep_sam": Entry(
        "multi-step SAM",
        "MultiStepSAM(L2({rho}), steps=2)",
        "climb in several steps",
        "Foret et al., 2021",
        _FORET,
        gradients="1 + steps",
        memory=2,
        advice="SAM's",
    ),
    # Gradients combined.
    "gsam": Entry(
        "GSAM",
        "GSAM(L2(Follow(optimizer, high={rho}, low={rho} / 2)), alpha=0.4)",
        "narrow the gap between perturbed and plain loss",
        "Zhuang et al., 2022",
        _arxiv("2203.08065"),
        memory=2,
        advice="follows the learning rate: 0.04 to 0.02 for ResNets, 0.6 to 0.1 for ViTs",
        family="combining",
    ),
    "wsam": Entry(
        "WSAM",
        "WSAM(L2({rho}), gamma=0.9)",
        "sharpness as a weighted term",
        "Yue et al., 2023",
        _arxiv("2305.15817"),
        memory=2,
        advice="0.05; gamma 0.8 to 0.95",
        family="combining",
    ),
    "cr_sam": Entry(
        "CR-SAM",
        "CRSAM(L2({rho}), gamma=0.1, beta=0.01)",
        "penalise the curvature along the ascent",
        "Wu et al., 2024",
        _arxiv("2312.13555"),
        gradients="3",
        memory=5,
        rho=0.1,
        advice="0.1",
        family="combining",
    ),
    "xsam": Entry(
        "XSAM",
        "XSAM(L2({rho}), rho_max=2 * {rho}, every=epoch)",
        "a direction between displacement and gradient",
        "Chen and Zhou, 2026",
        _arxiv("2603.10048"),
        forwards="21 / every",
        state="alpha",
        memory=5,
        rho=0.15,
        advice="0.15",
        family="combining",
    ),
    "functional_sam": Entry(
        "Functional SAM",
        "FunctionalSAM(L2({rho}))",
        "perturb the function, not the loss",
        "Singh et al., 2025",
        _arxiv("2502.02407"),
        memory=2,
        advice="SAM's",
        family="combining",
    ),
    # Fewer gradients.
    "esam": Entry(
        "ESAM",
        "ESAM(RandomMask(L2({rho}), beta=0.6), gamma=0.5)",
        "a part of the weights and of the examples",
        "Du et al., 2022",
        _arxiv("2110.03141"),
        gradients="1 + gamma",
        forwards="1",
        memory=2,
        advice="SAM's; beta and gamma 0.5 to 0.6",
        family="saving",
    ),
    "ksam": Entry(
        "K-SAM",
        "KSAM(32, SAM(L2({rho})))",
        "the examples with the largest losses",
        "Ni et al., 2022",
        _arxiv("2210.12864"),
        gradients="2 * k / n",
        forwards="1",
        advice="SAM's",
        family="saving",
    ),
    "looksam": Entry(
        "LookSAM",
        "LookSAM(L2({rho}), k=5, alpha=0.7)",
        "SAM every k steps, its effect used again between",
        "Liu et al., 2022",
        _arxiv("2203.02714"),
        gradients="1 + 1 / k",
        state="v",
        kept=1,
        memory=3,
        rho=0.1,
        advice="0.1",
        family="saving",
    ),
    "ae_sam": Entry(
        "AE-SAM",
        "AESAM(L2({rho}), steps=steps)",
        "SAM where the gradient is large for its time",
        "Jiang et al., 2023",
        _arxiv("2304.14647"),
        gradients="1 to 2",
        state="two numbers",
        memory=2,
        advice="SAM's",
        family="saving",
    ),
    "momentum_sam": Entry(
        "Momentum-SAM",
        "MomentumSAM(L2({rho}), momentum=0.9)",
        "stand ahead along the momentum: one gradient",
        "Becker et al., 2024",
        _arxiv("2401.12033"),
        gradients="1",
        state="momentum",
        kept=1,
        memory=2,
        rho=0.3,
        advice="0.3 to 3",
        family="saving",
    ),
    "sampa": _SAMPA,
    "sampa_0": replace(
        _SAMPA,
        name="SAMPa-0",
        expression="SAMPa(L2({rho}), ahead=lookahead(optimizer), lam=0)",
        what="the same without the gradient at the point ahead",
    ),
    "every": Entry(
        "SAM every 2nd step",
        "Every(2, SAM(L2({rho})))",
        "any method at every k-th step, another one between",
        gradients="1 + 1 / k",
        advice="larger than the method's",
        family="saving",
    ),
    "during": Entry(
        "SAM in the 2nd half",
        "During(SAM(L2({rho})), start=steps // 2)",
        "any method from one step to another",
        "Zhou et al., 2025",
        _arxiv("2410.10373"),
        gradients="1 to 2",
        advice="the method's",
        family="saving",
    ),
    # Micro-batches, noise, Bayes.
    "msam": Entry(
        "mSAM",
        "MSAM(32, SAM(L2({rho})))",
        "any method on each micro-batch by itself",
        "Foret et al., 2021; Behdin et al., 2023",
        _arxiv("2302.09693"),
        memory=2,
        advice="SAM's; m 32 to 128",
        family="around",
    ),
    "rsam": Entry(
        "R-SAM",
        "RSAM(0.05, SAM(L2({rho})))",
        "any method around a random point",
        "Liu et al., 2022",
        "",
        memory=2,
        advice="SAM's; sigma 0.01 to 0.05",
        family="around",
    ),
    "bsam": Entry(
        "bSAM",
        "BSAM(4 * examples, {rho}, prior=2e-3 * examples)",
        "SAM as Bayes, with a step of its own (SGD without momentum)",
        "Moellenhoff and Khan, 2023",
        _arxiv("2210.01620"),
        state="momentum, precision",
        kept=2,
        memory=5,
        rho=0.01,
        advice="0.01",
        family="around",
    ),
}
"""By their names on the command line."""

GAMES: dict[str, Entry] = {
    "eg": Entry(
        "extragradient",
        "ExtraGradient({rho})",
        "the operator a step ahead",
        "Korpelevich, 1976",
        memory=2,
        advice="gamma, below 1/L",
        family="games",
    ),
    "rapp": Entry(
        "RAPP",
        "RAPP({rho}, inner=3)",
        "the operator at an approximate proximal point",
        "Pethick et al., 2023",
        _arxiv("2310.13459"),
        gradients="inner",
        memory=2,
        advice="gamma, below 1/L",
        family="games",
    ),
}
"""For min-max problems: not sharpness-aware, and on the same floors."""

CAPTION = (
    "Gradients: batch gradients per step on average, with n the examples in a batch; f: forward passes besides. "
    "Memory: tensors of the size of the weights that are held while the model runs, more than in plain training, on "
    "one device; state is the part of them that is kept between steps. What climbs takes ascent=NegLog() or Tanh(), "
    "and any perturbation."
)


def markdown() -> str:
    """The page of methods for the docs."""
    head = [
        "# Methods",
        "",
        "Made by `bisam methods --to docs/methods.md`; a test counts what the table claims.",
        "",
        CAPTION,
    ]
    return "\n".join([*head, "", *_table(METHODS), "", "## Min-max problems", "", *_table(GAMES), ""])


def _table(entries: dict[str, Entry]) -> list[str]:
    header = ("method", "expression", "what", "source", "gradients", "memory", "state", "set rho to")
    rows = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for e in entries.values():
        source = f"[{e.reference}]({e.url})" if e.url else e.reference
        cells = (e.name, f"`{e.written()}`", e.what, source, e.cost, f"{e.memory:g}", e.state or "–", e.advice or "–")
        rows.append(f"| {' | '.join(cells)} |")
    return rows
