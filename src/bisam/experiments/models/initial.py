"""Initial: the weights that a model starts with, in a file or in the folder of a finished run.

    read("model.safetensors", root)
    read("runs/train/sam-noise-0-1f0c22e9/seed-0:last", root)
    pinned("model.pt", root)            # "model.pt@6c1f0a9be0d35f27"

The text after @ is a checksum of the tensors. A recipe whose weights have one is another recipe once they change, so
that no run resumes with others.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bisam.experiments.errors import reason, reason_not_loaded, unknown
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.checkpoint import CHECKPOINT
from bisam.experiments.runs.folder import Run, read_recipe
from bisam.experiments.runs.results import WEIGHTS as KINDS
from bisam.experiments.runs.weights import result_of, weights as weights_of

PRETRAINED = "pretrained"
"""The weights that the source of a model has for it."""
WEIGHTS = "weights"
"""Folder of models and weights in the folder of the data sets."""
WEIGHTS_FILE = "model.safetensors"
"""The weights in a folder that `bisam export` or another library wrote."""

_PREFIXES = ("module.", "network.")


@dataclass(frozen=True)
class Source:
    """Where weights are.

    Attributes:
        text: the place as it was given.
        place: a file, or the folder of a run.
        which: one of the weights of a run; None if it is not given, or for a file.
        checksum: that the weights must have; None: any.
    """

    text: str
    place: Path
    which: str | None
    checksum: str | None


@dataclass(frozen=True)
class Initial:
    """Weights as they were read.

    Attributes:
        state: by name. Of a run without those that it did not train.
        recipe: of the run; None for a file.
        place: as it was given, with which of the weights of a run they are.
        checksum: of the weights.
    """

    state: dict[str, Tensor]
    recipe: Recipe | None
    place: str
    checksum: str


def local(path: str, root: Path | None) -> Path:
    """Return a path, or the same in the folder of weights if only that exists."""
    here = Path(path).expanduser()
    there = here if root is None else root / WEIGHTS / here  # the same if it is absolute
    return there if there.exists() and not here.exists() else here


def source(given: str, root: Path | None) -> Source:
    """Return what a text names: a file, or a run folder with `:best`, `:last` or `:ema` after it; then `@CHECKSUM`.

    Raises:
        ValueError: it names a run folder, and something else than its weights.
    """
    text, which, checksum = given, None, None
    if not local(text, root).exists() and (found := re.fullmatch(r"(.+)@([0-9a-f]{16})", text)):
        text, checksum = found.groups()
    if not local(text, root).exists() and (found := re.fullmatch(rf"(.+):({'|'.join(KINDS)})", text)):
        text, which = found.groups()
    if not local(text, root).exists() and (local(text.rpartition(":")[0], root) / "recipe.json").is_file():
        raise unknown("weights of a run", text.rpartition(":")[2], KINDS)
    return Source(text, local(text, root), which, checksum)


def is_run(place: Path) -> bool:
    """Whether it is the folder of a run, and not one that `bisam export` wrote, which has a recipe.json too."""
    return (place / "recipe.json").is_file() and ((place / CHECKPOINT).exists() or not (place / WEIGHTS_FILE).is_file())


def read(given: str, root: Path | None) -> Initial:
    """Return the weights in a file or of a finished run.

    Args:
        given: see `source`. Of a run without a choice they are those of the best validation epoch.
        root: folder of the data sets. A relative path that does not exist is looked for in its folder `weights`.

    Raises:
        ValueError: they cannot be read, or their checksum is another one.
        RunError: the run is unfinished, has diverged, or has no such weights.
    """
    one = source(given, root)
    if is_run(one.place):
        run = Run(one.place, read_recipe(one.place))
        result, recipe = result_of(run), run.recipe
        which = one.which or "best"
        state, place = dict(weights_of(run, result, which)), f"{one.text.rstrip('/')}:{which}"
        # Frozen weights are those with which the run started.
        origin = f"{recipe.model} {pinned(recipe.weights, root)}" if recipe.frozen is not None else ""
    else:
        if one.which is not None:
            raise ValueError(f"weights {given!r}: {one.place} is no run folder, of which :{one.which} is a choice")
        state, recipe, place, origin = _in_file(_file(one), root), None, one.text.rstrip("/"), ""
    checksum = _checksum(state, origin)
    if one.checksum not in (None, checksum):
        raise ValueError(
            f"the weights of {place} have changed: their checksum is {checksum}, and the recipe has @{one.checksum}; "
            f"write {place} without it to start a new run from the present ones"
        )
    return Initial(state, recipe, place, checksum)


def pinned(given: str | None, root: Path | None) -> str | None:
    """Return initial weights with their checksum, as they stand in a recipe; others than those of files as they are.

    Raises:
        ValueError: see `read`.
        RunError: see `read`.
    """
    if given is None or given == PRETRAINED:
        return given
    found = read(given, root)
    return f"{found.place}@{found.checksum}"


def without_prefixes(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a state dict without the prefixes of `DistributedDataParallel`, Lightning and `Logits`."""
    found = dict(state)
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in found):
            found = {name.removeprefix(prefix): tensor for name, tensor in found.items()}
    return found


