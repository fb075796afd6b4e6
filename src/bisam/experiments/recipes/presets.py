"""Presets: the papers' settings, as recipes to start from, and which of their values no public source gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bisam.experiments.errors import unknown
from bisam.experiments.recipes.assumptions import Assumption, Kind
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.recipe import Recipe

CIFAR = Recipe(
    dataset="cifar10",
    model="resnet56",
    method="bisam_log",
    rho=0.05,
    epochs=200,
    batch_size=128,
    learning_rate=0.1,
    momentum=0.9,
    weight_decay=5e-4,
    label_smoothing=0.1,
)
"""CIFAR as in Xie et al. (2024), section 4.1; the numbers are the defaults of their code."""

AUTHORS = replace(CIFAR, cutout=True)
"""CIFAR as in the BiSAM authors' code: the paper's settings and Cutout."""

IMAGENET = Recipe(
    dataset="imagenet",
    model="torchvision:resnet50",
    method="MSAM(128, BiSAM(0.05, NegLog(5.0)))",
    epochs=90,
    batch_size=512,
    learning_rate=0.2,
    momentum=0.9,
    weight_decay=5e-4,
    label_smoothing=0.1,
)
"""ImageNet-1K as in Xie et al. (2024), table 3."""

VIT = Recipe(
    dataset="flowers",
    model="timm:vit_base_patch16_224.orig_in21k",
    weights="pretrained",
    method="bisam_log",
    rho=0.05,
    steps=500,
    batch_size=128,
    optimizer="adamw",
    learning_rate=1e-4,
    weight_decay=0.0,
    schedule="linear",
    warmup=100,
    clip=1.0,
)
"""Fine-tuning ViT-B/16 as in Xie et al. (2024), table 6."""

BERT = Recipe(
    dataset="glue:rte",
    model="hf:bert-base-uncased",
    weights="pretrained",
    method="bisam_log",
    rho=0.05,
    epochs=3,
    batch_size=32,
    optimizer="adamw",
    learning_rate=2e-5,
    weight_decay=0.0,
    schedule="linear",
    clip=1.0,
)
"""Fine-tuning BERT-base on GLUE as in Xie et al. (2024), table 7."""

PRESETS = {"paper": CIFAR, "authors": AUTHORS, "imagenet": IMAGENET, "vit": VIT, "bert": BERT}
"""Presets by their names on the command line."""

_OF_CIFAR = "the value of the authors' code for CIFAR; the paper's for this table is not public"

ASSUMED: dict[str, tuple[Assumption, ...]] = {
    "imagenet": (
        Assumption("epochs", 90, Kind.RECOLLECTED, "the authors' reply to reviewers has 90 too"),
        Assumption("learning_rate", 0.2, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("batch_size", 512, Kind.RECOLLECTED, "the authors' reply to reviewers has 512 too"),
        Assumption("micro-batch", 128, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("rho", 0.05, Kind.RECOLLECTED, "the paper's value for this table is not public"),
        Assumption("mu", 5.0, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("mu", 20.0, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("alpha", 0.1, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("model", "torchvision:resnet50", Kind.CHOSEN, "the network of the authors' reply to reviewers"),
        Assumption("validation part", "2 % of the training images", Kind.CHOSEN, "the paper's is not public"),
    ),
    "vit": (
        Assumption("learning_rate", 1e-4, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("batch_size", 128, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("steps", 500, Kind.RECOLLECTED, "the paper's number of steps is not public"),
        Assumption("warmup", 100, Kind.RECOLLECTED, "the paper's number of steps is not public"),
        Assumption("rho", 0.05, Kind.CHOSEN, _OF_CIFAR),
    ),
    "bert": (
        Assumption("learning_rate", 2e-5, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("batch_size", 32, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("epochs", 3, Kind.RECOLLECTED, "the paper's value is not public"),
        Assumption("rho", 0.05, Kind.RECOLLECTED, "the paper's value for most tasks is not public"),
        Assumption("weight_decay", 0.0, Kind.CHOSEN, "the paper's value is not public"),
        Assumption("warmup", 0, Kind.CHOSEN, "the paper names no warm-up"),
        Assumption("validation part", "a tenth of the training part", Kind.CHOSEN, "the paper's is not public"),
    ),
}
"""For each preset its values that no public source of the paper gives."""


def preset(name: str) -> Recipe:
    """The recipe of a preset.

    Raises:
        ValueError: the preset is unknown.
    """
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]


def started(base: Recipe, given: Mapping[str, Any]) -> Recipe:
    """A recipe with other values of some fields.

    Args:
        base: the recipe to start from.
        given: fields and their values. A method here comes with its own settings: where they have no values here, rho,
            mu, alpha and eta are its defaults and not those of `base`. Epochs here replace steps of `base`, and steps
            its epochs.

    Raises:
        ValueError: a value is refused.
    """
    unset: dict[str, Any] = dict.fromkeys(SETTINGS) if "method" in given else {}
    if given.keys() & {"epochs", "steps"}:
        unset |= dict.fromkeys(("epochs", "steps"))
    return replace(base, **{**unset, **given})
