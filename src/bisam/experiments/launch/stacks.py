"""Stacks: the jobs of a study, each one run or several seeds of a recipe that are trained at once."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path

import torch

from bisam.experiments.launch.estimate import queries
from bisam.experiments.recipes.catalogue import PLAIN
from bisam.experiments.recipes.entries import SETTINGS
from bisam.experiments.recipes.length import run_length
from bisam.experiments.recipes.recipe import Recipe
from bisam.experiments.runs.checkpoint import CHECKPOINT, PREVIOUS
from bisam.experiments.runs.folder import Run
from bisam.experiments.runs.machine import Machine
from bisam.experiments.training.stacked.train import REFERENCE_STEPS, StackTraining

STACK_THREADS = 1
"""Threads of a process that trains a stack. Its operations are many and small: several threads would wait for each
other longer than they compute, above all on a machine with other work."""


@dataclass(frozen=True)
class Job:
    """A unit of work of one worker process: one run, or one stack."""

    recipes: tuple[Recipe, ...]
    """One recipe; or of a stack, one with different seeds."""
    stacked: bool = False


def jobs(recipes: Sequence[Recipe], root: Path, stack: int | None) -> list[Job]:
    """Return the jobs of runs that are not finished.

    Runs of a recipe are shared evenly among as few stacks as possible. A run that was interrupted while it was trained
    alone, and has a checkpoint, is finished alone.

    Args:
        recipes: of the runs.
        root: folder of the run folders.
        stack: largest number of runs in a stack; None: no stacks.
    """
    if stack is None:
        return [Job((recipe,)) for recipe in recipes]
    groups, alone = dict[Recipe, list[Recipe]](), list[Job]()
    for recipe in recipes:
        folder = Run.under(root, recipe).folder
        if (folder / CHECKPOINT).exists() or (folder / PREVIOUS).exists():
            alone.append(Job((recipe,)))
        else:
            groups.setdefault(replace(recipe, seed=0), []).append(recipe)
    return [Job(part, stacked=True) for group in groups.values() for part in _parts(group, stack)] + alone


def _parts(recipes: Sequence[Recipe], most: int) -> list[tuple[Recipe, ...]]:
    count = -(-len(recipes) // most)
    ends = [i * len(recipes) // count for i in range(count + 1)]
    return [tuple(recipes[a:b]) for a, b in pairwise(ends)]


def seconds(recipe: Recipe, machine: Machine, runs: int, stack: int) -> float:
    """Estimate the seconds of so many runs of a recipe in stacks, one after the other, from an epoch of plain training.

    Raises:
        ValueError: the data cannot be loaded.
    """
    like = replace(recipe, method=PLAIN, **dict.fromkeys(SETTINGS), noise=0.0, validation_noise=False)
    like = replace(like, epochs=1, steps=None, warmup=0, seed=0)
    gradients, forwards = queries(recipe.expression, recipe.batch_size)
    total = 0.0
    for part in _parts([recipe] * runs, stack):
        loading, per_loss, losses = _of_plain(like, machine, len(part))
        length = run_length(recipe, losses)
        total += loading + per_loss * (length.losses * (gradients + forwards / 3) + length.epochs * REFERENCE_STEPS)
    return total


@cache
def _of_plain(recipe: Recipe, machine: Machine, count: int) -> tuple[float, float, int]:
    """Return seconds to prepare a stack of plain training and seconds of a loss, and the losses of an epoch."""
    before = torch.get_num_threads()
    torch.set_num_threads(STACK_THREADS)
    try:
        start = time.perf_counter()
        training = StackTraining([replace(recipe, seed=seed) for seed in range(count)], machine)
        loading = time.perf_counter() - start
        _, rows = training.train()[0]
    finally:
        torch.set_num_threads(before)
    return loading, rows[0]["seconds"] * count / rows[0]["losses"], int(rows[0]["losses"])
