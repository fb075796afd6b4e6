"""Estimate: the time that runs will take, from a few steps that are measured now."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import cache

import torch

from bisam.experiments import data
from bisam.experiments.data.image_tensors import channels
from bisam.experiments.data.splits import Data, batches_of
from bisam.experiments.errors import is_out_of_memory
from bisam.experiments.models.build import build
from bisam.experiments.recipes.catalogue import PLAIN
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.expressions import take_steps
from bisam.experiments.recipes.length import run_length
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.checks import check_model
from bisam.experiments.training.counting import CountedMethod
from bisam.experiments.training.hidden import with_hidden_states
from bisam.experiments.training.measured import cost, measured_batches
from bisam.experiments.training.reference_speed import REFERENCE_STEPS, ReferenceSpeed, measurements
from bisam.methods import Method

_STEPS = 2
_FORWARD = 1 / 3  # time of a forward pass, in gradients
_READS = 2  # iterators over data in an epoch: to train and to validate
_SAMPLED = 20  # steps of a toy model, as if they were the whole run


@dataclass(frozen=True)
class Estimate:
    """The cost of a run.

    Attributes:
        gradients: batch gradients in a step, on average.
        seconds: time of the whole run in one process, or None if its data or model cannot be loaded.
        problem: the reason why there is no time.
    """

    gradients: float
    seconds: float | None
    problem: str = ""


def estimate(recipe: Recipe, machine: Machine) -> Estimate:
    """Estimate the cost of a run of `recipe` from steps of plain training on its own data."""
    step, forwards = queries(recipe.expression, recipe.batch_size)
    like = replace(
        recipe, method=PLAIN, **dict.fromkeys(SETTINGS), noise=0.0, epochs=1, steps=None, seed=0, measured_epochs=0
    )
    if recipe.frozen is None:
        like = replace(like, weights=None)
    try:
        seconds, latency, before, training, validation = _measured(
            replace(like, warmup=0, validation_noise=False), machine
        )
    except ValueError as error:
        return Estimate(step, None, str(error))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        return Estimate(
            step,
            None,
            f"{recipe.model} with batches of {recipe.batch_size} does not fit into the memory of this machine",
        )
    length = run_length(recipe, batches_of(training, recipe.batch_size, machine.devices * machine.nodes))
    plain = measurements(length.epochs, length.losses_per_epoch)
    work = length.losses * (step + _FORWARD * forwards)
    work += plain * min(length.losses_per_epoch, REFERENCE_STEPS)
    work += length.epochs * _FORWARD * validation / recipe.batch_size
    measured = min(recipe.measured_epochs, length.epochs) * measured_batches(recipe, training)
    own, more = cost(recipe)
    work += measured * (own + _FORWARD * more)
    return Estimate(step, before + seconds * work + (length.epochs * _READS + plain) * latency)


@cache
def queries(expression: str, batch_size: int) -> tuple[float, float]:
    """Return the batch gradients and forward passes in a step of a method, averaged over a short run on a toy model."""
    counted: list[CountedMethod] = []

    def count(method: Method) -> Method:
        counted.append(CountedMethod(method))
        return counted[0]

    size = min(batch_size, 256)
    take_steps(expression, size, _SAMPLED, count, total=_SAMPLED)
    gradients, forwards = (counted[0].counts[kind] / (_SAMPLED * size) for kind in (True, False))
    return gradients, forwards


@cache
def _measured(recipe: Recipe, machine: Machine) -> tuple[float, float, float, int, int]:
    """Return seconds of a plain step, to the first batch and of frozen layers, and training and validation examples."""
    splits = data.load(recipe, machine)
    fabric = replace(machine, devices=1, nodes=1, strategy="auto").fabric(recipe.precision)
    with torch.random.fork_rng([]):
        model = build(
            recipe.model,
            splits.classes,
            channels=channels(splits.test),
            weights=recipe.weights,
            frozen=recipe.frozen,
            root=machine.data_dir,
        )
        check_model(model, splits, recipe)
    examples = len(splits.train), len(splits.validation), len(splits.test)
    train = splits.train.first(4 * recipe.batch_size)
    few = Data(train, splits.validation.first(2), splits.test.first(2), splits.classes)
    start = time.perf_counter()
    model = fabric._precision.convert_module(model)
    ready = with_hidden_states(few, model, recipe, fabric)
    frozen = 0.0 if ready is few else (time.perf_counter() - start) * sum(examples) / len(few.train)
    if recipe.channels_last:
        model = model.to(memory_format=torch.channels_last)
    speed = ReferenceSpeed(fabric, model, ready.train.to(fabric.device), recipe, _STEPS)
    speed.seconds_per_loss()  # warm-up
    step = min(speed.seconds_per_loss() for _ in range(2))
    start = time.perf_counter()
    next(ready.train.batches(recipe.batch_size, torch.Generator().manual_seed(0)))
    return step, time.perf_counter() - start, frozen, *examples[:2]
