"""Recipe: everything that decides the outcome of a training run, as one value.

The command line's flags are its fields, a run folder's `recipe.json` is its text, and the folder's name ends in its
fingerprint: the three cannot drift apart.

    recipe = Recipe(method="bisam_log", noise=0.4, seed=1)
    recipe.slug          # "bisam_log-noise-0.4-1f0c22e9"
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal, get_args

from cyclopts import Parameter, Token

from bisam import ASAM, ERM, SAM, ABiSAM, BiSAM, NegLog, Tanh
from bisam.arguments import non_negative, positive
from bisam.methods import Method
from bisam.perturbations import L2

MethodName = Literal["sgd", "sam", "bisam_log", "bisam_tanh", "asam", "abisam_log", "abisam_tanh"]

DEFAULT_RHO: dict[str, float] = {"asam": 2.0, "abisam_log": 2.0, "abisam_tanh": 2.0}
"""Where it is not SAM's 0.05: the adaptive neighbourhood, here of all parameters, is in units of the weights."""


def whole(type_: Any, tokens: Sequence[Token]) -> int:
    """A flag's value as a whole number; the command line would else round 1.5 to 2.

    Raises:
        ValueError: it is none.
    """
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"{tokens[0].value!r} is not a whole number") from None


Whole = Annotated[int, Parameter(converter=whole)]


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Raises:
        TypeError: a field that is a number is given something else.
        ValueError: a field is outside its range.
    """

    dataset: str = "digits"
    """Data set: digits (scikit-learn's 1,797 images, no download)."""
    model: str = "convnet"
    """Network: convnet (three Conv-BN layers, for 8x8 images)."""
    method: Annotated[MethodName, Parameter(alias="--optim")] = "bisam_log"
    """How the gradient is computed."""
    noise: float = 0.0
    """Share of the training labels that are replaced by another class, in [0, 1)."""
    rho: float | None = None
    """Radius of the neighbourhood; by default 0.05, or 2 for the adaptive methods."""
    mu: float | None = None
    """Sharpness of BiSAM's soft maximum; by default 1 for -log and 10 for tanh."""
    alpha: float | None = None
    """Slope of the tanh bound; by default 0.1."""
    eta: float = 0.0
    """Added to |w| in the adaptive methods."""
    epochs: Whole = 30
    """Passes over the training data (the digits study gives SGD twice as many)."""
    batch_size: Whole = 64
    """Examples per step."""
    learning_rate: Annotated[float, Parameter(alias="--lr")] = 0.1
    """Initial learning rate; it follows a cosine to 0, epoch by epoch."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Weight decay on all parameters."""
    label_smoothing: float = 0.0
    """Smoothing of the descent loss, spread over the wrong classes as in the BiSAM authors' code."""
    seed: Whole = 0
    """Seed of the initial weights, the label noise and the order of the batches."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("noise", "momentum", "label_smoothing"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        ranges = {non_negative: ("rho", "eta", "weight_decay"), positive: ("learning_rate", "mu", "alpha")}
        for check, names in ranges.items():
            for name in names:
                if (value := getattr(self, name)) is not None:
                    check(name, value)
        _require(self.seed >= 0, "seed", self.seed, "non-negative")
        names = get_args(MethodName)
        _require(self.method in names, "method", self.method, f"one of {', '.join(names)}")

    def build_method(self) -> Method:
        """The library's method that the fields describe."""
        rho = DEFAULT_RHO.get(self.method, 0.05) if self.rho is None else self.rho
        log = NegLog(1.0 if self.mu is None else self.mu)
        tanh = Tanh(10.0 if self.mu is None else self.mu, 0.1 if self.alpha is None else self.alpha)
        methods: dict[str, Method] = {
            "sgd": ERM(),
            "sam": SAM(L2(rho)),
            "bisam_log": BiSAM(rho, log),
            "bisam_tanh": BiSAM(rho, tanh),
            "asam": ASAM(rho, self.eta),
            "abisam_log": ABiSAM(rho, log, self.eta),
            "abisam_tanh": ABiSAM(rho, tanh, self.eta),
        }
        return methods[self.method]

    @property
    def slug(self) -> str:
        """Name of the recipe's folder: what people look for, then a fingerprint of everything but the seed."""
        text = json.dumps(asdict(replace(self, seed=0)), sort_keys=True)
        return f"{self.method}-noise-{self.noise:g}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """Fields and values, for `recipe.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` was called on.

        Raises:
            ValueError: a field is unknown or missing.
        """
        known = {f.name for f in fields(cls)}
        unknown, missing = sorted(set(values) - known), sorted(known - set(values))
        if unknown or missing:
            wrong = [
                f"{what} {', '.join(names)}" for what, names in (("unknown", unknown), ("missing", missing)) if names
            ]
            raise ValueError(f"{'; '.join(wrong)}: not a recipe, or one of another version")
        return cls(**values)


def unknown(kind: str, name: str, known: Iterable[str]) -> ValueError:
    """The error for a name that is none of `known`, with the nearest of them."""
    names = list(known)
    near = get_close_matches(name, names, 1)
    hint = f", did you mean {near[0]!r}?" if near else "."
    return ValueError(f"unknown {kind} {name!r}{hint} There is: {', '.join(names)}")


def _require(fits: bool, name: str, value: object, range_: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {range_}, got {value!r}")
