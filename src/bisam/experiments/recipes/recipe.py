"""Recipe: everything that decides the outcome of a training run, as one value.

The flags of `bisam train` are derived from its fields, the file `recipe.json` of a run folder holds it as text, and the
folder's name ends in its fingerprint.

    recipe = Recipe(method="bisam_log", noise=0.4, seed=1)
    recipe.slug          # "bisam_log-noise-0.4-1f0c22e9"
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from typing import Any, get_args, get_type_hints

import torch

from bisam.experiments.errors import RunError, unknown
from bisam.experiments.recipes import base_optimizers, versions
from bisam.experiments.recipes.base_optimizers import BaseOptimizer
from bisam.experiments.recipes.catalogue import METHODS, PLAIN
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.expressions import VOCABULARY, build, check, check_step, contained, names_called
from bisam.experiments.recipes.fields import Fields
from bisam.methods import Method
from bisam.validation import LARGEST, non_negative, number, positive, shown, whole

EPOCHS = 30
"""Epochs of a recipe that is given neither epochs nor steps."""

CHOICES = {
    "schedule": ("cosine", "linear", "constant", "wsd"),
    "compile_mode": ("default", "max-autotune-no-cudagraphs"),
    "precision": ("32", "bf16", "16", "64"),
    "measured": ("ball", "ascents"),
}
"""Allowed values of the fields that take one of a few."""

_MOST = {
    "epochs": 10**6,
    "steps": 10**9,
    "batch_size": 10**6,
    "accumulate": 10**6,
    "image_size": 10**5,
    "max_length": 10**6,
    "bucket": 10**6,
    "frozen": 10**6,
    "limit": LARGEST,
    "train_examples": LARGEST,
    "warmup": LARGEST,
    "patience": 10**6,
    "measured_epochs": 10**6,
    "randaugment": 30,
}
"""Largest values of whole numbers, beyond any training run: a typing error would fill the memory without a message."""
_COLUMNS = {"epochs": "epoch", "steps": "step"}
_WORDS = {str: "text", bool: "true or false", int: "a whole number", float: "a number"}


@dataclass(frozen=True)
class Recipe(Fields):
    """One training run. Making one checks its fields and computes nothing; `check_trainable` tries its method.

    Raises:
        TypeError: a field is given another type than its own.
        ValueError: a field is outside its range, or the method is not valid.
        RunError: the version is later than this bisam knows.
    """

    def __post_init__(self) -> None:
        self._check_types()
        _require(self.version >= 1, "version", self.version, "at least 1")
        if self.version > versions.VERSION:
            raise RunError(
                f"the recipe has version {self.version}, and this bisam knows versions up to {versions.VERSION}: use "
                "the bisam that wrote it, or a later one"
            )
        if self.epochs is not None and self.steps is not None:
            raise both_given(self.epochs, self.steps)
        if self.epochs is None and self.steps is None:
            object.__setattr__(self, "epochs", EPOCHS)
        for name, most in _MOST.items():
            if (value := getattr(self, name)) is not None:
                whole(name, value, 0 if name in ("warmup", "measured_epochs", "frozen", "randaugment") else 1, most)
        _require(0 <= self.seed < 2**32, "seed", self.seed, "in [0, 2^32)")
        for name in ("noise", "momentum", "label_smoothing"):
            _require(0 <= getattr(self, name) < 1, name, getattr(self, name), "in [0, 1)")
        _require(self.held_out is None or 0 <= self.held_out < 1, "held_out", self.held_out, "in [0, 1)")
        if self.frozen is not None and self.weights is None:
            raise ValueError(f"frozen {self.frozen} keeps layers at random weights: give --weights, or leave it out")
        _require(1 <= self.imbalance <= 1e6, "imbalance", self.imbalance, "from 1 to 1000000")
        _require(0 < self.cooldown <= 1, "cooldown", self.cooldown, "above 0 and at most 1")
        _require(self.ema is None or 0 < self.ema < 1, "ema", self.ema, "between 0 and 1")
        _require(0 <= self.erasing <= 1, "erasing", self.erasing, "in [0, 1]")
        ranges = {
            non_negative: ("rho", "eta", "weight_decay", "mixup", "cutmix"),
            positive: ("learning_rate", "mu", "alpha", "clip"),
        }
        for in_range, names in ranges.items():
            for name in names:
                if (value := getattr(self, name)) is not None:
                    in_range(name, value)
                    _require(value <= _LARGEST, name, value, f"at most {_LARGEST:.2g}, the largest number of float32")
        for name, known in CHOICES.items():
            if getattr(self, name) not in known:
                raise unknown(name, str(getattr(self, name)), known)
        self._check_optimizer()
        if self.warmup and self.schedule == "cosine":
            raise ValueError(f"warmup {self.warmup} needs the linear, constant or wsd schedule: the cosine has none")
        if self.steps is not None:
            self.check_warmup(self.steps)
        if self.cutout and not self.augment:
            raise ValueError("cutout is a part of the augmentation: leave --no-augment out, or --cutout")
        self._check_method()
        numbered = sorted(name for name in names_called(self.expression) if getattr(VOCABULARY[name], "indexed", False))
        if self.update_bn and self.frozen is not None:
            raise ValueError(
                "update_bn would change the statistics of frozen layers, which are not trained: leave it out, or frozen"
            )
        if self.is_mixed and numbered:
            raise ValueError(
                f"{numbered[0]} compares the outputs for an example with earlier ones, and mixup and cutmix mix "
                "examples: leave them out"
            )
        object.__setattr__(self, "version", versions.latest_alike(self.version, names_called(self.expression)))

    def _check_types(self) -> None:
        """Check the type of each field, and convert whole numbers to floats where a field is one.

        1 and 1.0 are equal, and must have the same fingerprint.
        """
        for name, kinds in _kinds().items():
            value = getattr(self, name)
            if type(value) is int and float in kinds:
                number(name, value)
                object.__setattr__(self, name, float(value))
            elif type(value) not in kinds:
                raise TypeError(f"{name} must be {_WORDS[kinds[0]]}, got {shown(value)}")
            elif isinstance(value, str) and any("\ud800" <= letter <= "\udfff" for letter in value):
                raise ValueError(f"{name} must be text that UTF-8 can encode, got {shown(value)}")

    def _check_optimizer(self) -> None:
        base = base_optimizers.parsed(self.optimizer)
        if base.averages and self.schedule != "constant":
            raise ValueError(
                f"optimizer {self.optimizer!r} replaces a schedule of the learning rate: give the constant schedule, "
                f"got {self.schedule!r}"
            )
        object.__setattr__(self, "optimizer", str(base))
        if base.package == "torch" and base.arguments:
            self._check_arguments(base)

    def _check_arguments(self, base: BaseOptimizer) -> None:
        weights = [torch.zeros(1, 1)]
        base.build(weights, self.learning_rate, weight_decay=self.weight_decay, momentum=self.momentum)

    def _check_method(self) -> None:
        if "(" in self.method:
            check(self.method)
        elif self.method in VOCABULARY:
            raise ValueError(f"method {self.method!r} is no expression: write a call, such as {self.method}()")
        elif self.method not in METHODS:
            raise unknown("method", self.method, METHODS, "bisam list")
        takes = self.settings
        given = {name for name in SETTINGS if getattr(self, name) is not None}
        if idle := sorted(given - takes):
            has = f"it takes {', '.join(sorted(takes))}" if takes else "it has none"
            has = "what it takes is written inside" if "(" in self.method else has
            raise ValueError(f"{idle[0]} is no setting of the method {self.method}: {has}")

    def check_trainable(self) -> None:
        """Check before a run that the method can take a step on a batch of this size, by one step on a small model.

        An optimizer of another package than torch is created, which imports the package.

        Raises:
            ValueError: the step fails, or there is no such optimizer; the message gives the reason.
            RunError: the recipe has an earlier version, whose results the present code does not reproduce.
        """
        self.check_version()
        base = self.base_optimizer
        if base.package != "torch":
            self._check_arguments(base)
        if self.method not in METHODS or self.is_mixed:
            check_step(self.expression, self.batch_size, self.is_mixed)

    def check_version(self) -> None:
        """Check that the present code gives its results, and its split of the data.

        Raises:
            RunError: it has an earlier version.
        """
        if self.version != versions.VERSION:
            since = versions.changed_since(self.version, names_called(self.expression))
            raise RunError(
                f"the recipe has version {self.version}, and this bisam trains version {versions.VERSION} ({since}): "
                "start a new run, or use the bisam that wrote it"
            )

    def check_warmup(self, steps: int) -> None:
        """Check that the warm-up ends within a run of `steps` optimizer steps, and before a decay at its end begins.

        Raises:
            ValueError: it does not.
        """
        if self.warmup >= steps:
            raise ValueError(f"warmup {self.warmup} does not end within the {steps} steps of the run: make it shorter")
        if self.schedule == "wsd" and self.warmup + self.decay_steps(steps) > steps:
            raise ValueError(
                f"warmup {self.warmup} does not end before the cooldown, the last {self.decay_steps(steps)} of the "
                f"{steps} steps of the run: make one of them shorter"
            )

    def decay_steps(self, steps: int) -> int:
        """The optimizer steps of the decay at the end of a run of `steps` (wsd schedule), at least 1."""
        return max(1, round(self.cooldown * steps))

    @property
    def base_optimizer(self) -> BaseOptimizer:
        """The optimizer that takes the steps."""
        return base_optimizers.parsed(self.optimizer)

    @property
    def unit(self) -> str:
        """The unit of its length: epochs or steps."""
        return "epochs" if self.steps is None else "steps"

    @property
    def length(self) -> int:
        """The number of its epochs or steps."""
        length = self.epochs if self.steps is None else self.steps
        assert length is not None
        return length

    def times(self, count: int) -> Recipe:
        """The recipe with `count` times its length."""
        return replace(self, **{self.unit: count * self.length})

    def completed(self, row: Mapping[str, float]) -> int:
        """The number of its epochs or steps that are completed after the epoch with this row of metrics."""
        return int(row[_COLUMNS[self.unit]])

    def is_measured(self, epoch: int, epochs: int) -> bool:
        """Whether an epoch, numbered from 1, of the `epochs` of a run is one of its `measured_epochs`."""
        return epoch * self.measured_epochs // epochs > (epoch - 1) * self.measured_epochs // epochs

    @property
    def needs_files(self) -> bool:
        """Whether its data set is read from files: digits comes with scikit-learn, and texts come with Python."""
        return self.dataset.partition(":")[0] not in ("digits", "text")

    @property
    def is_mixed(self) -> bool:
        """Whether its batches are mixtures, whose labels are class probabilities."""
        return self.mixup > 0 or self.cutmix > 0

    @property
    def is_plain(self) -> bool:
        """Whether it is plain training, which perturbs nothing."""
        return self.method == PLAIN

    @property
    def settings(self) -> set[str]:
        """The fields among rho, mu, alpha and eta that its method takes; an expression contains its own values."""
        return METHODS[self.method].settings if self.method in METHODS else set()

    def setting(self, name: str) -> Any:
        """Value of a field; for rho, mu, alpha and eta that are not given the method's default, or None without one.

        If the method is an expression, they are the values that it contains, see `expressions.contained`.
        """
        value = getattr(self, name)
        if value is not None or name not in SETTINGS:
            return value
        if self.method not in METHODS:
            return contained(self.method).get(name)
        return METHODS[self.method].defaults.get(name)

    @property
    def own_fields(self) -> tuple[str, ...]:
        """Fields that come with its method: it is compared with recipes that differ in them."""
        return METHODS[self.method].own_fields if self.method in METHODS else ()

    @property
    def tuned(self) -> tuple[str, ...]:
        """Fields that are chosen for its method as a radius is: it is compared with recipes that differ in them."""
        return METHODS[self.method].tuned if self.method in METHODS else ()

    @property
    def expression(self) -> str:
        """The method as an expression of the library."""
        if self.method not in METHODS:
            return self.method
        return METHODS[self.method].written(**{name: getattr(self, name) for name in SETTINGS})

    def build_method(self, **names: Any) -> Method:
        """The library's method that the fields describe.

        Args:
            **names: values that its expression may use: `optimizer`, `steps` of the run, steps of an `epoch`, number
                of training `examples`.

        Raises:
            ValueError: the expression describes no method.
        """
        return build(self.expression, **names)

    @property
    def slug(self) -> str:
        """Name of the recipe's folder: its main fields, then a fingerprint of all fields but the seed."""
        # Fields with their default are left out, so that a field that is added later changes no name. In place of the
        # version is the one that changed the results last, for the same reason.
        values = self.to_dict() | {"version": versions.changed_in(self.version, names_called(self.expression))}
        defaults = {field.name: field.default for field in fields(self)} | {"epochs": EPOCHS, "version": 1}
        changed = {name: value for name, value in values.items() if value != defaults[name]}
        text = json.dumps({**changed, "seed": 0}, sort_keys=True)
        parts = [self.dataset, self.model, self.method]
        if self.dataset == "digits" and self.model == "convnet":
            parts = parts[2:]
        name = "-".join(re.sub(r"[^A-Za-z0-9_.]+", "-", part).strip("-.")[-60:] for part in parts)
        return f"{name}-noise-{self.noise:g}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"

    def to_dict(self) -> dict[str, Any]:
        """Names and values of the fields, for `recipe.json`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """The recipe whose `to_dict` is `values`; fields that were added since have their defaults.

        The recipe has the latest version that gives the results of the one that it was made with; text without a
        version has version 1.

        Raises:
            ValueError: a field is unknown, or there is no method.
            RunError: the version is later than this bisam knows.
        """
        if "method" not in values:
            raise ValueError("it names no method: not a recipe")
        values = {"version": 1, **values}
        if isinstance(values["version"], int) and values["version"] > versions.VERSION:
            return cls(version=values["version"])  # refused there; its other fields may be unknown here
        if foreign := sorted(set(values) - {f.name for f in fields(cls)}):
            raise ValueError(f"unknown field {', '.join(foreign)}: not a recipe, or one of a later version")
        return cls(**values)


def both_given(epochs: int, steps: int) -> ValueError:
    """The error for a length that is given twice."""
    return ValueError(f"epochs {epochs} and steps {steps} are both given: leave one out")


_LARGEST = 3.4028234663852886e38


@cache
def _kinds() -> dict[str, tuple[type, ...]]:
    """The types of each field."""
    return {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Recipe).items()}


def _require(fits: bool, name: str, value: object, range_: str) -> None:
    if not fits:
        raise ValueError(f"{name} must be {range_}, got {shown(value)}")
