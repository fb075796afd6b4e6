"""Epoch: one pass over a split, to train on it or to predict it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from lightning_fabric import Fabric
from torch import Tensor, nn

from bisam.experiments.data.image_tensors import Images
from bisam.experiments.data.splits import Batches, Split, batches_of
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.folder import Row
from bisam.experiments.training.counting import Watch
from bisam.experiments.training.metrics import ranked


def train_epoch(
    fabric: Fabric,
    sharp: Any,
    watch: Watch,
    optimizer: Any,
    split: Batches,
    recipe: Recipe,
    random: torch.Generator,
    after_step: Callable[[], None] = lambda: None,
) -> Row:
    """One pass over `split`: what anybody's loop looks like, and counts for the metrics."""
    sharp.train()
    total, correct, flipped, n = (torch.zeros((), device=fabric.device) for _ in range(4))
    watch.counts.clear()
    losses = batches_of(len(split), recipe.batch_size, fabric.world_size)
    batches = split.batches(recipe.batch_size, random, fabric.global_rank, fabric.world_size)
    start = time.perf_counter()
    for i, (x, y) in enumerate(batches):
        group = min(recipe.accumulate, losses - i // recipe.accumulate * recipe.accumulate)
        last = i % recipe.accumulate == group - 1
        with fabric.no_backward_sync(sharp, enabled=not last):
            loss = sharp(laid_out(x, recipe), y)
            fabric.backward(loss / group if group > 1 else loss)
        if last:
            if recipe.clip is not None:
                fabric.clip_gradients(sharp, optimizer, max_norm=recipe.clip, error_if_nonfinite=False)
            optimizer.step()
            optimizer.zero_grad()
            after_step()

        clean = sharp.clean  # at w, from the pass that the method made anyway
        right = clean.outputs.argmax(1) == y
        total += clean.value * len(y)
        correct += right.sum()
        n += len(y)
        if len(watch.outputs) == len(y):
            flipped += (right & (watch.outputs.argmax(1) != y)).sum()
        else:
            flipped += float("nan")  # the method descended on a part of the batch
    gradients, forwards = (torch.tensor(float(watch.counts[kind]), device=fabric.device) for kind in (True, False))
    sums = torch.stack([total, correct, flipped, gradients, forwards, n])
    total, correct, flipped, gradients, forwards, n = cast(Tensor, fabric.all_reduce(sums, reduce_op="sum")).tolist()
    return {
        "train_loss": total / n,
        "train_accuracy": correct / n,
        "flipped": flipped,
        "gradients": gradients / n,
        "forwards": forwards / n,
        "losses": losses,
        "seconds": time.perf_counter() - start,
    }


@torch.no_grad()
def predictions(model: nn.Module, split: Split, recipe: Recipe, metrics: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Predicted classes (N, R), as `metrics` ask for, and labels (N,) of `split`."""
    model.eval()
    size = max(recipe.batch_size, 256 if isinstance(split, Images) else recipe.batch_size)
    pairs = [(ranked(model(laid_out(x, recipe)), metrics), y) for x, y in split.batches(size)]
    predicted, labels = zip(*pairs, strict=True)
    return torch.cat(predicted), torch.cat(labels)


def laid_out(inputs: Any, recipe: Recipe) -> Any:
    """Inputs in the memory layout and, for double precision, the type of the recipe."""
    if not isinstance(inputs, Tensor):
        return inputs
    if recipe.precision == "64" and inputs.is_floating_point():
        inputs = inputs.double()
    if inputs.dim() != 4:
        return inputs
    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    return inputs.contiguous(memory_format=layout)
