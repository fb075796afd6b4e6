"""Image files: images that are decoded and augmented one by one, in worker processes of a DataLoader.

    for x, y in Folder(paths, labels, image_size=224, processes=8).batches(128, generator):
        ...

A worker gets an image's path, its index and the random number of the epoch, and nothing else. So batches do not depend
on the number of workers, and no worker is sent a list of a million paths.
"""

from __future__ import annotations

import multiprocessing as mp
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from bisam.experiments.data.splits import Statistics, shares, without_index
from bisam.experiments.data.transforms import rand_augment
from bisam.experiments.errors import reason

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's channels, as shares of 255; most pretrained networks expect them."""

Channels = tuple[float, ...]
"""One number for each of the three channels."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Folder:
    """A split of images in files, and their labels (N,).

    For training, images are random crops of 8 to 100 % of the area, resized, and half of them mirrored. Else they are
    resized, with a central crop of 224 in 256 pixels.

    Attributes:
        paths: image files; grey, palette, CMYK and transparent images are converted to RGB.
        labels: classes.
        image_size: height and width after the crop, in pixels.
        whole: whether the central crop has the whole of the shorter side, as for small images, and not 224 of 256
            pixels.
        grey: whether images are converted to one channel, and not to RGB.
        training: whether images are augmented.
        randaugment: magnitude of RandAugment, for training; None: none.
        processes: worker processes that decode images; 0: this process decodes them.
        device: of the batches.
        mean, std: of the channels, for standardisation, as shares of 255; by default ImageNet's.

    Raises:
        ValueError: `image_size` or `processes` is outside its range; while loading batches: an image cannot be read.
    """

    paths: Sequence[str]
    labels: Tensor
    image_size: int = 224
    training: bool = False
    processes: int = 0
    device: torch.device = _CPU
    mean: Channels = MEAN
    std: Channels = STD
    whole: bool = False
    grey: bool = False
    randaugment: int | None = None

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("processes", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def statistics(self) -> Statistics:
        """Mean and standard deviation of each channel, with which the images are standardised."""
        return self.mean, self.std

    def to(self, device: torch.device) -> Folder:
        """Return the split with its batches on `device`."""
        return replace(self, device=device)

    def first(self, count: int) -> Folder:
        """Return the first `count` examples."""
        return replace(self, paths=self.paths[:count], labels=self.labels[:count])

    def chosen(self, index: Tensor) -> Folder:
        """Return the examples with these numbers (n,), in this order."""
        return replace(self, paths=[self.paths[i] for i in index.tolist()], labels=self.labels[index])

    def relabelled(self, labels: Tensor) -> Folder:
        """Return the split with other labels (N,)."""
        return replace(self, labels=labels)

    def unaugmented(self) -> Folder:
        """Return the split without augmentation."""
        return replace(self, training=False)

    def where(self, chosen: Tensor) -> Folder:
        """Return the examples for which `chosen` (N,) is true."""
        return self.chosen(chosen.nonzero()[:, 0])

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Return an iterator over standardised images (n, 3, H, W) and labels (n,); see `Split.batches`."""
        return without_index(self.indexed(size, generator, rank, ranks))

    def indexed(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Return an iterator over numbers (n,), and what `batches` returns; see `Split.indexed`."""
        epoch = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
        return self._indexed(list(shares(len(self), size, generator, rank, ranks)), epoch)

    def readable(self, size: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Yield numbers and images of `size` files at a time: those that can be read, and messages of the others."""
        return self._read(list(torch.arange(len(self)).split(size)), 0)

    def _indexed(self, parts: list[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for part, x, messages in self._read(parts, epoch):
            if messages:
                raise ValueError(messages[0])
            yield part, x, self.labels[part].to(self.device)

    def _read(self, parts: list[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        keys = ([(self.paths[i], i, epoch) for i in part.tolist()] for part in parts)
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self.image_size, self.training, self.whole, self.grey, self.randaugment),
            batch_sampler=keys,  # pyright: ignore[reportArgumentType]
            collate_fn=_collate,
            num_workers=self.processes,
            multiprocessing_context=_context() if self.processes else None,
            worker_init_fn=_quiet,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else the loader draws from the global generator
        )
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (self.mean, self.std))
        for part, (there, images, messages) in zip(parts, loader, strict=True):
            x = images.to(self.device, non_blocking=True).float()
            yield part[there], x.div_(255).sub_(mean).div_(std) if there else x, messages


class _Decoder(Dataset[Any]):
    """Maps path, index and epoch of an image to its pixels (3, H, W), uint8, in a worker process.

    For an image that cannot be read it returns the message: an error in a worker would be shown as a traceback.
    """

    def __init__(
        self, image_size: int, training: bool, whole: bool, grey: bool, randaugment: int | None = None
    ) -> None:
        self._training, self._grey = training, grey
        operations = [] if randaugment is None else [rand_augment(randaugment)]
        self._transform = v2.Compose(
            [
                v2.RandomResizedCrop(image_size, antialias=True),
                v2.RandomHorizontalFlip(),
                *operations,
                v2.PILToTensor(),
            ]
            if training
            else [
                v2.Resize(image_size if whole else round(image_size * 256 / 224), antialias=True),
                v2.CenterCrop(image_size),
                v2.PILToTensor(),
            ]
        )

    def __getitem__(self, key: tuple[str, int, int]) -> Tensor | str:
        path, number, epoch = key
        try:
            image = decoded(path)
            image = image.convert("L") if self._grey else image
        except Exception as error:  # each format raises another type of error
            return f"{path} cannot be read ({reason(error)}): replace or delete it"
        if not self._training:
            return self._transform(image)
        # torch.manual_seed would seed the accelerators too.
        state, random = torch.get_rng_state(), torch.random.default_generator
        try:
            random.manual_seed(int(np.random.SeedSequence((epoch, number)).generate_state(1)[0]))
            return self._transform(image)
        finally:
            torch.set_rng_state(state)


def decoded(path: str) -> Image.Image:
    """Return the image in RGB."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits; Pillow would clip them at 255
            return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")  # a direct conversion would warn
        return image.convert("RGB")


def _collate(images: list[Tensor | str]) -> tuple[list[int], Tensor, list[str]]:
    """The places and pixels of the images of a batch that can be read, and the messages of the others."""
    there = [i for i, image in enumerate(images) if not isinstance(image, str)]
    pixels = default_collate([images[i] for i in there]) if there else torch.empty(0, 1, 1, 1)
    return there, pixels, [image for image in images if isinstance(image, str)]


def _quiet(_: int) -> None:
    warnings.filterwarnings("ignore", module="PIL")  # about unusual metadata, once per process and epoch


def _context() -> BaseContext:
    # Not fork, which is unsafe while torch has threads. A fork server imports this module once and then forks workers
    # quickly; a spawned worker would import torch itself.
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context
