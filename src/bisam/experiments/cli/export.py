"""`bisam export`: the weights of a finished run, for other programs."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bisam.experiments.cli.folders import check_folder
from bisam.experiments.cli.terminal import console
from bisam.experiments.runs.files import make_folders
from bisam.experiments.runs.machine import Machine

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bisam.experiments.models.hub import Hub
    from bisam.experiments.recipes.recipe import Recipe

EXAMPLES = (
    "bisam export RUN --to model.safetensors",
    "bisam export RUN --which last --to model.onnx",
    "bisam export RUN --to folder",
    "bisam export RUN --push-to-hub USER/NAME --private",
)

_DATA = Machine().data_dir


def export(
    run: Path,
    *,
    to: Path | None = None,
    which: str | None = None,
    push_to_hub: str | None = None,
    private: Annotated[bool, Parameter(negative="")] = False,
    data_dir: Path = _DATA,
    download: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Write the weights of a finished run in a format that other programs read.

    The format follows from the name: .safetensors, .pt or .pth is the state dict of the model, with the recipe and the
    scores in the metadata of safetensors. .pt2 (torch.export) and .onnx are programs that need no code of the model.
    Any other name is a folder with a model card, whose code loads it: with from_pretrained for models of Hugging Face,
    with timm.create_model for those of timm.

    Args:
        run: Folder of a finished run.
        to: File or new folder to write.
        which: Weights: best (of the best validation epoch), last, or ema; by default those whose test score reports
            show.
        push_to_hub: Repository USER/NAME on the Hugging Face hub to write the folder to, with or without --to. It needs
            a token: hf auth login, or HF_TOKEN.
        private: Create the repository as one that only you may see.
        data_dir: Folder of the data sets: a program needs an image's size, and pretrained models may be in it.
        download: Download a data set that is missing in the data folder, for a program.
    """
    from bisam.experiments.data import channels_of
    from bisam.experiments.models.card import WHICH, without_places
    from bisam.experiments.models.files import PROGRAMS, STATES, classes_of, write_program, write_state
    from bisam.experiments.models.hub import Hub
    from bisam.experiments.runs.folder import Run, read_recipe
    from bisam.experiments.runs.results import headline
    from bisam.experiments.training.trained import network, result_of, weights

    _check(run, to, push_to_hub, private)
    found = Run(run, read_recipe(run))
    recipe, result = found.recipe, result_of(found)
    which = which or headline(result)
    state = weights(found, result, which)
    hub = None if push_to_hub is None else Hub(push_to_hub, private)
    model = network(found, state, classes_of(state), channels_of(recipe), data_dir).eval()
    scores = result.get("scores", {}).get(which, {})
    facts = {
        "recipe": recipe.to_dict() if hub is None else without_places(recipe),
        "weights": which,
        "scores": scores,
        **{key: value for key, value in result.items() if key in _MADE},
    }
    if to is not None and to.suffix in STATES:
        _to_file(to, lambda path: write_state(model, path, facts))
    elif to is not None and to.suffix in PROGRAMS:
        images = _images(recipe, Machine(data_dir=data_dir, download=download, log=()))
        _to_file(to, lambda path: write_program(model, path, images))
    elif to is not None:
        _to_folder(to, model, recipe, facts, data_dir)
    place = str(to)
    if hub is not None:
        place = _pushed(hub, model, recipe, facts, data_dir) + (f", {to}" if to is not None else "")
    said = ", ".join((WHICH[which], *_written(scores)))
    console.print(f"{place}: {recipe.model} on {recipe.dataset}, {said}", soft_wrap=True, highlight=False)
    return 0


_MADE = ("bisam", "commit", "torch", "python", "finished")
"""Entries of a result that tell where a model comes from."""


