"""Image tensors: small images in memory on the device, augmented in batches.

A crop with padding and a flip are one gather of rows: a batch takes a dozen operations, and no Python code per image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate, pad

from bisam.experiments.data.splits import Data, Split, Statistics, shares, without_index


@dataclass(frozen=True)
class Augmentation:
    """Random changes of each training image: a crop after padding with black, a flip, a grey square.

    Attributes:
        padding: pixels added on each side before the crop, which has the size of the original image.
        flip: whether half of the images are mirrored horizontally.
        cutout: side in pixels of a square that is blanked in half of the images; it may extend over the border (DeVries
            and Taylor, 2017, https://arxiv.org/abs/1708.04552). 0: none.
    """

    padding: int = 4
    flip: bool = True
    cutout: int = 0

    def moved(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Return images (N, C, H, W), cropped and mirrored."""
        n, c, h, w = images.shape
        size = 2 * self.padding + 1
        top, left = (torch.randint(size, (n, 1), generator=random) for _ in range(2))
        mirrored = torch.rand((n, 1), generator=random) < (0.5 if self.flip else 0.0)
        # Each padded row is followed by its mirror image, and each row of a crop is w consecutive pixels of the two.
        # Copying whole rows is ten times as fast as indexing pixels.
        padded = pad(images, (self.padding,) * 4)
        rows = torch.cat([padded, padded.flip(3)], 3)
        left = torch.where(mirrored, w + 2 * size - 2 - left, left)
        here = (top * rows.shape[3] + left).to(images.device)
        planes = torch.arange(n * c, device=images.device).view(n, c, 1) * rows[0, 0].numel()
        starts = planes + here[:, None] + torch.arange(h, device=images.device) * rows.shape[3]
        return rows.view(-1).unfold(0, w, 1).index_select(0, starts.view(-1)).view(n, c, h, w)

    def kept(self, n: int, h: int, w: int, random: torch.Generator) -> Tensor:
        """Draw the mask (N, 1, H, W) of the pixels that cutout keeps."""
        half = self.cutout // 2
        chosen = torch.rand((n, 1, 1), generator=random) < 0.5
        inside = [(torch.arange(side) - torch.randint(-half, side - half, (n, 1), generator=random)) for side in (h, w)]
        rows, columns = ((i >= 0) & (i < self.cutout) for i in inside)
        return ~(rows[:, :, None] & columns[:, None, :] & chosen)[:, None]


@dataclass(frozen=True)
class Images:
    """A split of images (N, C, H, W) in memory and their labels (N,).

    Attributes:
        images: uint8, or standardised floats.
        labels: classes.
        mean, std: of each channel of uint8 images, as a share of 255, (C,).
        augmentation: for training.
        side: of the images of a batch, in pixels, to which they are enlarged; None: as they are.
        randaugment: magnitude of RandAugment, for training; None: none.
        standardised: what floats were standardised with, see `Split.statistics`; None: not known.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    augmentation: Augmentation | None = None
    side: int | None = None
    standardised: Statistics | None = None
    randaugment: int | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def statistics(self) -> Statistics | None:
        """Mean and standard deviation of each channel, with which the images are standardised."""
        if self.mean is None or self.std is None:
            return self.standardised
        return tuple(self.mean.tolist()), tuple(self.std.tolist())

    def to(self, device: torch.device) -> Images:
        """Return the split on `device`."""
        moved: dict[str, Any] = {
            name: tensor.to(device)
            for name in ("images", "labels", "mean", "std")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def first(self, count: int) -> Images:
        """Return the first `count` examples."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def chosen(self, index: Tensor) -> Images:
        """Return the examples with these numbers (n,), in this order."""
        here = index.to(self.labels.device)
        return replace(self, images=self.images[here], labels=self.labels[here])

    def relabelled(self, labels: Tensor) -> Images:
        """Return the split with other labels (N,)."""
        return replace(self, labels=labels)

    def unaugmented(self) -> Images:
        """Return the split without augmentation."""
        return replace(self, augmentation=None, randaugment=None)

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over standardised images (n, C, H, W) and labels (n,); see `Split.batches`."""
        return without_index(self.indexed(size, generator, rank, ranks))

    def indexed(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield numbers (n,), standardised images (n, C, H, W) and labels (n,); see `Split.indexed`."""
        random = generator or torch.Generator().manual_seed(0)
        for index in shares(len(self), size, generator, rank, ranks):
            here = index.to(self.labels.device)
            yield index, self._prepared(self.images.index_select(0, here), random), self.labels[here]

    def enlarged(self, images: Tensor) -> Tensor:
        """Return float images (n, C, H, W), enlarged to `side` by bilinear interpolation."""
        return images if self.side is None else interpolate(images, size=(self.side, self.side), mode="bilinear")

    def _prepared(self, images: Tensor, random: torch.Generator) -> Tensor:
        change = self.augmentation
        x = images if change is None else change.moved(images, random)
        if self.randaugment is not None:
            from bisam.experiments.data.transforms import rand_augmented  # not at the top: digits needs no torchvision

            x = rand_augmented(x, self.randaugment, random)
        if self.mean is not None and self.std is not None:
            # Expanded to all pixels: with broadcasting this operation takes twice as long.
            scale, shift = (
                of_channel[:, None, None].expand(x.shape[1:]).contiguous()
                for of_channel in (1 / (255 * self.std), -self.mean / self.std)
            )
            x = torch.addcmul(shift, x.float(), scale)
        if change is not None and change.cutout:
            x = x * change.kept(len(x), *x.shape[2:], random).to(x.device)
        return self.enlarged(x)


def smaller(images: Tensor, side: int) -> Tensor:
    """Return uint8 images (N, C, H, H) at a side that divides H: each pixel is the mean of a block, rounded."""
    block = images.shape[2] // side
    if block == 1:
        return images
    # In parts: all images as floats would take four times their memory.
    return torch.cat([avg_pool2d(part.float(), block).round().to(torch.uint8) for part in images.split(5000)])


def larger(data: Data, side: int, statistics: tuple[Sequence[float], Sequence[float]] | None) -> Data:
    """Return a data set of uint8 images whose batches are enlarged, for networks that take images of a given size.

    Args:
        data: the data set, whose splits are `Images`.
        side: in pixels, from that of the images, which stay as they are then, to 1,024.
        statistics: mean and standard deviation of each channel to standardise with, as shares of 255; None: its own.

    Raises:
        ValueError: the side is out of range.
    """
    parts: dict[str, Images] = {}
    for name in ("train", "validation", "test"):
        split: Images = getattr(data, name)
        if not split.images.shape[2] <= side <= 1024:
            raise ValueError(f"images can be enlarged to {split.images.shape[2]} to 1024 pixels, got {side}")
        known = {} if statistics is None else dict(zip(("mean", "std"), map(torch.tensor, statistics), strict=True))
        parts[name] = replace(split, side=None if side == split.images.shape[2] else side, **known)
    return replace(data, **parts)


def channels(split: Split) -> int:
    """Return the number of channels of the images of a split; it is 3 for images that are read from files."""
    return split.images.shape[1] if isinstance(split, Images) else 3
