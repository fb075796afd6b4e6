"""Ascent: the largest value of a measure that projected gradient ascent finds in a ball."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil

from bisam.analysis.balls import Ball
from bisam.analysis.samples import Sample, unit
from bisam.objectives import Objective
from bisam.vector import Vector

_NEW = 0.75  # share of the new direction in a step; the rest is momentum
_RISES = 0.75  # share of the steps that must rise for the step size to stay


@dataclass(frozen=True)
class Found:
    """The largest value of a measure so far.

    Attributes:
        measure: the value.
        at: where it was found, as u with the displacement T u; None: at the weights.
        trace: the largest value at the weights, and after each step.
    """

    measure: float
    at: Vector | None
    trace: tuple[float, ...]

    def better(self, measure: float, at: Vector | None) -> Found:
        """Returns what is known after another point; the later of two equal points is kept."""
        point = (measure, at) if measure >= self.measure else (self.measure, self.at)
        return Found(*point, (*self.trace, point[0]))


def climb(
    sample: Sample, ball: Ball, objective: Objective | None, measure: Objective | None, steps: int, found: Found
) -> Found:
    """Climbs an objective in a ball, and returns the largest value of a measure on the way.

    The steps are those of APGD (Croce and Hein, 2020, https://arxiv.org/abs/2003.01690): u <- P(u + s g/||g||) with
    momentum, where P projects onto the ball. s is 2 rho at first. At checkpoints it is halved, and the ascent returns
    to its best point, if the objective has risen in too few steps, or if neither s nor the best value has changed since
    the last checkpoint. The first step from u = 0 is that of SAM. It takes `steps` gradients and one forward pass.

    Args:
        sample: the loss and its data.
        ball: the set of displacements.
        objective: what is climbed. Default: the training loss.
        measure: what is reported. Default: the training loss.
        steps: number of steps.
        found: where the ascent begins, and the largest value so far.
    """
    u = previous = ball.scale * 0.0 if found.at is None else found.at
    size, checks, rises, since = 2 * ball.rho, checkpoints(steps), 0, 0
    gradient, answers = sample.gradient(ball.displacement(u), objective, ball.wrt)
    before = answers.value
    top, top_u, top_gradient, last = before, u, gradient, (0.0, 0.0)
    for k in range(1, steps + 1):
        ahead = ball.inside(u + unit(ball.ascent(gradient)) * size)
        step = ahead if k == 1 else ball.inside(u + (ahead - u) * _NEW + (u - previous) * (1 - _NEW))
        previous, u = u, step
        if k < steps:
            gradient, answers = sample.gradient(ball.displacement(u), objective, ball.wrt)
        else:
            answers = sample.answers(ball.displacement(u), objective)
        value = answers.value
        found = found.better(answers.under(measure or sample.oracle.loss).value, u)
        rises, before = rises + (value > before), value
        if value > top:
            top, top_u, top_gradient = value, u, gradient
        if k in checks:
            if rises < _RISES * (k - since) or last == (size, top):
                size /= 2
                u, previous, gradient, before = top_u, top_u, top_gradient, top
            last, rises, since = (size, top), 0, k
    return found


def checkpoints(steps: int) -> Sequence[int]:
    """Returns the steps after which the step size may be halved: after 22 % of all, then at shrinking intervals."""
    shares = [0.0, 0.22]
    while shares[-1] < 1:
        shares.append(shares[-1] + max(shares[-1] - shares[-2] - 0.03, 0.06))
    return sorted({ceil(share * steps - 1e-9) for share in shares[1:] if share < 1})  # 0.57 is 0.5700000001 as a sum
