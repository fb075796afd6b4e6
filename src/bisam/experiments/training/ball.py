"""Ball: the largest error in a ball around the weights, and what adversaries flip.

Equation 5 of Xie et al. (2024, https://arxiv.org/abs/2407.12993) is min over w of the largest 0-1 loss in a ball. The
L2 ball has the radius 0.05, which is the paper's of SAM and BiSAM, whatever the radius of the method is, so that the
columns of all methods are about the same set of displacements. A measurement costs 94 gradients and 13 forward passes
of its examples.
"""

from __future__ import annotations

from collections.abc import Sequence

from bisam import L2, ModelOracle
from bisam.analysis import flips, zero_one_sharpness
from bisam.analysis.flips import ADVERSARIES as FLIPPING
from bisam.analysis.zero_one import ADVERSARIES as CLIMBING
from bisam.batches import Batch
from bisam.experiments.runs.folder import Row

RADIUS = 0.05
"""Radius of the ball: the paper's of SAM and BiSAM, whatever the radius of the method is."""
EXAMPLES = 1000
"""Least number of training examples of every kind of measurement."""
STEPS = 30
"""Steps of ascent of each adversary of the largest error."""
GRADIENTS = len(CLIMBING) * STEPS + len(FLIPPING)
"""Gradients for each example of a measurement."""
FORWARDS = sum(map(len, CLIMBING.values())) + 1 + len(FLIPPING) + 1
"""Forward passes without gradient for each example of a measurement."""

_SHORT = {"loss": "sam", "cross-entropy": "cross_entropy", "-log": "log", "tanh": "tanh"}


def row(oracle: ModelOracle, batches: Sequence[Batch]) -> Row:
    """Return the columns `BALL`.

    Args:
        oracle: the model with its training loss.
        batches: inputs and labels.

    Raises:
        NonFiniteLossError: a loss is not finite at the weights.
    """
    largest = zero_one_sharpness(oracle, batches, L2(RADIUS), steps=STEPS)
    found = flips(oracle, batches, L2(RADIUS))
    values: Row = {"ball_error": largest.error, "ball_worst": largest.worst}
    values |= {f"flips_{_SHORT[name]}": flipped / found.examples for name, flipped in found.flipped.items()}
    return values | {f"cosine_{_SHORT[name]}": value for name, value in found.cosines["loss"].items() if name != "loss"}
