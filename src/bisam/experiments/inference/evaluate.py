"""Evaluate: the scores, loss, calibration and margins of a trained model on a split, and its robustness.

found = evaluate(load("runs/train/sam-noise-0-1f0c22e9/seed-0", root), machine, tta=True)
found.scores["accuracy"], found.calibration.ece, found.tta.scores["accuracy"]
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bisam import ModelOracle, cross_entropy
from bisam.analysis import Calibration, Corruptions, Margins, calibration, corruptions, margins
from bisam.experiments import data
from bisam.experiments.data import names_of
from bisam.experiments.data.glue import Texts
from bisam.experiments.data.image_tensors import Images
from bisam.experiments.data.sequences import Sequences
from bisam.experiments.data.splits import Data, Split
from bisam.experiments.errors import DataError, RunWarning, unknown
from bisam.experiments.inference.images import preparation, prepared_as
from bisam.experiments.inference.loaded import Loaded
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.environment import environment
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.epoch import outputs, prepared
from bisam.experiments.training.hidden import has_hidden_states, with_hidden_states
from bisam.experiments.training.metrics import ranked, scores
from bisam.experiments.training.train import device_name

SPLITS = ("test", "validation", "train")
TOP5 = 10
"""Number of classes from which on the top-5 accuracy is told."""
FLIPS = "mean of the probabilities of each image and its mirror image"
"""The description of test-time augmentation in tables and files."""

OnProgress = Callable[[str, int, int], None]
"""A function (title, done, total) of numbers of examples."""

_ROWS = 4096  # of logits at a time


@dataclass(frozen=True)
class Measured:
    """The measures of the predictions of a split.

    Attributes:
        scores: by metric, those of the data set first; then accuracy, and from `TOP5` classes on top5.
        loss: mean cross-entropy of the labels, in nats.
        calibration: of the probabilities, see `bisam.analysis.calibration`.
        margins: of the logits, see `bisam.analysis.margins`.
    """

    scores: dict[str, float]
    loss: float
    calibration: Calibration
    margins: Margins

    def to_dict(self) -> dict[str, Any]:
        """Return all attributes, for JSON."""
        return {
            "scores": self.scores,
            "loss": self.loss,
            "calibration": self.calibration.to_dict(),
            "margins": self.margins.to_dict(),
        }


@dataclass(frozen=True)
class Evaluated:
    """The result of `evaluate`.

    Attributes:
        loaded: the model.
        dataset: name of the data set.
        split: train, validation or test.
        examples: number of examples.
        seconds: time of reading the examples and predicting them, of both views with `tta`.
        plain: measures of the predictions.
        tta: the same with test-time augmentation, `FLIPS`; None without it.
        corruptions: errors under corruptions of the images; None without them.
        device: name of the device.
    """

    loaded: Loaded
    dataset: str
    split: str
    examples: int
    seconds: float
    plain: Measured
    tta: Measured | None
    corruptions: Corruptions | None
    device: str

    @property
    def scores(self) -> dict[str, float]:
        """The scores by metric, without augmentation."""
        return self.plain.scores

    def to_dict(self) -> dict[str, Any]:
        """Return what was found, of which model, for JSON."""
        one = self.loaded
        return {
            "place": str(one.place),
            "weights": one.which or "file",
            "weights_checksum": one.checksum,
            "model": one.recipe.model,
            "dataset": self.dataset,
            "split": self.split,
            "examples": self.examples,
            **self.plain.to_dict(),
            "tta": None if self.tta is None else {"views": FLIPS, **self.tta.to_dict()},
            "corruptions": None if self.corruptions is None else self.corruptions.to_dict(),
            "examples_per_second": self.examples / self.seconds,
            "device": self.device,
            "recipe": one.recipe.to_dict(),
            **environment(),
            "evaluated": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }


def evaluate(
    loaded: Loaded,
    machine: Machine = Machine(),  # noqa: B008
    dataset: str | None = None,
    split: str = "test",
    *,
    corrupted: bool = False,
    tta: bool = False,
    progress: OnProgress | None = None,
) -> Evaluated:
    """Evaluate a trained model on a split; on the device of its training it has the scores of the run's own result.

    Args:
        loaded: the model.
        machine: device and folder of the data.
        dataset: another data set than that of its recipe, with as many classes. Its images are prepared as those of the
            run: resized, and standardised with the same statistics.
        split: train (with the label noise of the run, without augmentation), validation or test.
        corrupted: measure the error under corruptions of the images too, in 35 more passes.
        tta: measure predictions with test-time augmentation too, `FLIPS`.
        progress: called after each batch.

    Raises:
        ValueError: the split is unknown; the data cannot be loaded, have another number or another order of classes, or
            are texts with corruptions or augmentation; or the loss is not finite.
        RunError: the recipe has an earlier version, whose split was another one.
    """
    if split not in SPLITS:
        raise unknown("split", split, SPLITS)
    if find_spec("torchmetrics") is None:
        raise ValueError('the calibration needs torchmetrics: pip install "bisam[analysis]"')
    recipe, fabric = loaded.recipe, machine.fabric(loaded.recipe.precision)
    splits = _loaded(loaded, dataset, machine)
    if splits.classes != loaded.classes:
        raise DataError(
            f"{dataset or recipe.dataset} has {splits.classes} classes, and the model {loaded.classes}: give a data "
            "set with the classes of the model"
        )
    if dataset is not None:
        _check_classes(recipe.dataset, dataset, machine.data_dir)
    part: Split = getattr(splits, split).unaugmented()
    if isinstance(part, Sequences):
        raise ValueError(
            f"{dataset or recipe.dataset} has tokens, and these measures are those of one class for each example: the "
            "scores of a run on its test set are in its result.json"
        )
    if isinstance(part, Texts) and (corrupted or tta):
        what = "--corruptions are those of images" if corrupted else "--tta mirrors images"
        raise ValueError(f"{what}, and {dataset or recipe.dataset} has texts: leave it out")
    if corrupted and part.statistics is None:
        raise ValueError("corruptions need the statistics of the images, which these data do not have")
    model = loaded.on(fabric)
    clean = part
    if has_hidden_states(splits, loaded.model, recipe):  # as in training, whose arithmetic is the same then
        alone = replace(splits, train=part, validation=part, test=part)
        part = with_hidden_states(alone, loaded.model, recipe, fabric).test
    here = part.to(fabric.device)
    kept = _Kept(splits.metrics)
    start = time.perf_counter()
    with torch.no_grad(), fabric.autocast():
        for i, (inputs, logits, labels) in enumerate(outputs(model, here, recipe), 1):
            kept.add(logits, labels, _mirrored(model, inputs, logits) if tta else None)
            if progress is not None:
                progress(f"{split} examples", min(len(part), i * len(labels)), len(part))
    seconds = time.perf_counter() - start
    robustness = _corruptions(model, clean.to(fabric.device), recipe, fabric, progress) if corrupted else None
    return Evaluated(
        loaded,
        dataset or recipe.dataset,
        split,
        len(part),
        seconds,
        kept.measured(splits),
        kept.measured(splits, mirrored=True) if tta else None,
        robustness,
        device_name(fabric.device),
    )


def _check_classes(own: str, other: str, root: Path) -> None:
    """Check that classes with a name have the same number in the data of a model and in other data.

    The labels of the other data are numbers, as are the predictions: with another order scores would be wrong.

    Raises:
        DataError: a class has another number.

    Warns:
        RunWarning: the names differ.
    """
    try:
        ours, theirs = names_of(own, root), names_of(other, root)
    except DataError:  # the data of the training are not at hand
        return
    if len(ours) != len(theirs) or ours == theirs:  # [] where they are not known
        return
    for number, name in enumerate(ours):
        if name in theirs and theirs[number] != name:
            raise DataError(
                f"{name} is class {number} of the model and class {theirs.index(name)} of {other}, and the scores are "
                f"those of classes with the same number: give a data set with the classes of {own}"
            )
    number = next(i for i, (one, two) in enumerate(zip(ours, theirs, strict=True)) if one != two)
    warnings.warn(
        f"the classes of {other} have other names than those of {own}, and are taken for those with the same number: "
        f"{theirs[number]} for {ours[number]}",
        RunWarning,
        stacklevel=2,
    )


def _loaded(loaded: Loaded, dataset: str | None, machine: Machine) -> Data:
    """The data of the recipe, or other ones, all of them, prepared in the same way."""
    recipe = loaded.recipe
    if dataset is None or dataset == recipe.dataset:
        return data.load(recipe, machine)
    other = replace(
        recipe,
        dataset=dataset,
        noise=0.0,
        validation_noise=False,
        limit=None,
        train_examples=None,
        held_out=None,
        cutout=False,
    )
    splits = data.load(other, machine)
    if isinstance(splits.test, Texts):
        return splits
    how = preparation(recipe, machine)
    parts = {name: prepared_as(getattr(splits, name), how, dataset) for name in SPLITS}
    return replace(splits, **parts)


class _Kept:
    """Keeps the predictions of the batches, as in training, and their logits."""

    def __init__(self, metrics: Sequence[str]) -> None:
        self._metrics = metrics
        self._ranks, self._labels = list[Tensor](), list[Tensor]()
        self._logits, self._mirrored = list[Tensor](), list[Tensor]()

    def add(self, logits: Tensor, labels: Tensor, mirrored: Tensor | None) -> None:
        # On the device and in the precision of the run, where ties are decided as in its test.
        self._ranks.append(ranked(logits, self._metrics))
        self._labels.append(labels.cpu())
        self._logits.append(logits.float().cpu() if logits.dtype != torch.float64 else logits.cpu())
        if mirrored is not None:
            self._mirrored.append(mirrored.cpu())

    def measured(self, splits: Data, mirrored: bool = False) -> Measured:
        labels, logits = torch.cat(self._labels), torch.cat(self._mirrored if mirrored else self._logits)
        ranks = ranked(logits, self._metrics) if mirrored else torch.cat(self._ranks)
        found = dict(zip(self._metrics, scores(self._metrics, ranks, labels, splits.classes), strict=True))
        more = [name for name in ("accuracy", *(["top5"] if splits.classes >= TOP5 else [])) if name not in found]
        found |= zip(more, scores(more, ranked(logits, more), labels, splits.classes), strict=True)
        # The measures of `bisam.analysis` take a model: here one that returns the logits.
        oracle = ModelOracle(_Given(), cross_entropy)
        rows = list(zip(logits.split(_ROWS), labels.split(_ROWS), strict=True))
        calibrated = calibration(oracle, rows)
        return Measured(found, calibrated.nll, calibrated, margins(oracle, rows, normalized=None))


class _Given(nn.Module):
    """A model whose inputs are its outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(()))

    def forward(self, logits: Tensor) -> Tensor:
        return logits


def _mirrored(model: nn.Module, images: Tensor, logits: Tensor) -> Tensor:
    """The logarithms of the mean probabilities of images (N, C, H, W) and their mirror images."""
    both = torch.stack([logits, model(images.flip(3))]).double().log_softmax(2)
    return both.logsumexp(0) - torch.tensor(2.0).log()


def _corruptions(
    model: nn.Module, split: Split, recipe: Recipe, fabric: Fabric, progress: OnProgress | None
) -> Corruptions:
    assert split.statistics is not None  # checked before
    mean, std = split.statistics
    size = max(recipe.batch_size, 256 if isinstance(split, Images) else recipe.batch_size)
    batches: Iterable[Any] = ((prepared(inputs, recipe), labels) for inputs, labels in split.batches(size))
    told = None if progress is None else lambda done, total: progress("corruptions", done, total)
    with fabric.autocast():
        return corruptions(ModelOracle(model, cross_entropy), batches, mean=mean, std=std, progress=told)
