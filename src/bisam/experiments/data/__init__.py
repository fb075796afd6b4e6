"""Data: data sets by name, in three splits, with seeded label noise.

The seed of a recipe draws the label noise, the examples that its `limit` keeps, and each part that a data set does not
have: all of digits, and what is held out of the training images or texts of a user's folder, Pets, ImageNet and GLUE.
Official test sets are the same for every seed, as are all parts of CIFAR, whose validation images are the authors', and
of Flowers-102.

    data = load(Recipe(dataset="cifar10", noise=0.4), Machine(data_dir=Path("data")))
    for x, y in data.train.batches(128, generator):
        ...

splits.py         what a split is
image_tensors.py  splits of small images in memory: digits.py, cifar.py
image_files.py    splits of images in files: image_folders.py has ImageNet, Flowers-102, Pets and folders of a user
glue.py           splits of texts, and the tasks of GLUE
long_tail.py      training sets whose classes have unequal numbers of examples
transforms.py     mixup, CutMix, RandAugment and random erasing, by torchvision
sequences.py      splits of tokens with a label for each: language.py has text and addition
names.py          the classes by name
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bisam.experiments.data.glue import TASKS, Texts
from bisam.experiments.data.language import LANGUAGES, language
from bisam.experiments.data.long_tail import long_tailed
from bisam.experiments.data.sequences import Sequences
from bisam.experiments.data.splits import Data, Split, drawn
from bisam.experiments.errors import DataError, unknown
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine

NAMES = {
    "digits": "scikit-learn's 1,797 images of 8x8, no download",
    "cifar10": "50,000 + 10,000 images of 32x32, 10 classes",
    "cifar100": "50,000 + 10,000 images of 32x32, 100 classes",
    "cifar10:SIDE": "the same at 4, 8 or 16 pixels, or enlarged for pretrained networks (also cifar100:SIDE)",
    "imagenet": "ImageNet-1K in folders: imagenet/train/CLASS/*, imagenet/val/CLASS/*",
    "flowers": "Oxford Flowers-102",
    "pets": "Oxford-IIIT Pets, 37 classes",
    "folder:PATH": "your own images: PATH/train/CLASS/*, optionally with val and test beside train; PATH here, or in "
    "the folder of the data sets",
    **{f"glue:{task}": f"GLUE, {task}" for task in TASKS},
    **{f"text:{name}": line for name, line in LANGUAGES.items()},
}
"""The data sets, with a short description of each."""


def channels_of(recipe: Recipe) -> int:
    """Return the number of channels of a recipe's images, without loading them."""
    return 1 if recipe.dataset == "digits" else 3


def has_tokens(dataset: str) -> bool:
    """Return whether the labels of a data set are tokens, one for each position of an example."""
    return dataset.partition(":")[0] == "text"


def load(recipe: Recipe, machine: Machine) -> Data:
    """Load the data of a recipe, in the split of its seed.

    Raises:
        RunError: the recipe has an earlier version, whose split was another one.
        DataError: the name is unknown, or the data set is missing or damaged; the message names the files to provide.
    """
    recipe.check_version()
    try:
        data = _load(recipe, machine)
    except ValueError as error:
        raise DataError(str(error)) from error
    if recipe.limit is not None:
        data = _limited(data, recipe.limit, recipe.seed)
    for name, value, none in (("noise", recipe.noise, 0), ("imbalance", recipe.imbalance, 1)):
        if value != none and isinstance(data.train, Sequences):
            raise DataError(
                f"{name} {value:g} is about the class of an example, and {recipe.dataset} has tokens: leave it out"
            )
    if recipe.imbalance > 1:
        data = long_tailed(data, recipe.imbalance, recipe.seed)
    if recipe.train_examples is not None:
        data = replace(data, train=_subset(data.train, recipe.train_examples, recipe.seed))
    if recipe.imbalance > 1 and recipe.held_out == 0:
        data = replace(data, validation=data.train.unaugmented())  # not the examples that the tail leaves out
    if recipe.noise:
        noisy = symmetric_noise(data.train.labels, recipe.noise, data.classes, recipe.seed)
        data = replace(data, train=data.train.relabelled(noisy))
    if recipe.noise and recipe.validation_noise:
        noisy = symmetric_noise(data.validation.labels, recipe.noise, data.classes, recipe.seed, stream=1)
        data = replace(data, validation=data.validation.relabelled(noisy))
    data = _with_transforms(data, recipe)
    return data if recipe.bucket == 1 else _bucketed(data, recipe.bucket)


def _limited(data: Data, limit: int, seed: int) -> Data:
    """Return at most `limit` examples of each part: of training and validation those that the seed draws.

    The test examples are the first ones, so that those of an official test set are the same for every seed.
    """

    def some(split: Split, stream: int) -> Split:
        return split if len(split) <= limit else split.chosen(drawn(len(split), seed, stream)[:limit])

    return replace(data, train=some(data.train, 1), validation=some(data.validation, 2), test=data.test.first(limit))


def check_name(dataset: str) -> None:
    """Check that there is a data set of this name; whether it can be loaded is another question.

    Raises:
        DataError: there is none.
    """
    kind, _, detail = dataset.partition(":")
    match kind:
        case "digits" | "imagenet" | "flowers" | "pets":
            there = not detail
        case "cifar10" | "cifar100":
            there = not detail or detail.isdecimal()
        case "folder":
            there = bool(detail)
        case "glue":
            there = detail in TASKS
        case "text":
            there = detail in LANGUAGES
        case _:
            there = False
    if not there:
        raise DataError(str(unknown("dataset", dataset, NAMES, "bisam list")))


