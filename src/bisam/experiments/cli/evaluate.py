"""`bisam evaluate`: test a trained model, of a run or in a file, on its own or on other data."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Column, Table

from bisam.experiments.cli.folders import check_file
from bisam.experiments.cli.groups import MACHINE
from bisam.experiments.cli.options import DatasetName, DeviceFlags, ModelName, Quiet
from bisam.experiments.cli.progress import MeasuringDisplay
from bisam.experiments.cli.terminal import console, errors
from bisam.experiments.runs.files import write

if TYPE_CHECKING:
    from bisam.experiments.inference.evaluate import Evaluated, Measured

EXAMPLES = (
    "bisam evaluate RUN",
    "bisam evaluate RUN --which last --corruptions --tta --to found.json",
    "bisam evaluate model.pt --model resnet20 --dataset cifar10",
)


def evaluate(
    model_or_run: Annotated[str, Parameter(name="RUN")],
    /,
    *,
    dataset: DatasetName | None = None,
    split: str = "test",
    which: str | None = None,
    corruptions: Annotated[bool, Parameter(negative="")] = False,
    tta: Annotated[bool, Parameter(negative="")] = False,
    model: ModelName | None = None,
    config: Path | None = None,
    to: Path | None = None,
    where: Annotated[DeviceFlags, Parameter(name="*", group=MACHINE)] = DeviceFlags(),  # noqa: B008
    quiet: Quiet = False,
) -> int:
    """Evaluate a trained model: scores, loss, calibration and margins, and on request its robustness.

    The scores are those of the task: accuracy, F1, Matthews correlation. On the test set of a run they are those of its
    result.json.

    Args:
        model_or_run: Folder of a finished run, a folder that bisam export wrote, or a file of weights.
        dataset: Data set, by default that of the run; its images are prepared as those of the run.
        split: Examples: test, validation or train (with the label noise of the run, without augmentation).
        which: Weights of a run: best, last or ema; by default those whose test score reports show.
        corruptions: Measure the error under noise, blur, contrast and other changes of the images, at 5 severities.
        tta: Test-time augmentation: show also the mean of the probabilities of each image and its mirror image.
        model: Model of a file of weights, see `bisam list`; files of bisam export but .pt have it inside.
        config: Recipe of a file of weights, TOML or JSON, for the size of its images or the seed of its split.
        to: JSON file for everything that is found.
    """
    from bisam.experiments.inference.evaluate import evaluate as evaluated
    from bisam.experiments.inference.loaded import load
    from bisam.experiments.recipes.config import read

    if to is not None:
        check_file(to, "found.json")
    machine = where.machine()  # fails here if the device is missing
    recipe = None if config is None else read(config)
    loaded = load(model_or_run, where.data_dir, which, model, dataset, recipe)
    unit = "texts" if loaded.recipe.dataset.startswith("glue:") else "images"
    with MeasuringDisplay(1, unit, quiet=quiet) as display:
        display.run()
        found = evaluated(loaded, machine, dataset, split, corrupted=corruptions, tta=tta, progress=display.measure)
    _show(found, unit)
    if to is not None:
        write(to, json.dumps(found.to_dict(), indent=2, allow_nan=False) + "\n")
        console.print(f"{to}", soft_wrap=True, highlight=False)
    if tta and not _mirrors(found):
        errors.print("bisam: this model was trained without mirror images, which may be other classes")
    if difference := _difference(found):
        errors.print(f"bisam: {difference}")
    return 0


def _show(found: Evaluated, unit: str) -> None:
    one = found.loaded
    title = f"{one.recipe.model} on {found.dataset}, {found.examples:,} {found.split} examples, {_of(one.which)}"
    views = [found.plain] if found.tta is None else [found.plain, found.tta]
    heads = [Column("as they are", justify="right"), Column("with mirror images", justify="right")]
    table = Table("measure", *heads[: len(views)], title=title, min_width=60)
    if len(views) == 1:
        table.columns[1].header = "value"
    for row in zip(*map(_rows, views), strict=True):
        table.add_row(row[0][0], *(text for _, text in row))
    if found.corruptions is not None:
        errors_of = found.corruptions.errors
        table.add_section()
        for name, severities in errors_of.items():
            table.add_row(f"error, {name.replace('_', ' ')}", f"{100 * fmean(severities):.2f} %")
        table.add_row("mean error, corrupted", f"{100 * found.corruptions.mean_error:.2f} %")
    rate = found.examples / found.seconds
    table.caption = f"{rate:,.0f} {unit} per second on {found.device}"
    if found.corruptions is not None:
        table.caption += "; errors under corruptions are means over severities 1 to 5"
    console.print(table)


def _rows(measured: Measured) -> Iterator[tuple[str, str]]:
    from bisam.experiments.runs.results import IN_PER_CENT, TITLES

    for metric, score in measured.scores.items():
        yield TITLES[metric], f"{100 * score:.2f} %" if metric in IN_PER_CENT else f"{score:.4f}"
    found = measured.calibration
    yield "loss (cross-entropy)", f"{measured.loss:.4f}"
    yield "ECE", f"{100 * found.ece:.2f} %"
    yield "Brier score", f"{found.brier:.4f}"
    yield "mean confidence", f"{100 * found.confidence:.2f} %"
    yield "median margin of the logits", f"{measured.margins.median:.3f}"


def _of(which: str | None) -> str:
    names: dict[Any, str] = {"best": "best epoch", "last": "last epoch", "ema": "average of the weights"}
    return names.get(which, "weights of a file")


def _mirrors(found: Evaluated) -> bool:
    """Whether mirror images were a part of the training."""
    recipe = found.loaded.recipe
    return recipe.augment and recipe.dataset != "digits"


def _difference(found: Evaluated) -> str | None:
    """How the scores differ from those in the run's own result, if they are of the same examples; else None."""
    one = found.loaded
    if one.result is None or one.which is None or found.split != "test" or found.dataset != one.recipe.dataset:
        return None
    for metric, score in one.result.get("scores", {}).get(one.which, {}).items():
        if found.scores[metric] != score:
            device, version = one.result.get("device", "an unknown device"), one.result.get("torch", "unknown")
            return (
                f"result.json has {metric} {score:.6f}, and this is {found.scores[metric]:.6f}: other hardware or "
                f"another version of torch rounds differently (that was on {device}, with torch {version})"
            )
    return None
