"""Ascents: five adversaries at the same weights, on the same batches and at the same radius.

Figure 2 of Xie et al. (2024, https://arxiv.org/abs/2407.12993) counts the examples that the displacement of each method
flips on the network that this method has trained, so that networks and adversaries differ at once. Here all adversaries
displace one network, on the examples of `measured.py`:

* one step to the radius, a displacement for each batch as in training: the examples that flip and those that are
  repaired, the rise of the training loss, and the cosine of the displacement with that of plain cross-entropy;
* several steps of projected ascent, one displacement for all batches: the largest error on the way. All adversaries
  have the same number of steps.

The radius is 0.2, four times the paper's, at which a step flips nothing once a small network has fitted its data. What
flips at the paper's radius is measured too. A measurement costs 25 gradients and 18 forward passes of its examples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bisam import L2, ModelOracle
from bisam.analysis import flips, zero_one_sharpness
from bisam.batches import Batch
from bisam.experiments.runs.folder import Row
from bisam.experiments.runs.results import ASCENTS, PLAIN_ASCENT
from bisam.experiments.training import ball
from bisam.experiments.training.optimizers import descent_loss
from bisam.objectives import NegLog, Objective, Tanh, cross_entropy

SMOOTHING = 0.1
"""Label smoothing of the smoothed cross-entropy: the paper's, whatever the descent loss has."""
RADIUS = 0.2
"""Radius of the ball of all quantities but the flips at the paper's radius."""
STEPS = 3
"""Steps of the ascent to the largest error."""
GRADIENTS = len(ASCENTS) * (STEPS + 2)
"""Gradients for each example of a measurement."""
FORWARDS = 3 * (len(ASCENTS) + 1)
"""Forward passes without gradient for each example of a measurement."""


def adversaries(classes: int) -> Mapping[str, Objective]:
    """Return what each of the `ASCENTS` climbs.

    Args:
        classes: number of classes, over which the label smoothing is spread.
    """
    objectives = (cross_entropy, descent_loss(SMOOTHING, classes), Tanh(10.0, 0.1), NegLog(1.0), NegLog(5.0))
    return dict(zip(ASCENTS, objectives, strict=True))


def row(oracle: ModelOracle, batches: Sequence[Batch], classes: int) -> Row:
    """Return the columns `BY_ASCENT`.

    Args:
        oracle: the model with its training loss.
        batches: inputs and labels.
        classes: number of classes.

    Raises:
        NonFiniteLossError: a loss is not finite at the weights.
    """
    climbed = adversaries(classes)
    near = flips(oracle, batches, L2(ball.RADIUS), climbed)
    found = flips(oracle, batches, L2(RADIUS), climbed)
    largest = zero_one_sharpness(oracle, batches, L2(RADIUS), climbed, steps=STEPS)
    counts = {"flips_near": near.flipped, "flips": found.flipped, "repaired": found.repaired}
    quantities: dict[str, Mapping[str, float]] = {
        **{name: {ascent: count / found.examples for ascent, count in of.items()} for name, of in counts.items()},
        "rise": found.rise,
        "cosine": found.cosines[PLAIN_ASCENT],
        "worst": largest.by,
    }
    values: Row = {"ascents_error": largest.error}
    return values | {f"{name}_by_{ascent}": of[ascent] for name, of in quantities.items() for ascent in ASCENTS}
