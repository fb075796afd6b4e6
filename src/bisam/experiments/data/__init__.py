"""Data: a data set by name, in three parts, with seeded label noise on the first.

data = load(Recipe(dataset="cifar10", noise=0.4), Machine(data_dir=Path("data")))
for x, y in data.train.batches(128, generator):
...
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bisam.experiments.data.splits import Data
from bisam.experiments.errors import DataError, unknown
from bisam.experiments.recipes.presets import GLUE
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine

NAMES = {
    "digits": "scikit-learn's 1,797 images of 8x8, no download",
    "cifar10": "50,000 + 10,000 images of 32x32, 10 classes",
    "cifar100": "50,000 + 10,000 images of 32x32, 100 classes",
    "imagenet": "ImageNet-1K in folders: imagenet/train/CLASS/*, imagenet/val/CLASS/*",
    "flowers": "Oxford Flowers-102",
    "pets": "Oxford-IIIT Pets, 37 classes",
    "folder:PATH": "images of your own: PATH/train/CLASS/*, and val, test beside train where there are",
    **{f"glue:{task}": f"GLUE, {task}" for task in GLUE},
}
"""The data sets, and what they are."""


def load(recipe: Recipe, machine: Machine) -> Data:
    """The data of a recipe.

    Raises:
        DataError: the name is unknown; the data set is missing or damaged, with what to put where.
    """
    try:
        data = _load(recipe, machine)
    except ValueError as error:
        raise DataError(str(error)) from error
    if recipe.limit is not None:
        parts = {name: getattr(data, name).first(recipe.limit) for name in ("train", "validation", "test")}
        data = replace(data, **parts)
    if not recipe.noise:
        return data
    noisy = symmetric_noise(data.train.labels, recipe.noise, data.classes, recipe.seed)
    return replace(data, train=data.train.relabelled(noisy))


def _load(recipe: Recipe, machine: Machine) -> Data:
    kind, _, detail = recipe.dataset.partition(":")
    root, download, size = machine.data_dir, machine.download, recipe.image_size
    if kind in ("digits", "cifar10", "cifar100") and not detail:
        from bisam.experiments.data.image_tensors import cifar, digits

        if kind == "digits":
            return digits()
        return cifar(kind, root, download, recipe.augment, recipe.cutout)
    if (kind in ("imagenet", "flowers", "pets") and not detail) or (kind == "folder" and detail):
        from bisam.experiments.data.image_folders import flowers, folder, imagenet, pets, standardised
        from bisam.experiments.models.build import statistics

        match kind:
            case "imagenet":
                data = imagenet(root, size, machine.loaders)
            case "folder":
                data = folder(Path(detail).expanduser(), size, machine.loaders)
            case _:
                load_one = flowers if kind == "flowers" else pets
                data = load_one(root, size, machine.loaders, download=download)
        known = statistics(recipe.model)
        return data if known is None else standardised(data, *known)
    if kind == "glue" and detail in GLUE:
        from bisam.experiments.data.glue import glue
        from bisam.experiments.models.build import tokenizer

        return glue(detail, root, tokenizer(recipe.model), recipe.max_length, download)
    raise unknown("dataset", recipe.dataset, NAMES)


def source(recipe: Recipe) -> tuple[object, ...]:
    """What of a recipe decides whether its data can be had: recipes with the same have it, or lack it, together."""
    prepares = recipe.model if ":" in recipe.model else ""  # tokens and statistics are the model's
    return recipe.dataset, recipe.image_size, recipe.max_length, prepares


def symmetric_noise(labels: Tensor, rate: float, classes: int, seed: int) -> Tensor:
    """`labels` with exactly round(rate * N) of them replaced by another class, drawn uniformly."""
    random = np.random.default_rng([seed, 0x5EED])
    chosen = random.permutation(len(labels))[: round(rate * len(labels))]
    noisy = labels.clone()
    shift = torch.from_numpy(random.integers(1, classes, len(chosen)))
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy
