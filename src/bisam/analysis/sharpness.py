"""Sharpness: how far the loss rises in a ball around the weights.

    >>> import torch
    >>> from bisam import L2, ModelOracle, cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
    >>> data = [(torch.randn(8, 4), torch.randint(3, (8,))) for _ in range(2)]
    >>> one = sharpness(oracle, data, L2(0.5))               # SAM's own step
    >>> ten = sharpness(oracle, data, L2(0.5), steps=10)     # projected ascent
    >>> mean = average_sharpness(oracle, data, L2(0.5))      # random directions
    >>> mean.rise < one.rise <= ten.rise
    True

Sharpness depends on the scale of the weights, and correlates with generalisation in some settings only (Andriushchenko
et al., 2023, https://arxiv.org/abs/2302.07011). Compare models that were trained alike, and see `normalized`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import Any, cast

import torch
from torch import Tensor

from bisam.analysis.ascent import Found, climb
from bisam.analysis.balls import ball_of
from bisam.analysis.samples import Mode, Progress, Result, Sample, Source, sampled
from bisam.objectives import Objective
from bisam.perturbations import L2, Perturbation, geometry
from bisam.schedules import Radius
from bisam.validation import describe, instance, whole


@dataclass(frozen=True)
class Sharpness(Result):
    """The rise of the loss in a ball.

    Attributes:
        rise: the largest (or mean) loss in the ball minus the loss at the weights; with `m` the mean over the groups.
        loss: the loss at the weights.
        std: standard deviation over the random directions (`average_sharpness`), or over the restarts; 0 for one.
        trace: the largest rise after each step of ascent, beginning with 0; of the first ascent, without restarts.
        rho: the radius.
        perturb: the ball, as text.
        ascent: what was climbed, as text; empty for random directions.
        steps: number of steps of each ascent, 0 for random directions.
        draws: number of restarts or of random directions.
        m: number of examples that have a ball of their own; None: one ball for all examples.
        normalized: whether the logits were normalised.
        mode: the mode of the model; None: as it was.
        seed: the seed of random starts, directions and forward passes.
        examples: number of losses that count.
        forward: number of forward passes over all examples.
        backward: number of backward passes over all examples.
    """

    rise: float
    loss: float
    std: float
    trace: tuple[float, ...]
    rho: float
    perturb: str
    ascent: str
    steps: int
    draws: int
    m: int | None
    normalized: bool
    forward: float
    backward: float

    def plot(self, axes: Any = None) -> Any:
        """Draws the largest rise against the steps of ascent into matplotlib axes, which are returned.

        The mean over random directions is a point with its standard deviation, as is the largest rise of several
        ascents.
        """
        from bisam.analysis.plots import interval, trace

        if not self.steps:
            return interval(self.rise, self.std, "rise of the loss", f"{self.draws} random\ndirections", axes)
        last = (
            (self.rise, self.std, f"largest of {self.draws} ascents,\n± their standard deviation")
            if self.draws > 1
            else None
        )
        return trace(self.trace, "rise of the loss", axes, last)


def sharpness(
    source: Source,
    data: Iterable[Any],
    perturb: Perturbation | Radius = L2(0.05),  # noqa: B008
    ascent: Objective | None = None,
    *,
    steps: int = 1,
    restarts: int = 0,
    m: int | None = None,
    normalized: bool = False,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Sharpness:
    """Returns the largest rise of the training loss that projected ascent finds in a ball around the weights.

    It is a lower bound of the largest rise. The model is not changed. With k steps and r restarts it takes
    (k + 1)(r + 1) forward and k (r + 1) backward passes over the data, and one more forward pass.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches, read once and kept, for example a DataLoader without augmentation.
        perturb: the ball: a radius, `L2`, `Adaptive`, or one of them in `NormLayers` or `Only`.
        ascent: the objective that is climbed, for example `NegLog()`. Default: the training loss.
        steps: number of steps, >= 1; with 1 it is the step of SAM.
        restarts: number of further ascents from random points of the ball, >= 0.
        m: gives each part of `m` examples a ball of its own and returns the mean (m-sharpness, Foret et al., 2021).
            Default: one ball for all examples.
        normalized: whether the loss is that of logits divided by their root mean square, so that sharpness does not
            depend on their scale (Andriushchenko et al., 2023).
        mode: "eval" uses running statistics and no dropout, "train" those of each batch, None leaves the model as it
            is.
        seed: seeds random starts and the random numbers of forward passes.
        progress: called as `progress(done, total)` after each forward pass of a batch.

    Raises:
        TypeError: an argument has the wrong type, or `perturb` is no ball.
        ValueError: an argument is outside its range, the data is empty, or a loss at the weights is not finite.
    """
    whole("steps", steps)
    whole("restarts", restarts, least=0)
    ball = geometry(perturb)
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        climbed, measure = _objectives(ascent, sample, normalized)
        sample.passes.expected = 1 + (steps + 1) * (restarts + 1)
        random = torch.Generator().manual_seed(seed)
        groups: list[_Group] = []
        for group in sample.parts(m):
            inside, plain = ball_of(ball, group.oracle), group.answers(objective=measure)
            start = Found(plain.value, None, (plain.value,))
            starts = [start, *[replace(start, at=inside.on_the_boundary(random)) for _ in range(restarts)]]
            runs = [climb(group, inside, climbed, measure, steps, begin) for begin in starts]
            groups.append(_Group(plain.value, plain.count, [[v - plain.value for v in run.trace] for run in runs]))
        of_runs = [fmean(group.traces[i][-1] for group in groups) for i in range(restarts + 1)]
        return _result(
            sample,
            ball,
            groups,
            mode=mode,
            seed=seed,
            m=m,
            normalized=normalized,
            rise=fmean(max(trace[-1] for trace in group.traces) for group in groups),
            std=_std(of_runs),
            trace=tuple(fmean(values) for values in zip(*[group.traces[0] for group in groups], strict=True)),
            ascent=repr(ascent or sample.oracle.loss),
            steps=steps,
            draws=restarts + 1,
        )


def average_sharpness(
    source: Source,
    data: Iterable[Any],
    perturb: Perturbation | Radius = L2(0.05),  # noqa: B008
    *,
    draws: int = 20,
    m: int | None = None,
    normalized: bool = False,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Sharpness:
    """Returns the mean rise of the training loss at random points of the boundary of a ball.

    The points are T u with u of uniform distribution on a sphere. It takes draws + 1 forward passes over the data.

    Args:
        source: see `sharpness`.
        data: see `sharpness`.
        perturb: see `sharpness`.
        draws: number of random points, >= 1; of each group with `m`.
        m: see `sharpness`.
        normalized: see `sharpness`.
        mode: see `sharpness`.
        seed: see `sharpness`.
        progress: see `sharpness`.

    Raises:
        TypeError: see `sharpness`.
        ValueError: see `sharpness`.
    """
    whole("draws", draws)
    ball = geometry(perturb)
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        _, measure = _objectives(None, sample, normalized)
        sample.passes.expected = 1 + draws
        random = torch.Generator().manual_seed(seed)
        groups: list[_Group] = []
        for group in sample.parts(m):
            inside, plain = ball_of(ball, group.oracle), group.answers(objective=measure)
            points = (inside.displacement(inside.on_the_boundary(random)) for _ in range(draws))
            rises = [group.answers(point, measure).value - plain.value for point in points]
            groups.append(_Group(plain.value, plain.count, [rises]))
        of_draws = [fmean(group.traces[0][i] for group in groups) for i in range(draws)]
        return _result(
            sample,
            ball,
            groups,
            mode=mode,
            seed=seed,
            m=m,
            normalized=normalized,
            rise=fmean(of_draws),
            std=_std(of_draws),
            trace=(0.0,),
            ascent="",
            steps=0,
            draws=draws,
        )


@dataclass(frozen=True)
class _Group:
    """A part of the examples with a ball of its own: the loss at the weights, its number, and rises in the ball."""

    loss: float
    count: float
    traces: list[list[float]]


@dataclass(frozen=True)
class Normalized:
    """An objective of logits that are divided by their standard deviation over the classes.

    The loss is then independent of the scale of the logits (Andriushchenko et al., 2023,
    https://arxiv.org/abs/2302.07011).

    Args:
        objective: the objective of the normalised logits (N, K, ...).
    """

    objective: Objective

    def __call__(self, outputs: Tensor, targets: Any) -> Tensor:
        """Returns the losses of the normalised logits.

        Raises:
            ValueError: the outputs are no logits (N, K, ...) of K >= 2 classes.
        """
        if not isinstance(cast(Any, outputs), Tensor) or outputs.dim() < 2 or outputs.shape[1] < 2:
            raise ValueError(f"normalised logits (N, K, ...) have K >= 2 classes, got {describe(outputs)}")
        deviation = outputs.std(1, keepdim=True, correction=0)
        return self.objective(outputs / deviation.clamp_min(torch.finfo(outputs.dtype).tiny), targets)

    @property
    def ignore_index(self) -> int | None:
        """The label of examples that the objective ignores."""
        return getattr(self.objective, "ignore_index", None)


def _result(sample: Sample, ball: Perturbation, groups: Sequence[_Group], **settings: Any) -> Sharpness:
    examples = sum(group.count for group in groups)
    return Sharpness(
        loss=sum(group.loss * group.count for group in groups) / max(examples, 1),
        rho=ball_of(ball, sample.oracle).rho,
        perturb=repr(ball),
        examples=examples * sample.ranks,
        forward=sample.passes.forward,
        backward=sample.passes.backward,
        **settings,
    )


def _objectives(ascent: Objective | None, sample: Sample, normalized: bool) -> tuple[Objective, Objective]:
    """Returns what is climbed, and what is measured."""
    if ascent is not None:
        instance("ascent", ascent, "an objective such as NegLog()")
    climbed, measure = ascent or sample.oracle.loss, sample.oracle.loss
    return (Normalized(climbed), Normalized(measure)) if normalized else (climbed, measure)


def _std(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0
