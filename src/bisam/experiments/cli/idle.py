"""Idle flags: which flags have an effect only with some data sets, optimizers or devices, and their refusal.

    bisam train --dataset digits --cutout
    bisam: without effect, leave out: --cutout (needs dataset cifar10 or cifar100, got digits)

It concerns flags that were given on the command line and `--set`, never recipes from folders, presets or studies.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bisam.experiments.cli.options import flag

if TYPE_CHECKING:
    from bisam.experiments.recipes.recipe import Recipe
    from bisam.experiments.runs.machine import Machine


@dataclass(frozen=True)
class Condition:
    """When a flag has an effect."""

    holds: Callable[[Recipe, Machine], bool]
    needs: str
    got: Callable[[Recipe, Machine], str]


KINDS = {"digits", "cifar10", "cifar100", "imagenet", "flowers", "pets", "folder", "glue", "text"}


def _with_dataset(needs: str, *kinds: str) -> Condition:
    """A condition on the kind of the data set. Unknown data sets pass: loading them says what is wrong."""
    return Condition(
        lambda recipe, _: (kind := recipe.dataset.partition(":")[0]) in kinds or kind not in KINDS,
        needs,
        lambda recipe, _: recipe.dataset,
    )


_CIFAR = _with_dataset("dataset cifar10 or cifar100", "cifar10", "cifar100")
_FILES = _with_dataset("dataset imagenet, flowers, pets or folder:PATH", "imagenet", "flowers", "pets", "folder")
_IMAGES = KINDS - {"glue", "text"}
_TEXTS = _with_dataset("dataset glue:TASK", "glue")


def _is_in_data_dir(recipe: Recipe) -> bool:
    """Whether its data, its model or its weights may be in the folder of the data sets."""
    kind, _, detail = recipe.dataset.partition(":")
    paths = [detail] if kind == "folder" else []
    paths += [recipe.weights or ""] if recipe.weights != "pretrained" else []
    paths += [recipe.model.removeprefix("hf:")] if recipe.model.startswith("hf:") else []
    return (recipe.needs_files and kind != "folder") or any(path and not _is_here(path) for path in paths)


def _is_here(path: str) -> bool:
    """Whether a path does not need the folder of the data sets; weights may be followed by a choice and a checksum."""
    alone = re.sub(r"(:[a-z]+)?(@[0-9a-f]{16})?$", "", path)
    return any(Path(one).expanduser().is_absolute() or Path(one).exists() for one in (path, alone))


CONDITIONS: dict[str, Condition] = {
    "validation_noise": Condition(lambda r, _: r.noise > 0, "noise above 0", lambda r, _: f"{r.noise:g}"),
    "augment": _CIFAR,
    "cutout": _CIFAR,
    "randaugment": _with_dataset(
        "dataset cifar10, cifar100, imagenet, flowers, pets or folder:PATH", *(_IMAGES - {"digits"})
    ),
    **dict.fromkeys(("erasing", "mixup", "cutmix", "channels_last"), _with_dataset("a dataset of images", *_IMAGES)),
    "image_size": _FILES,
    "max_length": Condition(
        lambda r, machine: r.dataset == "text:pydoc" or (r.dataset != "text:addition" and _TEXTS.holds(r, machine)),
        "dataset glue:TASK or text:pydoc",
        lambda r, _: r.dataset,
    ),
    "bucket": _TEXTS,
    "held_out": _with_dataset("dataset imagenet, pets, folder:PATH or glue:TASK", "imagenet", "pets", "folder", "glue"),
    "frozen": Condition(
        lambda r, _: r.model.partition(":")[0] in ("hf", "timm"), "model hf:NAME or timm:NAME", lambda r, _: r.model
    ),
    "patience": Condition(
        lambda r, _: r.patience is not None and (r.epochs is None or r.patience < r.epochs),
        "patience below the epochs",
        lambda r, _: f"{r.patience} of {r.epochs}",
    ),
    "measured": Condition(lambda r, _: r.measured_epochs > 0, "measured_epochs above 0", lambda *_: "0"),
    "cooldown": Condition(lambda r, _: r.schedule == "wsd", "schedule wsd", lambda r, _: r.schedule),
    "update_bn": Condition(
        lambda r, _: r.ema is not None or r.base_optimizer.averages,
        "ema, or a schedule-free optimizer",
        lambda r, _: r.optimizer,
    ),
    "compile_mode": Condition(lambda r, _: r.compile, "compile", lambda *_: "no compile"),
    "momentum": Condition(
        lambda r, _: r.base_optimizer.takes("momentum"), "an optimizer with momentum", lambda r, _: r.optimizer
    ),
    "weight_decay": Condition(
        lambda r, _: r.base_optimizer.takes("weight_decay"), "an optimizer with weight decay", lambda r, _: r.optimizer
    ),
    "strategy": Condition(
        lambda _, machine: machine.strategy != "ddp" or machine.parallel, "several --devices", lambda *_: "1"
    ),
    "data_dir": Condition(
        lambda recipe, _: _is_in_data_dir(recipe), "a dataset or weights in that folder", lambda r, _: r.dataset
    ),
    "download": _with_dataset(
        "dataset cifar10, cifar100, flowers, pets or glue:TASK", "cifar10", "cifar100", "flowers", "pets", "glue"
    ),
    "loaders": _FILES,
}
"""Fields of `Recipe` and `Machine` that do not always have an effect. `Recipe` itself refuses rho, mu, alpha and eta
that its method does not have, and a warm-up with the cosine schedule."""


def refuse_idle(
    recipes: Sequence[Recipe],
    machine: Machine,
    given: frozenset[str],
    changed: frozenset[str] = frozenset(),
    searched: frozenset[str] = frozenset(),
) -> None:
    """Refuse flags that have an effect on none of `recipes`.

    Args:
        recipes: what is to be run.
        machine: where it is to be run.
        given: names of flags on the command line.
        changed: names of fields that `--set` changes.
        searched: names of fields that `--search` varies.

    Raises:
        ValueError: there are such flags; it names each and what it needs.
    """
    idle: list[str] = []
    for name, condition in CONDITIONS.items():
        if name in given | changed | searched and not any(condition.holds(recipe, machine) for recipe in recipes):
            got = ", ".join(dict.fromkeys(condition.got(recipe, machine) for recipe in recipes))
            typed = f"--set {name}" if name in changed else f"--search {name}" if name in searched else flag(name)
            idle.append(f"{typed} (needs {condition.needs}, got {got})")
    if idle:
        raise ValueError(f"without effect, leave out: {', '.join(idle)}")
