"""Names: the classes of a data set by their names, for predictions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from bisam.experiments.data.glue import TASKS
from bisam.experiments.data.image_folders import class_folders
from bisam.experiments.errors import reason


def class_names(dataset: str, place: Path, root: Path) -> list[str]:
    """Return the names of the classes of a data set, in the order of their numbers; [] if it has none.

    Args:
        dataset: name of the data set, see `bisam.experiments.data.NAMES`.
        place: the folder of a user's own images.
        root: folder of the data sets.

    Raises:
        ValueError: the data set is missing.
    """
    kind, _, detail = dataset.partition(":")
    match kind:
        case "digits":
            return [str(digit) for digit in range(10)]
        case "glue":
            return list(TASKS[detail].labels)
        case "folder":
            return class_folders(place)
        case "imagenet":
            return class_folders(root / "imagenet")
        case "cifar10" | "cifar100":
            from torchvision.datasets import CIFAR10, CIFAR100

            kinds = {"cifar10": CIFAR10, "cifar100": CIFAR100}
            return _of(lambda: kinds[kind](str(root), train=False).classes)
        case "pets":
            from torchvision.datasets import OxfordIIITPet

            return _of(lambda: OxfordIIITPet(str(root), "test").classes)
        case "flowers":
            from torchvision.datasets import Flowers102

            return list(getattr(Flowers102, "classes", ()))  # since torchvision 0.21
        case _:
            return []


def _of(read: Callable[[], list[str]]) -> list[str]:
    """The classes of a data set of torchvision."""
    try:
        return list(read())
    except (RuntimeError, OSError, EOFError, LookupError) as error:
        raise ValueError(f"the names of the classes are missing ({reason(error)})") from error
