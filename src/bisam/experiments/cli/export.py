"""`bisam export`: the weights of a finished run, for other programs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from bisam.experiments.cli.terminal import console
from bisam.experiments.runs.files import make_folders
from bisam.experiments.runs.machine import Machine

if TYPE_CHECKING:
    from torch import Tensor, nn

    from bisam.experiments.recipes.recipe import Recipe

EXAMPLES = (
    "Examples:  bisam export RUN --to model.safetensors   |   bisam export RUN --which last --to model.onnx   |   "
    "bisam export RUN --to folder"
)

_DATA = Machine().data_dir


def export(
    run: Path,
    *,
    to: Path,
    which: str | None = None,
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
        data_dir: Folder of the data sets: a program needs an image's size, and pretrained models may be in it.
        download: Download a data set that is missing in the data folder, for a program.
    """
    from bisam.experiments.data import channels_of
    from bisam.experiments.models.files import PROGRAMS, STATES, classes_of, write_program, write_state
    from bisam.experiments.runs.folder import Run, read_recipe
    from bisam.experiments.runs.results import headline
    from bisam.experiments.training.trained import network, result_of, weights

    _check(run, to)
    found = Run(run, read_recipe(run))
    recipe, result = found.recipe, result_of(found)
    which = which or headline(result)
    state = weights(found, result, which)
    model = network(found, state, classes_of(state), channels_of(recipe), data_dir).eval()
    scores = result.get("scores", {}).get(which, {})
    facts = {
        "recipe": recipe.to_dict(),
        "weights": which,
        "scores": scores,
        **{key: value for key, value in result.items() if key in ("bisam", "commit", "torch", "finished")},
    }
    if to.suffix in STATES:
        _to_file(to, lambda path: write_state(model, path, facts))
    elif to.suffix in PROGRAMS:
        images = _images(recipe, Machine(data_dir=data_dir, download=download, log=()))
        _to_file(to, lambda path: write_program(model, path, images))
    else:
        _to_folder(to, model, recipe, facts, data_dir)
    console.print(
        f"{to}: {recipe.model} on {recipe.dataset}, {_of(which)}" + "".join(f", {one}" for one in _written(scores)),
        soft_wrap=True,
        highlight=False,
    )
    return 0


def _check(run: Path, to: Path) -> None:
    if not (run / "recipe.json").is_file():
        if run.is_dir() and (inside := sorted(run.rglob("recipe.json"))):
            raise ValueError(f"{run} has {len(inside)} runs: give one, such as {inside[0].parent}")
        there = Path("runs") / run
        remedy = f"did you mean {there}?" if (there / "recipe.json").is_file() else "give the folder of a finished run"
        raise ValueError(f"{run} is no run folder, which has a recipe.json: {remedy}")
    if to.suffix and to.is_dir():
        raise ValueError(f"--to {to} is a folder, and its name that of a file: give another one")
    if not to.suffix and to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"--to {to} exists: give a new folder, or a file such as {to}.safetensors")


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
    from bisam.experiments.data import channels_of
    from bisam.experiments.models.files import write_folder

    temporary = to.with_name(f".{os.getpid()}.{to.name}")
    make_folders(temporary)
    try:
        code = write_folder(model, recipe.model, channels_of(recipe), temporary, facts, root)
        (temporary / "recipe.json").write_text(json.dumps(facts["recipe"], indent=2) + "\n")
        (temporary / "README.md").write_text(_card(recipe, facts, code.replace("FOLDER", str(to))))
        if to.exists():
            to.rmdir()  # empty, see _check
        temporary.rename(to)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _images(recipe: Recipe, machine: Machine) -> Tensor:
    """Two images of the test set, as the model takes them."""
    from bisam.experiments import data
    from bisam.experiments.training.epoch import prepared

    inputs, _ = next(iter(data.load(recipe, machine).test.batches(2)))
    images = prepared(inputs, recipe)
    if isinstance(images, dict):
        raise ValueError("a program takes images: export a model of texts to a folder; give --to a name without suffix")
    return images.double() if recipe.precision == "64" else images


def _card(recipe: Recipe, facts: Mapping[str, Any], code: str) -> str:
    """The model card: what was trained how, with which result, and how to load it."""
    fields = {key: value for key in _SHOWN if (value := recipe.setting(key)) is not None}
    made = ", ".join(f"{key} {facts[key]}" for key in ("bisam", "commit", "torch") if key in facts)
    return "\n".join(
        (
            "---",
            "library_name: " + {"hf": "transformers", "timm": "timm"}.get(recipe.model.partition(":")[0], "pytorch"),
            "tags: [sharpness-aware-minimization, bisam]",
            "---",
            "",
            f"# {recipe.model} on {recipe.dataset}, trained with {recipe.method}",
            "",
            *(f"* {key}: {value}" for key, value in fields.items()),
            f"* {_of(facts['weights'])}",
            *(f"* test {one}" for one in _written(facts["scores"])),
            f"* trained with {made}, finished {facts['finished']}",
            "",
            "All fields are in recipe.json; `bisam run` and `bisam train` explain them.",
            "",
            "```python",
            code,
            "```",
            "",
        )
    )


_SHOWN = (
    "method",
    "rho",
    "dataset",
    "model",
    "seed",
    "noise",
    "epochs",
    "steps",
    "optimizer",
    "learning_rate",
    "batch_size",
)


def _of(which: str) -> str:
    return {
        "best": "weights of the best validation epoch",
        "last": "weights of the last epoch",
        "ema": "average of the weights",
    }[which]


def _written(scores: Mapping[str, float]) -> list[str]:
    return [f"{name} {score:.4f}" for name, score in scores.items()]
