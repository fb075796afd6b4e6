"""Image files: images, decoded and transformed one by one, in processes of torch's DataLoader.

    for x, y in Folder(paths, labels, image_size=224, processes=8).batches(128, generator):
        ...

A process is told an image's path, its number and what was drawn for the epoch, and knows nothing else: so batches are
the same whatever the number of processes, and nobody is sent a list of a million paths.
"""

from __future__ import annotations

import multiprocessing as mp
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import BaseContext
from textwrap import shorten
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms import v2

from bisam.experiments.data.splits import shares

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the channels of ImageNet, as shares of 255: what most pretrained networks expect."""

Channels = tuple[float, ...]
"""One number for each of the three channels."""

_CPU = torch.device("cpu")


@dataclass(frozen=True, eq=False)
class Folder:
    """A split of images in files, and their labels (N,).

    Training images are random crops of 8 to 100 % of the area, resized, and half of them mirrored; the others are the
    centre, of 224 in 256 pixels.

    Attributes:
        paths: of the images; grey, palette, CMYK and transparent ones are converted to RGB.
        labels: classes.
        image_size: height and width of what comes, in pixels.
        training: whether images are augmented.
        processes: that decode images; 0: this one.
        device: where batches are.
        mean, std: with which channels are standardised, as shares of 255; by default ImageNet's.

    Raises:
        ValueError: `image_size` or `processes` is outside its range; from the batches, an image cannot be read.
    """

    paths: Sequence[str]
    labels: Tensor
    image_size: int = 224
    training: bool = False
    processes: int = 0
    device: torch.device = _CPU
    mean: Channels = MEAN
    std: Channels = STD

    def __post_init__(self) -> None:
        for name, least in (("image_size", 1), ("processes", 0)):
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")

    def __len__(self) -> int:
        return len(self.paths)

    def to(self, device: torch.device) -> Folder:
        """The same, with its batches on `device`."""
        return replace(self, device=device)

    def first(self, count: int) -> Folder:
        """The first `count` examples."""
        return replace(self, paths=self.paths[:count], labels=self.labels[:count])

    def relabelled(self, labels: Tensor) -> Folder:
        """The same with other labels (N,)."""
        return replace(self, labels=labels)

    def where(self, chosen: Tensor) -> Folder:
        """The examples for which `chosen` (N,) is true."""
        paths = [self.paths[i] for i in chosen.nonzero()[:, 0].tolist()]
        return replace(self, paths=paths, labels=self.labels[chosen])

    def batches(
        self, size: int, generator: torch.Generator | None = None, rank: int = 0, ranks: int = 1
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Images (n, 3, H, W), standardised, and labels (n,); see `Split.batches`."""
        epoch = 0 if generator is None else int(torch.randint(2**62, (), generator=generator))
        return self._read(list(shares(len(self), size, generator, rank, ranks)), epoch)

    def _read(self, parts: list[Tensor], epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        keys = ([(self.paths[i], i, epoch) for i in part.tolist()] for part in parts)
        loader: DataLoader[Any] = DataLoader(
            _Decoder(self.image_size, self.training),
            batch_sampler=keys,  # pyright: ignore[reportArgumentType]
            collate_fn=_collate,
            num_workers=self.processes,
            multiprocessing_context=_context() if self.processes else None,
            worker_init_fn=_quiet,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # else it draws from the global one
        )
        mean, std = (torch.tensor(values, device=self.device)[:, None, None] for values in (self.mean, self.std))
        for part, images in zip(parts, loader, strict=True):
            if isinstance(images, str):
                raise ValueError(images)
            x = images.to(self.device, non_blocking=True).float().div_(255).sub_(mean).div_(std)
            yield x, self.labels[part].to(self.device)


class _Decoder(Dataset[Any]):
    """What a process does: path, number and epoch of an image to its pixels (3, H, W), uint8.

    Of an image that cannot be read it returns the sentence that says so: raised in a process it would be a traceback.
    """

    def __init__(self, image_size: int, training: bool) -> None:
        self._training = training
        self._transform = v2.Compose(
            [v2.RandomResizedCrop(image_size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()]
            if training
            else [
                v2.Resize(round(image_size * 256 / 224), antialias=True),
                v2.CenterCrop(image_size),
                v2.PILToTensor(),
            ]
        )

    def __getitem__(self, key: tuple[str, int, int]) -> Tensor | str:
        path, number, epoch = key
        try:
            image = decoded(path)
        except Exception as error:  # each format has its own way to be damaged
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
    """The image in RGB."""
    with Image.open(path) as image:
        if image.mode.startswith("I"):  # 16 bits; Pillow would cut them off at 255
            return Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8)).convert("RGB")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")  # in one step it would warn
        return image.convert("RGB")


def _collate(images: list[Tensor | str]) -> Tensor | str:
    failures = [image for image in images if isinstance(image, str)]
    return failures[0] if failures else default_collate(images)


def _quiet(_: int) -> None:
    warnings.filterwarnings("ignore", module="PIL")  # of odd metadata, once per process and epoch


def _context() -> BaseContext:
    # Not fork: it would copy torch's threads in whatever state they are. A server that has imported this module forks
    # processes at once; a spawned process has to import torch itself.
    if "forkserver" not in mp.get_all_start_methods():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    return context


def reason(error: Exception) -> str:
    """Why a file cannot be read, in a few words."""
    return shorten(getattr(error, "strerror", None) or str(error) or type(error).__name__, 200)
