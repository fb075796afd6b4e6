"""Epoch: one pass over a split, to train on it (`train_epoch`) or to predict its labels (`predict`)."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from bisam.experiments.data.image_tensors import Images
from bisam.experiments.data.splits import Batches, Split, batches_of
from bisam.experiments.models.frozen import to_train
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Row
from bisam.experiments.training.counting import CountedMethod
from bisam.experiments.training.journal import Journal
from bisam.experiments.training.metrics import TrainingSums, log_likelihoods, ranked
from bisam.experiments.training.optimizers import to_evaluate, to_train as to_train_optimizer
from bisam.experiments.training.weight_average import WeightAverage
from bisam.methods.method import indexed
from bisam.statistics import StatsMean

LOOK = 256
"""Losses between two looks at the loss for whether it is finite: each makes the processes wait for their devices."""


def train_epoch(
    fabric: Fabric,
    sharp: Any,
    method: CountedMethod,
    optimizer: Any,
    split: Batches,
    recipe: Recipe,
    random: torch.Generator,
    scheduler: LRScheduler | None = None,
    average: WeightAverage | None = None,
    losses: int | None = None,
    stats: StatsMean | None = None,
    journal: Journal | None = None,
    hopeless: Callable[[TrainingSums], bool] | None = None,
) -> Row:
    """Train for one epoch, or for a part of it, and return its row of metrics.

    Args:
        fabric: devices and precision.
        sharp: the `SharpnessAware` loss with the model in it, as `fabric.setup` returned it.
        method: the method of the loss; its counts are those of this epoch afterwards.
        optimizer: the base optimizer, as `fabric.setup` returned it; afterwards the weights are those that it
            evaluates.
        split: training examples.
        recipe: batch size, accumulation, clipping, and layout of the inputs.
        random: draws the order and the augmentation of the examples.
        scheduler: learning rate schedule to advance after each optimizer step, if any.
        average: moving average of the weights to update after each optimizer step, if any.
        losses: number of losses after which to stop, each over one batch; by default all batches of the split.
        stats: what to add the statistics of each step to, which `sharp` records.
        journal: counts the batches, and writes lines within a long epoch.
        hopeless: called with the sums until then every `LOOK` losses, in all processes; if it returns True, the epoch
            ends.
    """
    if recipe.frozen is None:
        sharp.train()
    else:
        to_train(sharp)
    to_train_optimizer(optimizer)
    sums = TrainingSums(fabric.device)
    method.counts.clear()
    whole = batches_of(len(split), recipe.batch_size, fabric.world_size)
    losses = whole if losses is None else losses
    needs_indices = indexed(method) is not None
    batches = split.indexed(recipe.batch_size, random, fabric.global_rank, fabric.world_size)
    if losses < whole:
        batches = itertools.islice(batches, losses)
    start = time.perf_counter()
    for i, (index, inputs, labels) in enumerate(batches):
        # The last group of an epoch may have fewer losses than `accumulate`.
        group = min(recipe.accumulate, losses - i // recipe.accumulate * recipe.accumulate)
        completes_group = i % recipe.accumulate == group - 1
        with fabric.no_backward_sync(sharp, enabled=not completes_group):
            named = {"indices": index} if needs_indices else {}
            loss = sharp(prepared(inputs, recipe), prepared(labels, recipe), **named)
            fabric.backward(loss / group if group > 1 else loss)
        if completes_group:
            if recipe.clip is not None:
                fabric.clip_gradients(sharp, optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            if scheduler is not None:
                scheduler.step()
            if average is not None:
                average.update()
        sums.add(sharp.clean, method.outputs, labels)
        if stats is not None:
            stats.add(sharp.stats)
        if journal is not None:
            journal.batch(inputs, sums, optimizer.param_groups[0]["lr"])
        if hopeless is not None and (i + 1) % LOOK == 0 and i + 1 < losses and hopeless(sums):
            losses = i + 1
            break
    to_evaluate(optimizer)
    return {
        **sums.row(fabric, gradients=method.counts[True], forwards=method.counts[False]),
        "losses": losses,
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def predict(
    model: nn.Module, split: Split, recipe: Recipe, metrics: Sequence[str]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Predict a split in evaluation mode.

    Returns:
        The R most likely classes of each example, (N, R), with R as `metrics` need, the labels (N,), and the results of
        `log_likelihoods`. Of tokens they are (N, 1, T) and (N, T).
    """
    found = [
        (ranked(logits, metrics), labels, log_likelihoods(logits, labels, metrics))
        for _, logits, labels in outputs(model, split, recipe)
    ]
    predicted, labels, known = zip(*found, strict=True)
    return torch.cat(predicted), torch.cat(labels), None if None in known else torch.cat(known)


def outputs(model: nn.Module, split: Batches, recipe: Recipe) -> Iterator[tuple[Any, Tensor, Tensor]]:
    """Yield the inputs, the logits (n, K) and the labels (n,) of the batches of a split, in evaluation mode.

    Those of tokens are (n, K, T) and (n, T).

    Args:
        model: it is in evaluation mode afterwards.
        split: examples.
        recipe: batch size, and layout of the inputs.
    """
    model.eval()
    size = max(recipe.batch_size, 256 if isinstance(split, Images) else recipe.batch_size)
    for batch, labels in split.batches(size):
        inputs = prepared(batch, recipe)
        yield inputs, model(inputs), labels


def prepared(inputs: Any, recipe: Recipe) -> Any:
    """Return inputs in the recipe's memory format, and in float64 where its precision is 64.

    Inputs that are not a tensor, as the dicts of Hugging Face, are returned unchanged.
    """
    if not isinstance(inputs, Tensor):
        return inputs
    if recipe.precision == "64" and inputs.is_floating_point():
        inputs = inputs.double()
    if inputs.dim() != 4:
        return inputs
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return inputs.contiguous(memory_format=layout)
