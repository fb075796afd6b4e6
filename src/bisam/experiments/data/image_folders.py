"""Image folders: ImageNet, Flowers-102, Pets, and folders of a user's own images.

data = folder(Path("photographs"), seed=0, image_size=224, processes=8)
for x, y in data.train.batches(128, generator):
    ...
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from bisam.experiments.data.image_files import Channels, Folder
from bisam.experiments.data.splits import Data, drawn
from bisam.experiments.errors import reason

ENDINGS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
"""Ends of the names of image files."""
_VALIDATION = ("val", "valid", "validation")
_PARTS = {"train", *_VALIDATION, "test"}
CHECKED = 20_000  # data sets with more images are not checked in advance: on a slow disk it would take minutes


def imagenet(root: Path, seed: int, image_size: int = 224, processes: int = 0, held_out: float | None = None) -> Data:
    """Load ImageNet-1K (Russakovsky et al., 2015, https://arxiv.org/abs/1409.0575), or a subset of its classes.

    The official validation images are the test split. 2 % of the training images are held out for validation,
    stratified by class.

    Args:
        root: folder that contains `imagenet/train/WNID/*.JPEG` and `imagenet/val/WNID/*.JPEG`.
        seed: draws the held-out images.
        image_size: height and width in pixels.
        processes: worker processes that decode images; 0: this process decodes them.
        held_out: see `folder`; by default 2 %.

    Raises:
        ValueError: the data set is missing or damaged.
    """
    place = root.absolute() / "imagenet"
    missing = [name for name in ("train", "val") if not (place / name).is_dir()]
    if missing:
        raise ValueError(
            f"ImageNet is missing (no {place / missing[0]}): unpack the images of https://image-net.org to "
            f"{place}/train/WNID/*.JPEG and {place}/val/WNID/*.JPEG (or set --data-dir to the folder that contains "
            "imagenet)"
        )
    data = _from_parts(place, "val", None, seed, image_size, processes, 0.02 if held_out is None else held_out)
    return replace(data, metrics=("accuracy", "top5"))


def flowers(root: Path, image_size: int = 224, processes: int = 0, download: bool = False) -> Data:
    """Load Oxford Flowers-102 (Nilsback and Zisserman, 2008), with its official splits of 1,020, 1,020, 6,149 images.

    Args:
        root: folder that contains `flowers-102`.
        image_size: height and width in pixels.
        processes: worker processes that decode images; 0: this process decodes them.
        download: whether to download missing files, from https://www.robots.ox.ac.uk/~vgg/data/flowers/102/.

    Raises:
        ValueError: the data set is missing or damaged.
    """
    from torchvision.datasets import Flowers102

    place = root.absolute() / "flowers-102"
    fetch = f"102flowers.tgz, unpacked, imagelabels.mat and setid.mat of {Flowers102._download_url_prefix} into {place}"
    parts = _official(Flowers102, ("train", "val", "test"), "Flowers-102", place, fetch, download)
    train, validation, test = (
        _shuffled(part._image_files, torch.tensor(part._labels), image_size, processes) for part in parts
    )
    _check([*train.paths, *validation.paths, *test.paths], place, f"delete {place / 'jpg'} and put {fetch}")
    return Data(replace(train, training=True), validation, test, classes=102)


def pets(
    root: Path,
    seed: int,
    image_size: int = 224,
    processes: int = 0,
    download: bool = False,
    held_out: float | None = None,
) -> Data:
    """Load Oxford-IIIT Pet (Parkhi et al., 2012), 37 breeds, with its official splits of 3,680 and 3,669 images.

    10 % of the former are held out for validation, stratified by class.

    Args:
        root: folder that contains `oxford-iiit-pet`.
        seed: draws the held-out images.
        image_size: height and width in pixels.
        processes: worker processes that decode images; 0: this process decodes them.
        download: whether to download missing files, from https://www.robots.ox.ac.uk/~vgg/data/pets/.
        held_out: see `folder`.

    Raises:
        ValueError: the data set is missing or damaged.
    """
    from torchvision.datasets import OxfordIIITPet

    place = root.absolute() / "oxford-iiit-pet"
    fetch = (
        f"images.tar.gz and annotations.tar.gz of https://www.robots.ox.ac.uk/~vgg/data/pets/, unpacked, into {place}"
    )
    parts = _official(OxfordIIITPet, ("trainval", "test"), "Oxford-IIIT Pet", place, fetch, download)
    whole, test = (_shuffled(part._images, torch.tensor(part._labels), image_size, processes) for part in parts)
    _check([*whole.paths, *test.paths], place, f"delete {place} and put {fetch}")
    train, validation = _held_out(whole, place, seed, held_out)
    return Data(train, validation, test, classes=37)


def folder(path: Path, seed: int, image_size: int = 224, processes: int = 0, held_out: float | None = None) -> Data:
    """Load a user's images, with a folder for each class.

    Two layouts are supported:

    * `path/train/CLASS/*`, optionally with `path/val/CLASS/*` and `path/test/CLASS/*`. Without `val`, 10 % of the
      training images are held out for validation. Without `test`, `val` is the test split. Without both, 10 % are held
      out for each.
    * `path/CLASS/*`, which is split 80/10/10 per cent.

    Held-out images are stratified by class. The folder of a class is searched recursively; files that are not images
    are ignored.

    Args:
        path: the folder.
        seed: draws the held-out images.
        image_size: height and width in pixels.
        processes: worker processes that decode images; 0: this process decodes them.
        held_out: share of the training images of each class that is held out for validation, after those for the test;
            by default 10 %. 0: none; then the validation split is that of the training images, not augmented.

    Raises:
        ValueError: the folder is missing, classes are empty or differ between the splits, images cannot be read, or
            `held_out` is given and the folder has a split for validation of its own.
    """
    path = path.absolute()
    names = set(_subfolders(path))
    if not names:
        raise _classless(path)
    if not _has_parts(path, names):
        whole, classes = _found(path, image_size, processes)
        return Data(*_in_three(whole, path, seed, held_out), classes=len(classes))
    if "train" not in names:
        raise ValueError(
            f"{path} has {', '.join(sorted(names))} and no train: put the training images into {path / 'train'}/CLASS/"
        )
    validation, test = next((name for name in _VALIDATION if name in names), None), "test" if "test" in names else None
    if held_out is not None and validation is not None and test is not None:
        raise ValueError(f"{path} has {validation} for validation, from which nothing is held out: leave held_out out")
    return _from_parts(path, validation, test, seed, image_size, processes, held_out)


def class_folders(path: Path) -> list[str]:
    """Return the names of the classes of a user's images, see `folder`, in the order of their numbers.

    Raises:
        ValueError: the folder is missing.
    """
    names = _subfolders(path)
    return _subfolders(path / "train") if _has_parts(path, set(names)) else names


def _has_parts(path: Path, names: set[str]) -> bool:
    """Whether the folders in a folder are splits, and not classes."""
    return names <= _PARTS or ("train" in names and bool(_subfolders(path / "train")))


def standardised(data: Data, mean: Channels, std: Channels) -> Data:
    """Return `data` of image files with another mean and standard deviation of the channels, as shares of 255."""
    parts = {name: replace(getattr(data, name), mean=mean, std=std) for name in ("train", "validation", "test")}
    return replace(data, **parts)


def _from_parts(
    path: Path,
    validation: str | None,
    test: str | None,
    seed: int,
    image_size: int,
    processes: int,
    held_out: float | None = None,
) -> Data:
    """Load `path/train` and the named splits; for a missing one, training images are held out."""
    names = [name for name in (validation, test) if name is not None]
    root = path / "train"
    whole, classes = _found(root, image_size, processes)
    parts: list[Folder] = []
    for name in names:
        part, there = _found(path / name, image_size, processes)
        only = {"train": sorted(set(classes) - set(there)), name: sorted(set(there) - set(classes))}
        if any(only.values()):
            wrong = " and ".join(f"{_some(values)} only in {where}" for where, values in only.items() if values)
            raise ValueError(f"the parts of {path} have different classes, {wrong}: give each the same class folders")
        parts.append(part)
    match parts:
        case []:
            splits = _in_three(whole, root, seed, held_out)
        case [only_part]:
            splits = (*_held_out(whole, root, seed, held_out), only_part)
        case _:
            splits = (replace(whole, training=True), *parts)
    return Data(*splits, classes=len(classes))


def _found(root: Path, image_size: int, processes: int) -> tuple[Folder, list[str]]:
    """Return all images in the class folders of `root`, not augmented, and the classes."""
    images: dict[str, list[str]] = {}
    for name in _subfolders(root):
        images[name] = sorted(
            os.path.join(place, file)
            for place, _, files in os.walk(root / name, followlinks=True)
            for file in files
            if file.lower().endswith(ENDINGS) and not file.startswith(".")
        )
    if len(images) < 2:
        raise _classless(root, *images)
    if empty := [name for name, paths in images.items() if not paths]:
        raise ValueError(
            f"{len(empty)} of {len(images)} class folders in {root} have no images: {_some(empty)}: put images there "
            f"({', '.join(ENDINGS)}), or delete them"
        )
    paths = [path for each in images.values() for path in each]
    labels = torch.arange(len(images)).repeat_interleave(torch.tensor([len(each) for each in images.values()]))
    _check(paths, root)
    return _shuffled(paths, labels, image_size, processes), list(images)


def _shuffled(paths: Sequence[str | Path], labels: Tensor, image_size: int, processes: int) -> Folder:
    # Files are listed class by class; the first few test images, which --limit keeps, would have a single class.
    order = torch.from_numpy(np.random.default_rng(42).permutation(len(labels)))
    return Folder([str(paths[i]) for i in order.tolist()], labels[order], image_size, processes=processes)


def _subfolders(root: Path) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise ValueError(
            f"{root} cannot be read ({reason(error)}): give a folder with a folder for each class"
        ) from error


def _classless(root: Path, *only: str) -> ValueError:
    there = f"one class folder, {only[0]}" if only else "no class folders"
    return ValueError(f"{root} has {there}: put the images of each class into a folder of its own, {root}/CLASS/*.jpg")


def _held_out(whole: Folder, root: Path, seed: int, share: float | None = None) -> tuple[Folder, Folder]:
    """Return the training images, and a share of them, by default a tenth, held out as the seed draws them."""
    if share == 0:
        return replace(whole, training=True), whole
    whole = whole.chosen(drawn(len(whole), seed))
    held = _chosen(whole.labels, _TENTH if share is None else share)
    return _parts(whole, root, ~held, held)


def _in_three(whole: Folder, root: Path, seed: int, share: float | None = None) -> tuple[Folder, Folder, Folder]:
    """Return the training, the validation and the test images, by default 80, 10 and 10 %, as the seed draws them."""
    whole = whole.chosen(drawn(len(whole), seed))
    if share is None:
        place = _place(whole.labels)
        validation, test = ((place >= 0) & (place % 10 == at) for at in (4, 9))
        return _parts(whole, root, ~(validation | test), validation, test)
    held = _chosen(whole.labels, _TENTH)
    rest, test = _parts(whole, root, ~held, held)
    return *_held_out(replace(rest, training=False), root, seed, share), test


_TENTH = 0.1


def _parts(whole: Folder, root: Path, *chosen: Tensor) -> Any:
    if not all(mask.any() for mask in chosen):
        raise ValueError(
            f"{root} has {len(whole)} images, too few to hold some out: add images, or val and test folders"
        )
    train, *others = (whole.where(mask) for mask in chosen)
    return replace(train, training=True), *others


def _chosen(labels: Tensor, share: float) -> Tensor:
    """Return which images (N,) are a share of all, stratified by class; never the only image of a class."""
    exact = Fraction(share).limit_denominator(10**6)
    place = _place(labels)
    before, after = (at * exact.numerator // exact.denominator for at in (place, place + 1))
    return (after > before) & (place >= 0)


def _place(labels: Tensor) -> Tensor:
    """Return the position (N,) of each image in an order by class; -1 for the only image of a class.

    The images at positions with equal distances are a stratified sample, up to one image per class.
    """
    order = labels.argsort(stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    place[torch.bincount(labels)[labels] == 1] = -1
    return place


def _official(kind: Any, parts: Sequence[str], name: str, place: Path, fetch: str, download: bool) -> list[Any]:
    """Return the splits of a data set of torchvision in `place`."""
    root = place.parent
    try:
        if not download:
            return [kind(str(root), part) for part in parts]
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{place.name}.lock"):  # only one of the processes of a study downloads it
            return [kind(str(root), part, download=True) for part in parts]
    except (RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        if download:
            raise ValueError(f"{name} could not be downloaded ({reason(error)}): put {fetch} yourself") from error
        what = "is incomplete" if place.exists() else "is missing"
        raise ValueError(
            f"{name} {what}: give --download, or put {fetch} (or set --data-dir to the folder "
            f"that contains {place.name})"
        ) from error


def _check(paths: Sequence[str], root: Path, remedy: str = "replace or delete them") -> None:
    """Check that images can be read, as far as the headers and ends of the files show.

    Raises:
        ValueError: some cannot.
    """
    if len(paths) > CHECKED:
        return
    with warnings.catch_warnings(), ThreadPoolExecutor(8) as pool:
        warnings.simplefilter("ignore")  # about images that can be read nevertheless
        damaged = [path for path, wrong in zip(paths, pool.map(_damaged, paths), strict=True) if wrong]
    if damaged:
        names = _some([os.path.relpath(path, root) for path in damaged])
        raise ValueError(f"{len(damaged):,} of {len(paths):,} images in {root} cannot be read: {names}: {remedy}")


def _damaged(path: str) -> bool:
    try:
        with open(path, "rb") as file:
            file.seek(-2, os.SEEK_END)
            ends = file.read() == b"\xff\xd9"
            file.seek(0)
            with Image.open(file) as image:
                if image.format == "PNG":
                    image.verify()
                elif image.format != "JPEG" or not ends:
                    image.load()  # a JPEG without its end marker may be truncated, or have harmless bytes appended
    except Exception:  # each format raises another type of error
        return True
    return False


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
