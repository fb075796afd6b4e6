"""Images of other data, prepared as the test images of a run: size, channels and standardisation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from bisam.experiments import data
from bisam.experiments.data.image_files import MEAN, STD, Channels, Folder
from bisam.experiments.data.image_tensors import Images
from bisam.experiments.data.splits import Split
from bisam.experiments.errors import DataError
from bisam.experiments.models.build import statistics
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine

IN_FILES = ("imagenet", "flowers", "pets", "folder")
"""Kinds of data sets whose images are read from files."""


@dataclass(frozen=True)
class Preparation:
    """How test images are prepared.

    Attributes:
        size: height and width to which files are resized, in pixels.
        whole: whether the shorter side is resized to `size`; else the central 224 of 256 parts have it.
        channels: 1 or 3.
        mean: of each channel, in [0, 1].
        std: of each channel.
        side: to which the images are enlarged after that; None: they are not.
    """

    size: int
    whole: bool
    channels: int
    mean: Channels
    std: Channels
    side: int | None = None

    def files(self, paths: Sequence[str | Path], labels: Tensor | None = None, processes: int = 0) -> Folder:
        """Return a split of image files, without the enlargement."""
        return Folder(
            [str(path) for path in paths],
            torch.zeros(len(paths), dtype=torch.int64) if labels is None else labels,
            self.size,
            processes=processes,
            mean=self.mean,
            std=self.std,
            whole=self.whole,
            grey=self.channels == 1,
        )

    def enlarged(self, images: Tensor) -> Tensor:
        """Return images (n, C, H, W), enlarged to `side`."""
        return images if self.side is None else interpolate(images, size=(self.side, self.side), mode="bilinear")


def preparation(recipe: Recipe, machine: Machine) -> Preparation:
    """Return how the test images of a recipe are prepared. Small images are loaded, for their statistics.

    Raises:
        ValueError: the recipe has no images.
        DataError: the data set is missing.
    """
    if recipe.dataset.partition(":")[0] in IN_FILES:
        return Preparation(recipe.image_size, False, 3, *(statistics(recipe.model, machine.data_dir) or (MEAN, STD)))
    test = data.load(recipe, machine).test
    if not isinstance(test, Images) or test.statistics is None:
        raise ValueError(f"{recipe.dataset} has no images")
    mean, std = test.statistics
    return Preparation(test.images.shape[2], True, test.images.shape[1], mean, std, test.side)


def prepared_as(split: Split, how: Preparation, name: str) -> Split:
    """Return the images of another data set, prepared as those of a run.

    Args:
        split: examples of the other data set.
        how: the preparation of the run.
        name: of the other data set, for messages.

    Raises:
        DataError: they cannot be: they are no images, or images in memory of another size or number of channels.
    """
    if isinstance(split, Folder) and how.side is None:
        return replace(how.files(split.paths, split.labels, split.processes), device=split.device)
    if isinstance(split, Images) and split.mean is not None and split.images.shape[1] == how.channels:
        side = how.side or how.size
        if side >= split.images.shape[2]:
            mean, std = (torch.tensor(values) for values in (how.mean, how.std))
            return replace(split, mean=mean, std=std, side=None if side == split.images.shape[2] else side)
    raise DataError(f"the images of {name} cannot be prepared as those of the run: give a data set of such images")
