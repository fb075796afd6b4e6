"""Image tensors: small images in memory on the device, augmented a batch at a time.

A crop with padding and a flip are one gather of rows, so that a batch costs a dozen operations and no Python per image.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from sklearn.datasets import load_digits
from torch import Tensor
from torch.nn.functional import pad

from bisam.experiments.data.splits import Data, Split, shares


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, drawn for each: a crop after padding with black, a flip, a grey square.

    Attributes:
        padding: pixels on each side before the crop, which has the size of the image.
        flip: whether half of the images are mirrored.
        cutout: side of the square that half of the images lose, in pixels; it may stick out (DeVries and Taylor, 2017,
            https://arxiv.org/abs/1708.04552). 0: none.
    """

    padding: int = 4
    flip: bool = True
    cutout: int = 0

    def moved(self, images: Tensor, random: torch.Generator) -> Tensor:
        """Images (N, C, H, W), cropped and mirrored."""
        n, c, h, w = images.shape
        size = 2 * self.padding + 1
        top, left = (torch.randint(size, (n, 1), generator=random) for _ in range(2))
        mirrored = torch.rand((n, 1), generator=random) < (0.5 if self.flip else 0.0)
        # Each padded row is followed by its mirror image, and a row of a crop is w pixels in a row of that: rows are
        # copied whole, which is ten times as fast as pixels by their indices.
        padded = pad(images, (self.padding,) * 4)
        rows = torch.cat([padded, padded.flip(3)], 3)
        left = torch.where(mirrored, w + 2 * size - 2 - left, left)
        here = (top * rows.shape[3] + left).to(images.device)
        planes = torch.arange(n * c, device=images.device).view(n, c, 1) * rows[0, 0].numel()
        starts = planes + here[:, None] + torch.arange(h, device=images.device) * rows.shape[3]
        return rows.view(-1).unfold(0, w, 1).index_select(0, starts.view(-1)).view(n, c, h, w)

    def kept(self, n: int, h: int, w: int, random: torch.Generator) -> Tensor:
        """Where (N, 1, H, W) images are not cut out."""
        half = self.cutout // 2
        chosen = torch.rand((n, 1, 1), generator=random) < 0.5
        inside = [(torch.arange(side) - torch.randint(-half, side - half, (n, 1), generator=random)) for side in (h, w)]
        rows, columns = ((i >= 0) & (i < self.cutout) for i in inside)
        return ~(rows[:, :, None] & columns[:, None, :] & chosen)[:, None]


@dataclass(frozen=True)
class Images:
    """A split of images (N, C, H, W) in memory and their labels (N,).

    Attributes:
        images: as uint8, or as floats that are standardised.
        labels: classes.
        mean, std: of each channel of uint8 images as shares of 255, (C,).
        augmentation: for training.
    """

    images: Tensor
    labels: Tensor
    mean: Tensor | None = None
    std: Tensor | None = None
    augmentation: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> Images:
        """The same on `device`."""
        moved: dict[str, Any] = {
            name: tensor.to(device)
            for name in ("images", "labels", "mean", "std")
            if (tensor := getattr(self, name)) is not None
        }
        return replace(self, **moved)

    def first(self, count: int) -> Images:
        """The first `count` examples."""
        return replace(self, images=self.images[:count], labels=self.labels[:count])

    def relabelled(self, labels: Tensor) -> Images:
        """The same with other labels (N,)."""
        return replace(self, labels=labels)

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (n, C, H, W), standardised, and labels (n,); see `Split.batches`."""
        random = generator or torch.Generator().manual_seed(0)
        for index in shares(len(self), size, generator, rank, ranks):
            here = index.to(self.labels.device)
            yield self._prepared(self.images.index_select(0, here), random), self.labels[here]

    def _prepared(self, images: Tensor, random: torch.Generator) -> Tensor:
        change = self.augmentation
        x = images if change is None else change.moved(images, random)
        if self.mean is not None and self.std is not None:
            # Written out for each pixel: broadcast over them, this operation takes twice as long.
            scale, shift = (
                of_channel[:, None, None].expand(x.shape[1:]).contiguous()
                for of_channel in (1 / (255 * self.std), -self.mean / self.std)
            )
            x = torch.addcmul(shift, x.float(), scale)
        if change is not None and change.cutout:
            x = x * change.kept(len(x), *x.shape[2:], random).to(x.device)
        return x


def digits() -> Data:
    """scikit-learn's digits: 1,797 real images of 8x8, 60/15/25 per cent, the same split for every seed."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(42).permutation(len(labels))
    x = torch.from_numpy(images[order]).float().view(-1, 1, 8, 8)
    y = torch.from_numpy(labels[order]).long()
    first, second = round(0.6 * len(y)), round(0.75 * len(y))
    mean, std = x[:first].mean(), x[:first].std()
    x = (x - mean) / std
    parts = [Images(x[a:b], y[a:b]) for a, b in ((0, first), (first, second), (second, len(y)))]
    return Data(*parts, classes=10)


def cifar(name: str, root: Path, download: bool = False, augment: bool = True, cutout: bool = False) -> Data:
    """CIFAR-10 or CIFAR-100 (Krizhevsky, 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

    5,000 of the 50,000 training images are held out for validation, the same as in the BiSAM authors' code; channels
    are standardised with the statistics of all 50,000.

    Args:
        name: cifar10 or cifar100.
        root: folder with `cifar-10-batches-py` or `cifar-100-python` in it.
        download: whether to fetch what is missing.
        augment: whether training images are cropped and mirrored.
        cutout: whether half of them lose a square of 16x16.

    Raises:
        ValueError: the data set is missing, or damaged.
    """
    training, test = (_cifar(name, root, part, download) for part in (True, False))
    x, y = training
    order = np.arange(len(y))
    np.random.RandomState(42).shuffle(order)
    held = len(y) // 10
    mean, std = _statistics(x)
    change = Augmentation(cutout=16 if cutout else 0) if augment else None
    return Data(
        Images(x[order[held:]], y[order[held:]], mean, std, change),
        Images(x[order[:held]], y[order[:held]], mean, std),
        Images(*test, mean, std),
        classes=10 if name == "cifar10" else 100,
    )


def _cifar(name: str, root: Path, train: bool, download: bool) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    place = root / kind.base_folder
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):  # processes of a study do not all fetch it
                data = kind(str(root), train, download=True)
        else:
            data = kind(str(root), train)
    except (RuntimeError, OSError, EOFError, LookupError) as error:
        what = "is not whole" if place.exists() else "is not there"
        raise ValueError(
            f"{name} could not be fetched ({' '.join(str(error).split())}): unpack its Python version to {place}"
            if download
            else f"{name} {what}: give --download to fetch it, or unpack its Python version to {place} "
            "(or point --data-dir to the folder that it is in)"
        ) from error
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each channel as shares of 255, exactly, by counting values."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    n = counts.sum(1)
    mean = counts @ values / n
    variance = (counts * (values - mean[:, None]).square()).sum(1) / (n - 1)
    return mean.float(), variance.sqrt().float()


def channels(split: Split) -> int:
    """Of the images of a split (3 where they are read from files)."""
    return split.images.shape[1] if isinstance(split, Images) else 3
