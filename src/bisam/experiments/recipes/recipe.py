"""Recipe: everything that decides the outcome of a training run, as one value.

The command line's flags are its fields, a run folder's `recipe.json` is its text, and the folder's name ends in its
fingerprint: the three cannot drift apart.

    recipe = Recipe(method="bisam_log", noise=0.4, seed=1)
    recipe.slug          # "bisam_log-noise-0.4-1f0c22e9"
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Annotated, Any

from cyclopts import Parameter, Token

from bisam.experiments.errors import unknown
from bisam.experiments.recipes.catalogue import METHODS
from bisam.experiments.recipes.expressions import VOCABULARY, build, check
from bisam.methods import Method
from bisam.validation import non_negative, positive


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

CHOICES = {
    "optimizer": ("sgd", "adamw"),
    "schedule": ("cosine", "linear", "constant"),
    "precision": ("32", "bf16", "16", "64"),
}
"""The values of the fields that take one of a few."""


@dataclass(frozen=True)
class Recipe:
    """One training run.

    Raises:
        TypeError: a field that is a number is given something else.
        ValueError: a field is outside its range.
    """

    dataset: str = "digits"
    """Data set: digits (no download), cifar10, cifar100, imagenet, flowers, pets, folder:PATH, glue:TASK."""
    model: str = "convnet"
    """Network: a name from `bisam list`, torchvision:NAME, timm:NAME or hf:NAME."""
    weights: str | None = None
    """Where the model starts: "pretrained", a file of weights, or by default anew."""
    method: Annotated[str, Parameter(alias="--optim")] = "bisam_log"
    """How the gradient is computed: a name from `bisam methods`, or an expression such as "KSAM(32, BiSAM(0.1))"."""
    noise: float = 0.0
    """Share of the training labels that are replaced by another class, in [0, 1)."""
    limit: Whole | None = None
    """At most so many training examples, and as many validation and test examples."""
    augment: bool = True
    """Random crops and flips of the training images (digits have none)."""
    cutout: bool = False
    """With the augmentation, blank a square of 16 pixels in half of the images (CIFAR), as the BiSAM authors do."""
    image_size: Whole = 224
    """Side of the images that are read from files, in pixels."""
    max_length: Whole = 128
    """Tokens of a text; longer ones are cut."""
    rho: float | None = None
    """Radius of the neighbourhood; its default depends on the method, see `bisam methods`."""
    mu: float | None = None
    """Sharpness of BiSAM's soft maximum; by default 1 for -log and 10 for tanh."""
    alpha: float | None = None
    """Slope of the tanh bound; by default 0.1."""
    eta: float | None = None
    """Added to |w| in the adaptive methods; by default 0."""
    epochs: Whole = 30
    """Passes over the training data (the digits study gives SGD twice as many)."""
    batch_size: Whole = 64
    """Examples per step."""
    accumulate: Whole = 1
    """Losses that are averaged for one step of the optimizer; each is of `batch_size` examples."""
    optimizer: str = "sgd"
    """Base optimizer: sgd or adamw."""
    learning_rate: Annotated[float, Parameter(alias="--lr")] = 0.1
    """Highest learning rate."""
    schedule: str = "cosine"
    """How the learning rate falls to 0: cosine (epoch by epoch), linear (step by step); or constant."""
    warmup: Whole = 0
    """Optimizer steps in which the learning rate rises evenly to its highest (linear and constant schedules)."""
    momentum: float = 0.9
    """Momentum of SGD; AdamW has its own."""
    weight_decay: float = 5e-4
    """Weight decay on all parameters."""
    label_smoothing: float = 0.0
    """Smoothing of the descent loss, spread over the wrong classes as in the BiSAM authors' code."""
    clip: float | None = None
    """Largest norm of the gradient of all parameters; by default it is not clipped."""
    ema: float | None = None
    """Decay of an average of the weights that is tested too, in (0, 1); by default there is none."""
    precision: str = "32"
    """Precision of the model's arithmetic: 32, bf16 or 16 (autocast; the weights stay float32), or 64."""
    channels_last: bool = False
    """Lay images out with the channels last, which most devices prefer for convolutions."""
    compile: bool = False
    """Compile the model."""
    seed: Whole = 0
    """Seed of the initial weights, the label noise and the order of the batches."""

    def __post_init__(self) -> None:
        for field in fields(self):  # 1 and 1.0 are one value, and must have one name
            if "float" in str(field.type) and type(value := getattr(self, field.name)) is int:
                object.__setattr__(self, field.name, float(value))
        for name in ("epochs", "batch_size", "accumulate", "image_size", "max_length"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        _require(self.limit is None or self.limit >= 1, "limit", self.limit, "at least 1")
        _require(self.warmup >= 0, "warmup", self.warmup, "non-negative")
        _require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2^32)")
        for name in ("noise", "momentum", "label_smoothing"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "between 0 and 1")
        ranges = {non_negative: ("rho", "eta", "weight_decay"), positive: ("learning_rate", "mu", "alpha", "clip")}
        for in_range, names in ranges.items():
            for name in names:
                if (value := getattr(self, name)) is not None:
                    in_range(name, value)
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        if self.warmup and self.schedule == "cosine":
            raise ValueError(f"warmup {self.warmup} needs the linear or constant schedule: the cosine has none")
        if self.cutout and not self.augment:
            raise ValueError("cutout is a part of the augmentation: leave --no-augment out, or --cutout")
        self._check_method()

    def _check_method(self) -> None:
        if "(" in self.method:
            check(self.method, self.batch_size)
        elif self.method in VOCABULARY:
            raise ValueError(f"method {self.method!r} is no expression: write a call, such as {self.method}()")
        elif self.method not in METHODS:
            raise unknown("method", self.method, METHODS)
        takes = self.settings
        given = {name for name in ("rho", "eta", "mu", "alpha") if getattr(self, name) is not None}
        if idle := sorted(given - takes):
            has = f"it takes {', '.join(sorted(takes))}" if takes else "it has none"
            has = "what it takes is written inside" if "(" in self.method else has
            raise ValueError(f"{idle[0]} is no setting of the method {self.method}: {has}")

    @property
    def settings(self) -> set[str]:
        """The fields among rho, mu, alpha and eta that its method has; an expression has its values inside."""
        return METHODS[self.method].settings if self.method in METHODS else set()

    @property
    def expression(self) -> str:
        """The method as an expression of the library."""
        if self.method not in METHODS:
            return self.method
        return METHODS[self.method].written(rho=self.rho, eta=self.eta, mu=self.mu, alpha=self.alpha)

    def build_method(self, **names: Any) -> Method:
        """The library's method that the fields describe.

        Args:
            **names: what its expression may speak of: `optimizer`, `steps` of the run, steps of an `epoch`, training
                `examples`.

        Raises:
            ValueError: the expression does not describe one.
        """
        return build(self.expression, **names)

    @property
    def slug(self) -> str:
        """Name of the recipe's folder: what people look for, then a fingerprint of everything but the seed."""
        # Of the fields with their defaults, so that a field that is added later changes no name.
        changed = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) != f.default}
        text = json.dumps({**changed, "seed": 0}, sort_keys=True)
        parts = [self.dataset, self.model, self.method]
        if self.dataset == "digits" and self.model == "convnet":
            parts = parts[2:]
        name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.")[-60:] for part in parts)
        return f"{name}-noise-{self.noise:g}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """Fields and values, for `recipe.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe that `to_dict` was called on; fields that a later version added have their defaults.

        Raises:
            ValueError: a field is unknown, or there is no method.
        """
        if "method" not in values:
            raise ValueError("it names no method: not a recipe")
        if foreign := sorted(set(values) - {f.name for f in fields(cls)}):
            raise ValueError(f"unknown field {', '.join(foreign)}: not a recipe, or one of a later version")
        return cls(**values)


def _require(fits: bool, name: str, value: object, range_: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {range_}, got {value!r}")