def _check(run: Path, to: Path | None, push_to_hub: str | None, private: bool) -> None:
    if to is None and push_to_hub is None:
        raise ValueError("nowhere to write: give --to, such as --to model.safetensors, or --push-to-hub USER/NAME")
    if private and push_to_hub is None:
        raise ValueError("--private is a property of a repository on the hub: give --push-to-hub, or leave it out")
    if to is not None and push_to_hub is not None and to.suffix:
        raise ValueError(f"the hub gets a folder: leave --to {to} out, or give a name without suffix")
    if not (run / "recipe.json").is_file():
        if run.is_dir() and (inside := sorted(run.rglob("recipe.json"))):
            raise ValueError(f"{run} has {len(inside)} runs: give one, such as {inside[0].parent}")
        there = Path("runs") / run
        remedy = f"did you mean {there}?" if (there / "recipe.json").is_file() else "give the folder of a finished run"
        raise ValueError(f"{run} is no run folder, which has a recipe.json: {remedy}")
    if to is None:
        return
    check_folder(to.absolute().parent)
    from bisam.experiments.models.files import PROGRAMS, STATES

    known = (*STATES, *PROGRAMS)
    if to.suffix[1:].isalpha() and to.suffix not in known and not to.is_dir():
        raise ValueError(
            f"--to {to}: a file ends in {', '.join(known[:-1])} or {known[-1]}, and a folder has no suffix"
        )
    if to.suffix and to.is_dir():
        raise ValueError(f"--to {to} is a folder, and its name that of a file: give another one")
    if not to.suffix and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to {to} exists: give a new folder, or a file such as {to / 'model.safetensors'}")


def _to_file(to: Path, write: Callable[[Path], None]) -> None:
    """Write a file to a temporary name first; the suffix remains, because it tells the format."""
    make_folders(to.parent)
    temporary = to.with_name(f".{os.getpid()}.{to.name}")
    try:
        write(temporary)
        temporary.replace(to)
    finally:
        temporary.unlink(missing_ok=True)


def _to_folder(to: Path, model: nn.Module, recipe: Recipe, facts: Mapping[str, Any], root: Path) -> None:
    temporary = to.with_name(f".{os.getpid()}.{to.name}")
    make_folders(temporary)
    try:
        _fill(temporary, model, recipe, facts, root, str(to))
        if to.exists():
            to.rmdir()  # empty, see _check
        temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _pushed(hub: Hub, model: nn.Module, recipe: Recipe, facts: Mapping[str, Any], root: Path) -> str:
    """Write a folder and upload it; return the address of the repository."""
    with tempfile.TemporaryDirectory() as folder:
        _fill(Path(folder), model, recipe, facts, root, hub.name, on_hub=True)
        return hub.push(Path(folder))


def _fill(
    folder: Path,
    model: nn.Module,
    recipe: Recipe,
    facts: Mapping[str, Any],
    root: Path,
    place: str,
    *,
    on_hub: bool = False,
) -> None:
    """Write the model, its recipe and its card into an empty folder, which is to be found at a place."""
    from bisam.experiments.data import channels_of
    from bisam.experiments.models.card import card
    from bisam.experiments.models.files import code_of, write_folder
    from bisam.experiments.recipes.recipe import Recipe

    write_folder(model, recipe.model, folder, facts, root)
    shown = Recipe.from_dict(facts["recipe"])
    code = code_of(model, shown.model, channels_of(recipe), place, on_hub=on_hub)
    (folder / "recipe.json").write_text(json.dumps(facts["recipe"], indent=2) + "\n")
    (folder / "README.md").write_text(card(shown, facts, code), encoding="utf-8")


def _images(recipe: Recipe, machine: Machine) -> Tensor:
    """Two images of the test set, as the model takes them."""
    from bisam.experiments import data
    from bisam.experiments.training.epoch import prepared

    inputs, _ = next(iter(data.load(recipe, machine).test.batches(2)))
    images = prepared(inputs, recipe)
    if isinstance(images, dict):
        raise ValueError("a program takes images: export a model of texts to a folder; give --to a name without suffix")
    return images.double() if recipe.precision == "64" else images


def _written(scores: Mapping[str, float]) -> list[str]:
    return [f"{name} {score:.4f}" for name, score in scores.items()]
