"""Estimate: how long runs are going to take, from a few steps that are measured now."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache

import torch

from bisam.experiments import data
from bisam.experiments.data.image_tensors import channels
from bisam.experiments.data.splits import batches_of
from bisam.experiments.models.build import build
from bisam.experiments.recipes.catalogue import PLAIN
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.expressions import take_steps
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.counting import Watch
from bisam.experiments.training.reference_speed import PACE, Pace
from bisam.experiments.training.train import probe
from bisam.methods import Method

_STEPS = 2
_FORWARD = 1 / 3  # of the time of a gradient
_READS = 3  # how often in an epoch data is begun: to train, to validate, and for the pace
_SAMPLED = 20  # steps of a toy, as if they were the run


@dataclass(frozen=True)
class Estimate:
    """What a run costs.

    Attributes:
        gradients: gradients of a batch in a step, on average over the first steps.
        seconds: of the whole run on one process, or None where its data or model are not here.
        problem: why there are no seconds.
    """

    gradients: float
    seconds: float | None
    problem: str = ""


def estimate(recipe: Recipe, machine: Machine) -> Estimate:
    """What a run of `recipe` costs, from steps of plain training on its own data."""
    step, forwards = queries(recipe.expression, recipe.batch_size)
    like = replace(recipe, method=PLAIN, **dict.fromkeys(SETTINGS), noise=0.0, epochs=1, seed=0)
    try:
        seconds, latency, training, validation = _measured(replace(like, weights=None, warmup=0), machine)
    except ValueError as error:
        return Estimate(step, None, str(error))
    except (MemoryError, torch.OutOfMemoryError):
        return Estimate(step, None, f"{recipe.model} with batches of {recipe.batch_size} is out of memory here")
    losses = batches_of(training, recipe.batch_size, machine.devices * machine.nodes)
    plain = min(losses, PACE)  # which each epoch adds to see how fast the machine is
    epoch = losses * (step + _FORWARD * forwards) + plain + _FORWARD * validation / recipe.batch_size
    return Estimate(step, recipe.epochs * (seconds * epoch + _READS * latency))


@cache
def queries(expression: str, batch_size: int) -> tuple[float, float]:
    """Gradients and forward passes of a batch that a method takes in a step, on average over a short run on a toy."""
    watches: list[Watch] = []

    def watched(method: Method) -> Method:
        watches.append(Watch(method))
        return watches[0]

    size = min(batch_size, 256)
    take_steps(expression, size, _SAMPLED, watched, total=_SAMPLED)
    gradients, forwards = (watches[0].counts[kind] / (_SAMPLED * size) for kind in (True, False))
    return gradients, forwards


@cache
def _measured(recipe: Recipe, machine: Machine) -> tuple[float, float, int, int]:
    """Seconds of a plain step and until the first batch is there, training and validation examples."""
    splits = data.load(recipe, machine)
    fabric = replace(machine, devices=1, nodes=1, strategy="auto").fabric(recipe.precision)
    with torch.random.fork_rng([]):
        model = build(recipe.model, splits.classes, channels=channels(splits.test))
        probe(model, splits, recipe)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    pace = Pace(fabric, model, splits.train.to(fabric.device), recipe, _STEPS)
    pace.seconds()  # warms up
    step = min(pace.seconds() for _ in range(2))
    start = time.perf_counter()
    next(splits.train.batches(recipe.batch_size, torch.Generator().manual_seed(0)))
    return step, time.perf_counter() - start, len(splits.train), len(splits.validation)
