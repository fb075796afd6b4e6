"""Transforms: random changes of training images that torchvision.transforms.v2 has, drawn from the generator of a run.

with drawn_from(random):            # torchvision draws from torch's global generator, which is restored at the end
    images, labels = v2.MixUp(alpha=0.2, num_classes=10)(images, labels)

`Transformed` changes whole batches of a split: it erases parts of images, and mixes images and labels. RandAugment
takes images as they are in files, and is a part of the splits.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms import v2

from bisam.experiments.data.splits import Split, Statistics, without_index

MAGNITUDES = 31
"""Magnitudes of RandAugment: 0, which changes almost nothing, to 30."""


@contextmanager
def drawn_from(random: torch.Generator) -> Generator[None]:
    """A context in which torch's global generator of the CPU has a seed that `random` draws; it is restored after it.

    torch.manual_seed would seed the accelerators too.
    """
    state, own = torch.get_rng_state(), torch.random.default_generator
    try:
        own.manual_seed(int(torch.randint(2**62, (), generator=random)))
        yield
    finally:
        torch.set_rng_state(state)


def rand_augment(magnitude: int) -> v2.RandAugment:
    """Return RandAugment (Cubuk et al., 2020, https://arxiv.org/abs/1909.13719): two random operations for each image.

    Args:
        magnitude: of the operations, 0 to 30.
    """
    return v2.RandAugment(num_ops=2, magnitude=magnitude, num_magnitude_bins=MAGNITUDES)


def rand_augmented(images: Tensor, magnitude: int, random: torch.Generator) -> Tensor:
    """Return uint8 images (N, C, H, W), each with operations of its own."""
    change = rand_augment(magnitude)
    with drawn_from(random):
        return torch.stack([change(image) for image in images])


@dataclass(frozen=True, eq=False)
class Transformed:
    """A split of images for training, whose batches are changed at random.

    Attributes:
        split: the images.
        classes: number of classes.
        mixup: parameter of the beta distribution of the share of an image in a mixture (Zhang et al., 2018,
            https://arxiv.org/abs/1710.09412); 0: none.
        cutmix: the same for the area of a rectangle that comes from another image (Yun et al., 2019,
            https://arxiv.org/abs/1905.04899); 0: none. With both, each batch has one of the two.
        erasing: share of the images of which a rectangle is replaced by their mean (Zhong et al., 2020,
            https://arxiv.org/abs/1708.04896).

    With mixup or cutmix labels are class probabilities (n, classes), float32.
    """

    split: Split
    classes: int
    mixup: float = 0.0
    cutmix: float = 0.0
    erasing: float = 0.0

    def __len__(self) -> int:
        return len(self.split)

    @property
    def labels(self) -> Tensor:
        """Classes (N,), before mixtures."""
        return self.split.labels

    @property
    def statistics(self) -> Statistics | None:
        """The mean and standard deviation with which the images are standardised; see `Split.statistics`."""
        return self.split.statistics

    def to(self, device: torch.device) -> Transformed:
        """Return the split with its batches on `device`."""
        return replace(self, split=self.split.to(device))

    def first(self, count: int) -> Transformed:
        """Return the first `count` examples."""
        return replace(self, split=self.split.first(count))

    def chosen(self, index: Tensor) -> Transformed:
        """Return the examples with these numbers (n,), in this order."""
        return replace(self, split=self.split.chosen(index))

    def relabelled(self, labels: Tensor) -> Transformed:
        """Return the split with other labels (N,)."""
        return replace(self, split=self.split.relabelled(labels))

    def unaugmented(self) -> Split:
        """Return the split without augmentation."""
        return self.split.unaugmented()

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Any, Tensor]]:
        """Return the batches of the split; see `Split.batches`."""
        return without_index(self.indexed(size, generator, rank, ranks))

    def indexed(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Any, Tensor]]:
        """Yield numbers (n,), changed images (n, C, H, W), and labels (n,) or their mixtures; see `Split.indexed`."""
        random = torch.Generator().manual_seed(0)
        if generator is not None:  # one draw, so that the order of the examples does not depend on the rank
            random.manual_seed(int(torch.randint(2**62, (), generator=generator)) + rank)
        erase = v2.RandomErasing(self.erasing)
        mixes = self._mixes()
        for index, images, labels in self.split.indexed(size, generator, rank, ranks):
            with drawn_from(random):
                if self.erasing:
                    images = torch.stack([erase(image) for image in images])
                if mixes:
                    images, labels = v2.RandomChoice(mixes)(images, labels)
            yield index, images, labels

    def _mixes(self) -> list[Any]:
        found: list[Any] = []
        if self.mixup:
            found.append(v2.MixUp(alpha=self.mixup, num_classes=self.classes))
        if self.cutmix:
            found.append(v2.CutMix(alpha=self.cutmix, num_classes=self.classes))
        return found