def classes_of(state: Mapping[str, Tensor]) -> int:
    """Return the number of classes of a model, by its weights: the length of the last one, which is that of the head.

    Raises:
        ValueError: there are no weights.
    """
    vectors = [value for value in state.values() if value.ndim]
    if not vectors:
        raise ValueError("the model has no weights")
    return vectors[-1].shape[0]


def _file(one: Source) -> Path:
    """The file of weights at a place."""
    if one.place.name == CHECKPOINT and is_run(one.place.parent):
        raise ValueError(f"weights {one.text!r}: {CHECKPOINT} holds a whole run: give its folder, {one.place.parent}")
    if not one.place.is_dir():
        return one.place
    if (one.place / WEIGHTS_FILE).is_file():
        return one.place / WEIGHTS_FILE
    if inside := sorted(one.place.rglob("recipe.json")):
        raise ValueError(f"weights {one.text!r}: {one.place} has {len(inside)} runs: give one, as {inside[0].parent}")
    raise ValueError(
        f"weights {one.text!r}: {one.place} has neither a recipe.json nor a {WEIGHTS_FILE}: give a file of weights, or "
        "the folder of a finished run"
    )


def _in_file(path: Path, root: Path | None) -> dict[str, Tensor]:
    """Load the state dict in a file."""
    wanted = "give the path of a file that torch.save(model.state_dict(), path) wrote, a run folder, or 'pretrained'"
    given = str(path)
    if root is not None and not path.exists() and not path.is_absolute():
        wanted += f"; a file is looked for in {root / WEIGHTS} too"
    if given.endswith(".safetensors"):
        load = _package("safetensors.torch", f"the file {given!r}").load_file
    else:
        load = partial(torch.load, map_location="cpu", weights_only=True)
    try:
        loaded = load(given)
    except OSError as error:
        raise ValueError(f"weights {given!r} cannot be read ({error.strerror or reason(error)}): {wanted}") from error
    # A broken file can raise errors of any type.
    except Exception as error:
        raise ValueError(
            f"weights {given!r} are not a file of tensors alone ({reason_not_loaded(error)}): {wanted}"
        ) from error
    if isinstance(loaded, Mapping) and "state_dict" in loaded:
        loaded = loaded["state_dict"]
    if not isinstance(loaded, Mapping) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ValueError(f"weights {given!r} are not a state dict: {wanted}")
    return {str(name): tensor for name, tensor in loaded.items()}


def _checksum(state: Mapping[str, Tensor], origin: str) -> str:
    """A checksum of names and values; it does not depend on their order, or on the format of the file."""
    digest = blake2b(origin.encode(), digest_size=8)
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _package(package: str, what: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        package = package.partition(".")[0]
        raise ValueError(f"{what} needs {package}: pip install 'bisam[experiments]'") from error