def _load(recipe: Recipe, machine: Machine) -> Data:
    check_name(recipe.dataset)
    kind, _, detail = recipe.dataset.partition(":")
    root, download, size, seed = machine.data_dir, machine.download, recipe.image_size, recipe.seed
    if kind in ("digits", "cifar10", "cifar100"):
        from bisam.experiments.data.cifar import SIDE, cifar
        from bisam.experiments.data.digits import digits
        from bisam.experiments.data.image_tensors import larger
        from bisam.experiments.models.build import statistics

        if kind == "digits":
            return digits(seed)
        side = int(detail) if detail else SIDE
        data = cifar(kind, root, download, recipe.augment, recipe.cutout, min(side, SIDE))
        return larger(data, side, statistics(recipe.model, root)) if detail else data
    if kind in ("imagenet", "flowers", "pets", "folder"):
        from bisam.experiments.data.image_folders import flowers, folder, imagenet, pets, standardised
        from bisam.experiments.models.build import statistics

        match kind:
            case "imagenet":
                data = imagenet(root, seed, size, machine.loaders, recipe.held_out)
            case "folder":
                data = folder(_folder(detail, root), seed, size, machine.loaders, recipe.held_out)
            case "flowers":
                data = flowers(root, size, machine.loaders, download)
            case _:
                data = pets(root, seed, size, machine.loaders, download, recipe.held_out)
        known = statistics(recipe.model, root)
        return data if known is None else standardised(data, *known)
    if kind == "text":
        return language(detail, seed, recipe.max_length)
    from bisam.experiments.data.glue import glue
    from bisam.experiments.models.build import tokenizer

    return glue(detail, root, tokenizer(recipe.model, root), seed, recipe.max_length, download, recipe.held_out)


def names_of(dataset: str, root: Path) -> list[str]:
    """Return the names of the classes of a data set, in the order of their numbers; [] if they are not known.

    Raises:
        DataError: the data set is missing.
    """
    from bisam.experiments.data.names import class_names

    try:
        return class_names(dataset, _folder(dataset.partition(":")[2], root), root)
    except ValueError as error:
        raise DataError(str(error)) from error


def _subset(train: Split, count: int, seed: int) -> Split:
    """The training examples that the seed draws, in their order."""
    if count > len(train):
        raise DataError(f"train_examples must be at most {len(train):,}, the training examples, got {count:,}")
    return train.chosen(drawn(len(train), seed, stream=3)[:count].sort().values)


def _with_transforms(data: Data, recipe: Recipe) -> Data:
    """The data with the random changes of training images that torchvision has."""
    changes = {name: getattr(recipe, name) for name in ("mixup", "cutmix", "erasing")}
    train: Any = data.train
    if isinstance(train, Texts | Sequences):
        if recipe.randaugment is not None or any(changes.values()):
            raise DataError(f"randaugment, erasing, mixup and cutmix change images, and {recipe.dataset} has texts")
        return data
    if recipe.randaugment is not None:
        if recipe.dataset == "digits":
            raise DataError("randaugment needs images of 8-bit pixels, such as cifar10, and not those of digits")
        train = replace(train, randaugment=recipe.randaugment)
    if any(changes.values()):
        from bisam.experiments.data.transforms import Transformed  # not at the top: digits needs no torchvision

        train = Transformed(train, data.classes, **changes)
    return replace(data, train=train)


def _bucketed(data: Data, bucket: int) -> Data:
    """The texts in batches of similar length; see `Texts`."""
    if not (isinstance(data.train, Texts) and isinstance(data.validation, Texts) and isinstance(data.test, Texts)):
        return data
    train = replace(data.train, bucket=bucket)
    return replace(data, train=train, validation=data.validation.by_length(), test=data.test.by_length())


def _folder(path: str, root: Path) -> Path:
    """The folder of a user's images, or one of the same name in the folder of the data sets."""
    here = Path(path).expanduser()
    return here if here.exists() or not (root / here).exists() else root / here


def source(recipe: Recipe) -> tuple[object, ...]:
    """Return the fields that decide whether the data can be loaded: equal for two recipes, both can or neither."""
    prepares = recipe.model if ":" in recipe.model else ""  # tokens and channel statistics depend on the model
    sizes = recipe.held_out, recipe.train_examples, recipe.imbalance
    return recipe.dataset, recipe.image_size, recipe.max_length, *sizes, prepares


def symmetric_noise(labels: Tensor, rate: float, classes: int, seed: int, stream: int | None = None) -> Tensor:
    """Return `labels` with exactly round(rate * N) of them replaced by another class, drawn uniformly.

    Args:
        labels: classes (N,).
        rate: in [0, 1).
        classes: number of classes.
        seed: of the random numbers.
        stream: for other random numbers from the same seed.
    """
    random = np.random.default_rng([seed, 0x5EED] if stream is None else [seed, 0x5EED, stream])
    chosen = random.permutation(len(labels))[: round(rate * len(labels))]
    noisy = labels.clone()
    shift = torch.from_numpy(random.integers(1, classes, len(chosen)))
    noisy[chosen] = (labels[chosen] + shift) % classes
    return noisy
