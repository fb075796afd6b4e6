"""Length: the epochs, optimizer steps and losses of a run, once the number of batches in an epoch is known."""

from __future__ import annotations

from dataclasses import dataclass

from bisam.experiments.recipes.recipe import Recipe


@dataclass(frozen=True)
class RunLength:
    """The length of a run."""

    epochs: int
    """Number of epochs. A run of steps ends with its last step, within the last epoch or at its end."""
    steps: int
    """Number of steps of the optimizer."""
    losses: int
    """Number of losses, each over one batch; a step of the optimizer averages several with `accumulate`."""
    losses_per_epoch: int
    """Losses of a whole epoch."""
    steps_per_epoch: int
    """Steps of a whole epoch."""

    def losses_in(self, epoch: int) -> int:
        """Losses of an epoch, numbered from 1; the last epoch may have fewer than the others."""
        return min(self.losses_per_epoch, self.losses - (epoch - 1) * self.losses_per_epoch)

    def steps_until(self, epoch: int) -> int:
        """Steps from the start of the run to the end of an epoch, numbered from 1."""
        return min(self.steps, epoch * self.steps_per_epoch)


def run_length(recipe: Recipe, losses: int) -> RunLength:
    """The length of a run.

    Args:
        recipe: with its epochs or steps, and its accumulation.
        losses: batches in a whole epoch, at least 1. The last step of an epoch may average fewer than `accumulate`.
    """
    steps = -(-losses // recipe.accumulate)
    if recipe.steps is None:
        return RunLength(recipe.length, steps * recipe.length, losses * recipe.length, losses, steps)
    epochs = -(-recipe.steps // steps)
    last = min(losses, (recipe.steps - (epochs - 1) * steps) * recipe.accumulate)
    return RunLength(epochs, recipe.steps, (epochs - 1) * losses + last, losses, steps)
