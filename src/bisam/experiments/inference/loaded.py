"""Loaded: a trained model with its recipe, from a run folder, an exported folder, or a file of weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bisam.experiments.data import channels_of
from bisam.experiments.errors import RunError
from bisam.experiments.models.build import PRETRAINED, build
from bisam.experiments.models.initial import WEIGHTS_FILE, classes_of, is_run, read, source
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Result, Run, read_recipe
from bisam.experiments.runs.results import headline
from bisam.experiments.training.trained import network, result_of


@dataclass(frozen=True)
class Loaded:
    """A trained model.

    Attributes:
        place: the run folder, the exported folder or the file.
        model: on the CPU.
        recipe: model and data; of a file of weights it may not be that of its training.
        classes: number of logits.
        which: the weights of the run; None for a file.
        checksum: of the weights.
        result: of the run; None for a file.
    """

    place: Path
    model: nn.Module
    recipe: Recipe
    classes: int
    which: str | None
    checksum: str
    result: Result | None

    def on(self, fabric: Fabric) -> nn.Module:
        """Return the model on a device, in evaluation mode, in the precision and the memory format of its recipe."""
        model = self.model.to(fabric.device)
        if self.recipe.channels_last:
            model = cast(Any, model).to(memory_format=torch.channels_last)
        if self.recipe.compile:
            model.compile(dynamic=False, mode=self.recipe.compile_mode)
        return model.eval()


def load(
    given: str,
    root: Path,
    which: str | None = None,
    model: str | None = None,
    dataset: str | None = None,
    recipe: Recipe | None = None,
) -> Loaded:
    """Load a trained model.

    Args:
        given: the folder of a finished run, with or without `:best`, `:last` or `:ema`; a folder that `bisam export`
            wrote; or a file of weights.
        root: folder of the data sets.
        which: weights of a run: best, last or ema; None: those whose test score reports show.
        model: of a file of weights that does not say it; files and folders of `bisam export` do, but for .pt.
        dataset: the same for the data set.
        recipe: what else is known of a file of weights.

    Raises:
        ValueError: the weights, the model or its recipe cannot be loaded, or an argument is without effect.
        RunError: a run has no such weights.
    """
    one = source(given, root)
    if is_run(one.place):
        if one.which is not None and which not in (None, one.which):
            raise ValueError(f"{given} names the weights {one.which}, and --which {which}: leave one out")
        if model is not None or recipe is not None:
            what = f"--model {model}" if model is not None else "--config"
            raise ValueError(f"the folder of a run says what its model is: leave {what} out")
        return _of_run(Run(one.place, read_recipe(one.place)), which or one.which, root)
    if which is not None:
        raise ValueError(f"--which {which} chooses among the weights of a run, and {one.place} is no run folder")
    if not one.place.exists():
        there = Path("runs") / given
        more = f"did you mean {there}?" if there.exists() else "give the folder of a finished run, or a file of weights"
        raise ValueError(f"{given} does not exist: {more}")
    return _of_file(given, one.place, root, model, dataset, recipe)


def _of_run(run: Run, which: str | None, root: Path) -> Loaded:
    result = result_of(run)
    which = which or headline(result)
    found = read(f"{run.folder}:{which}", root)
    classes = classes_of(found.state)
    with torch.random.fork_rng(devices=[]):  # initial weights are drawn
        model = network(run, found.state, classes, channels_of(run.recipe), root)
    return Loaded(run.folder, model, run.recipe, classes, which, found.checksum, result)


def _of_file(
    given: str, place: Path, root: Path, model: str | None, dataset: str | None, recipe: Recipe | None
) -> Loaded:
    found = read(given, root)
    recipe = recipe or _recipe(place)
    if recipe is None and (model is None or dataset is None):
        missing = " and ".join(name for name, value in (("--model", model), ("--dataset", dataset)) if value is None)
        raise ValueError(f"{place} has weights alone: give {missing} too, or a recipe with --config")
    changed: dict[str, Any] = {
        name: value for name, value in (("model", model), ("dataset", dataset)) if value is not None
    }
    if recipe is None:
        recipe = Recipe(**changed)
    elif "model" in changed:
        recipe = replace(recipe, model=changed["model"])
    # The architecture of a model of Hugging Face is in its exported folder; recipes may name one of another machine.
    name, text = recipe.model, given
    if name.startswith("hf:") and (place / "config.json").is_file():
        name, text = f"hf:{place}", PRETRAINED
        recipe = replace(recipe, model=name)
    with torch.random.fork_rng(devices=[]):
        classes = _classes(found.state, build(name, 2, channels=channels_of(recipe), root=root))
        network = build(name, classes, channels=channels_of(recipe), weights=text, new_head=False, root=root)
    network = network.double() if recipe.precision == "64" else network
    return Loaded(place, network, recipe, classes, None, found.checksum, None)


def _classes(state: Mapping[str, Tensor], model: nn.Module) -> int:
    """The number of classes of the weights of a file, by the last ones of a model with other classes.

    A file of safetensors has the weights in the order of their names.
    """
    *_, head = (name.removeprefix("network.") for name, value in model.state_dict().items() if value.ndim)
    return classes_of({head: state[head]} if head in state else state)


def _recipe(place: Path) -> Recipe | None:
    """The recipe in an exported folder, or in the metadata of a file of safetensors; None if there is none."""
    if place.is_dir():
        if (place / "recipe.json").is_file():
            return replace(read_recipe(place), weights=None, frozen=None)
        place = place / WEIGHTS_FILE
    if place.suffix != ".safetensors":
        return None
    from safetensors import safe_open

    with safe_open(place, "pt") as file:
        metadata: dict[str, str] = file.metadata() or {}
    try:
        values = json.loads(metadata["bisam"])["recipe"]
        return replace(Recipe.from_dict(values), weights=None, frozen=None)
    except (KeyError, TypeError, ValueError, RunError):
        return None
