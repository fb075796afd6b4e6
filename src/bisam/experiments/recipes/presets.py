"""Presets: the papers' settings, as recipes to start from.

Values that the papers do not give are marked [MEM] where they are recollected, and [OURS] where they were chosen here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from bisam.experiments.errors import unknown
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

IMAGENET = Recipe(  # epochs, learning rate, batch, micro-batch: [MEM]
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

# Learning rate, batch and steps (500, of which 100 are warm-up): [MEM]. rho: [OURS]. The checkpoint is that of Wu et
# al. (2020), google/vit-base-patch16-224-in21k on Hugging Face, under timm's name; timm's default is another one.
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

BERT = Recipe(  # learning rate, batch, epochs and the radii: [MEM]; weight decay and no warm-up: [OURS]
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


def started(preset: str | None, given: Mapping[str, Any]) -> Recipe:
    """The recipe of a preset, or the default recipe, with other values of some fields.

    Args:
        preset: key of `PRESETS`, or None.
        given: fields and their values. A method here comes with its own settings: where they have no values here, rho,
            mu, alpha and eta are its defaults and not the preset's. Epochs here replace steps of the preset, and steps
            its epochs.

    Raises:
        ValueError: the preset is unknown, or a value is refused.
    """
    if preset is None:
        return Recipe(**given)
    if preset not in PRESETS:
        raise unknown("preset", preset, PRESETS)
    unset: dict[str, Any] = dict.fromkeys(SETTINGS) if "method" in given else {}
    if given.keys() & {"epochs", "steps"}:
        unset |= dict.fromkeys(("epochs", "steps"))
    return replace(PRESETS[preset], **{**unset, **given})
