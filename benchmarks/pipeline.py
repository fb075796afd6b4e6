"""Images per second of two training pipelines: batched on tensors, and image by image.

python -m benchmarks.pipeline
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.measure import Parser, at_least, interleaved, interval, judged, load, ratio, report, verdict, write
from bisam.experiments.data.image_tensors import Augmentation, Images

REFERENCE = "torchvision, image by image"
OURS = "bisam, in batches"
BAR = 10.0
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CUTOUT = 16


class PILImages(Dataset[tuple[Tensor, int]]):
    """Images in the format of torchvision.datasets.CIFAR10: stored as an array (N, H, W, 3), returned as PIL images."""

    def __init__(self, images: np.ndarray, labels: Sequence[int], transform: Callable[[Any], Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[i])), self.labels[i]


class Cutout:
    """Zeros a square in half of the images (C, H, W), as in the BiSAM authors' code; it may extend past the border."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        if torch.rand(()) < 0.5:
            half = self.size // 2
            top, left = (int(torch.randint(-half, side - half, ())) for side in image.shape[1:])
            image[:, max(0, top) : max(0, top + self.size), max(0, left) : max(0, left + self.size)] = 0
        return image


def per_image(images: np.ndarray, labels: list[int], batch_size: int, cutout: int) -> DataLoader[Any]:
    """The usual pipeline of torchvision transforms, in the main process."""
    side = images.shape[1]
    steps: list[Callable[[Any], Any]] = [
        transforms.RandomCrop(side, padding=4),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(MEAN, STD),
    ]
    change = transforms.Compose([*steps, Cutout(cutout)] if cutout else steps)
    return DataLoader(PILImages(images, labels, change), batch_size, shuffle=True, num_workers=0)


def in_batches(images: np.ndarray, labels: list[int], batch_size: int, cutout: int) -> Callable[[], Iterable[Any]]:
    """The pipeline of bisam; each call returns an epoch."""
    tensors = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    split = Images(tensors, torch.tensor(labels), torch.tensor(MEAN), torch.tensor(STD), Augmentation(cutout=cutout))
    return partial(split.batches, batch_size, torch.Generator().manual_seed(0))


def exhaust(batches: Callable[[], Iterable[Any]]) -> None:
    for _ in batches():
        pass


def rows(count: int, batch_size: int, repeats: int, cutout: int) -> list[dict[str, Any]]:
    """One row per pipeline; `median` is its number of images per second relative to the reference."""
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), random.integers(0, 10, count).tolist()
    loader = per_image(images, labels, batch_size, cutout)
    epochs = {REFERENCE: lambda: loader, OURS: in_batches(images, labels, batch_size, cutout)}
    times = interleaved({name: partial(exhaust, batches) for name, batches in epochs.items()}, repeats)
    found: list[dict[str, Any]] = []
    for name in epochs:
        speed, own = ratio(times, REFERENCE, name), ratio(times, name, REFERENCE).seconds
        bar = BAR if name == OURS else None
        row = {"contestant": name, "cutout": cutout, **judged(speed, bar, at_least=True)}
        found.append(row | {"seconds": own, "images_per_second": count / own})
    return found


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "benchmarks.pipeline",
        "Images per second of batched augmentation (crop, flip, standardisation; with and without Cutout) relative to "
        "torchvision transforms applied image by image in the main process, on random images of CIFAR's size.",
        "  python -m benchmarks.pipeline\n"
        "  python -m benchmarks.pipeline --images 5120 --repeats 51 --json pipeline.json",
        repeats=31,
    )
    parser.add_argument("--images", type=at_least(1), default=1280, help="images per epoch (default: %(default)s)")
    parser.add_argument("--batch-size", type=at_least(1), default=128, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    parser.begin(arguments.threads)

    found: list[dict[str, Any]] = []
    for cutout in (0, CUTOUT):
        found += rows(arguments.images, arguments.batch_size, arguments.repeats, cutout)
    report(
        "Images per second, relative to torchvision transforms applied image by image",
        {
            "augmentation": augmentation,
            "pipeline": lambda r: r["contestant"],
            "images / s": lambda r: f"{r['images_per_second']:,.0f}",
            "ratio": lambda r: f"{r['median']:.1f}",
            "95 % interval": lambda r: interval(r, 1),
            "verdict": verdict,
        },
        found,
        [load(found)],
    )
    if arguments.json:
        settings = {"images": arguments.images, "batch_size": arguments.batch_size, "repeats": arguments.repeats}
        write(arguments.json, "pipeline", settings, {"rows": found})


def augmentation(row: dict[str, Any]) -> str:
    """Name of the augmentation of a row."""
    return "crop, flip, Cutout" if row["cutout"] else "crop, flip"


if __name__ == "__main__":
    main()
