"""CIFAR: CIFAR-10 and CIFAR-100, in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from torch import Tensor

from bisam.experiments.data.image_tensors import Augmentation, Images, smaller
from bisam.experiments.data.splits import Data

SIDE = 32
"""Side of the images in pixels."""
SIDES = (4, 8, 16, SIDE)
"""Sides to which they can be reduced."""


def cifar(
    name: str, root: Path, download: bool = False, augment: bool = True, cutout: bool = False, side: int = SIDE
) -> Data:
    """Load CIFAR-10 or CIFAR-100 (Krizhevsky, 2009, https://www.cs.toronto.edu/~kriz/cifar.html).

    5,000 of the 50,000 training images are held out for validation, the same as in the BiSAM authors' code; channels
    are standardised with the statistics of all 50,000, at the side that they have. Crops are padded by an eighth of the
    side, and cutout has half of it.

    Args:
        name: cifar10 or cifar100.
        root: folder that contains `cifar-10-batches-py` or `cifar-100-python`.
        download: whether to download the data set if it is missing.
        augment: whether training images are cropped and mirrored.
        cutout: whether a square of half the side is blanked in half of them.
        side: of the images in pixels: 32, or 16, 8 or 4, where each pixel is the mean of a block of pixels.

    Raises:
        ValueError: the data set is missing or damaged, or the side is another one.
    """
    if side not in SIDES:
        raise ValueError(f"images of {SIDE} pixels can be reduced to {SIDES[0]}, {SIDES[1]} or {SIDES[2]}, got {side}")
    training, test = (_cifar(name, root, part, download, side) for part in (True, False))
    x, y = training
    order = np.arange(len(y))
    np.random.RandomState(42).shuffle(order)
    held = len(y) // 10
    mean, std = _statistics(x)
    change = Augmentation(padding=side // 8, cutout=side // 2 if cutout else 0) if augment else None
    return Data(
        Images(x[order[held:]], y[order[held:]], mean, std, change),
        Images(x[order[:held]], y[order[:held]], mean, std),
        Images(*test, mean, std),
        classes=10 if name == "cifar10" else 100,
    )


def _cifar(name: str, root: Path, train: bool, download: bool, side: int) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = CIFAR10 if name == "cifar10" else CIFAR100
    place = root / kind.base_folder
    try:
        if download:
            root.mkdir(parents=True, exist_ok=True)
            with FileLock(root / f".{name}.lock"):  # only one of the processes of a study downloads it
                data = kind(str(root), train, download=True)
        else:
            data = kind(str(root), train)
    except (RuntimeError, OSError, EOFError, LookupError) as error:
        what = "is incomplete" if place.exists() else "is missing"
        raise ValueError(
            f"{name} could not be downloaded ({' '.join(str(error).split())}): unpack its Python version to {place}"
            if download
            else f"{name} {what}: give --download, or unpack its Python version to {place} "
            "(or set --data-dir to the folder that contains it)"
        ) from error
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return smaller(images, side), torch.tensor(data.targets)


def _statistics(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each channel as shares of 255, computed exactly by counting values."""
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    values = torch.arange(256, dtype=torch.float64) / 255
    n = counts.sum(1)
    mean = counts @ values / n
    variance = (counts * (values - mean[:, None]).square()).sum(1) / (n - 1)
    return mean.float(), variance.sqrt().float()
