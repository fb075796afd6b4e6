"""Landscape: loss and error along one or two directions from the weights.

>>> import torch
>>> from bisam import ModelOracle, cross_entropy
>>> _ = torch.manual_seed(0)
>>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
>>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
>>> line = landscape(oracle, data, points=5)                            # a random direction
>>> line.xs
(-1.0, -0.5, 0.0, 0.5, 1.0)
>>> plane = landscape(oracle, data, ("random", cross_entropy), points=5)    # and that of SAM's adversary
>>> len(plane.loss), len(plane.loss[0]), plane.loss[2][2] == line.loss[0][2]
(5, 5, True)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import isfinite
from typing import Any, Literal

import torch
from torch import Tensor

from bisam.analysis.samples import Answers, Mode, Progress, Result, Sample, Source, sampled, unit
from bisam.analysis.zero_one import ZeroOne
from bisam.objectives import Objective
from bisam.validation import positive, whole
from bisam.vector import Vector

Direction = Literal["random"] | Objective | Vector
"""A direction: random and normalised by filters, the ascent direction of an objective, or a given displacement."""


@dataclass(frozen=True)
class Landscape(Result):
    """Loss and error on a line or a plane through the weights.

    Attributes:
        xs: coordinates along the first direction.
        ys: coordinates along the second direction; (0.0,) for a line.
        loss: the loss, a row for each of `ys`.
        error: the 0-1 loss, a row for each of `ys`; empty if the outputs are no logits of several classes.
        along: the directions, as texts.
        mode: the mode of the model; None: as it was.
        seed: the seed of random directions and of forward passes.
        examples: number of losses that count.
    """

    xs: tuple[float, ...]
    ys: tuple[float, ...]
    loss: tuple[tuple[float, ...], ...]
    error: tuple[tuple[float, ...], ...]
    along: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns all attributes, for JSON; a loss that is not finite is None."""
        found = super().to_dict()
        found["loss"] = [[v if isfinite(v) else None for v in row] for row in self.loss]
        return found

    def plot(self, axes: Any = None) -> Any:
        """Draws loss and error as lines, or the loss as contours, into matplotlib axes, which are returned."""
        from bisam.analysis.plots import contours, profile

        labels = tuple(f"along {name}" for name in self.along)
        if len(self.ys) == 1:
            return profile(self.xs, self.loss[0], self.error[0] if self.error else (), labels[0], (0.0,), axes)
        return contours(self.xs, self.ys, self.loss, labels, {"": (0.0, 0.0)}, axes)


def landscape(
    source: Source,
    data: Iterable[Any],
    along: Direction | tuple[Direction, Direction] = "random",
    *,
    extent: float = 1.0,
    points: int = 21,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Landscape:
    """Returns loss and error along one or two directions.

    A random direction is scaled filter by filter to the norm of the weights (Li et al., 2018,
    https://arxiv.org/abs/1712.09913), so that a distance of 1 replaces as much as there is; biases and the weights of
    normalisation layers stay. The direction of an objective is that of its gradient, and a distance is that of the
    weights. The distances along a given displacement are multiples of it. Two directions need not be orthogonal.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches, read once and kept, for example a DataLoader without augmentation.
        along: one direction, or two for a plane.
        extent: largest distance, > 0, in both senses of each direction.
        points: number of points along each direction, >= 2; an odd number has the weights themselves.
        mode: see `sharpness`.
        seed: seeds random directions, and random numbers of forward passes.
        progress: see `sharpness`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, the data is empty, or a loss at the weights is not finite.
    """
    positive("extent", extent)
    whole("points", points, least=2)
    directions = along if isinstance(along, tuple) else (along,)
    if not 1 <= len(directions) <= 2:
        raise ValueError(f"along must be one direction or two, got {len(directions)}")
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        plain = sample.answers()
        random = torch.Generator().manual_seed(seed)
        vectors = [_vector(direction, sample, random) for direction in directions]
        xs = tuple(torch.linspace(-extent, extent, points, dtype=torch.double).tolist())
        ys = xs if len(vectors) == 2 else (0.0,)
        sample.passes.expected = len(xs) * len(ys) + 1

        def at(x: float, y: float) -> Vector:
            return vectors[0] * x + vectors[1] * y if len(vectors) == 2 else vectors[0] * x

        loss, error = surface(sample, plain, at, xs, ys)
        return Landscape(mode, seed, plain.count * sample.ranks, xs, ys, loss, error, tuple(map(_name, directions)))


Rows = tuple[tuple[float, ...], ...]
"""Values on a plane, a row for each vertical coordinate."""


def surface(
    sample: Sample,
    plain: Answers,
    at: Callable[[float, float], Vector],
    xs: Sequence[float],
    ys: Sequence[float],
    around: Callable[[float, float], AbstractContextManager[None]] = lambda x, y: nullcontext(),
) -> tuple[Rows, Rows]:
    """Returns loss and error at all coordinates; the error is empty if the outputs are no logits of several classes.

    Args:
        sample: the loss and its data.
        plain: the answers at the weights.
        at: the displacement at two coordinates.
        xs: first coordinates.
        ys: second coordinates.
        around: a context in which the loss at two coordinates is computed.
    """
    first = plain.parts[0]
    error = ZeroOne.like(sample.oracle.loss)
    if not _fits(error, first.outputs, first.targets):
        error = None
    losses: list[tuple[float, ...]] = []
    errors: list[tuple[float, ...]] = []
    for y in ys:
        row: list[tuple[float, float]] = []
        for x in xs:
            with around(x, y):
                answers = sample.answers(at(x, y))
            row.append((answers.value, 0.0 if error is None else answers.under(error).value))
        losses.append(tuple(loss for loss, _ in row))
        errors.append(tuple(wrong for _, wrong in row))
    return tuple(losses), tuple(errors) if error is not None else ()


def _vector(direction: Direction, sample: Sample, random: torch.Generator) -> Vector:
    weights = sample.oracle.weights
    if isinstance(direction, Vector):
        if [t.shape for t in direction] != [t.shape for t in weights]:
            raise ValueError(
                f"a direction has {len(direction)} tensors, and the model {len(weights)} trainable ones of other shapes"
            )
        return direction
    if direction == "random":
        noise = weights.random(lambda t: torch.randn(t.shape, generator=random, dtype=t.dtype).to(t.device))
        return weights.like([_by_filters(n, w) for n, w in zip(noise, weights, strict=True)])
    if not callable(direction):
        raise TypeError(f"a direction must be 'random', an objective such as NegLog(), or a Vector, got {direction!r}")
    return unit(sample.gradient(None, direction)[0])


def _by_filters(noise: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() < 2:
        return torch.zeros_like(weight)
    lengths = [t.flatten(1).norm(dim=1).view(-1, *[1] * (t.dim() - 1)) for t in (noise, weight)]
    return noise * (lengths[1] / lengths[0].clamp_min(torch.finfo(noise.dtype).tiny))


def _fits(error: ZeroOne, outputs: Any, targets: Any) -> bool:
    try:
        error.labels(outputs, targets)
    except (TypeError, ValueError):
        return False
    return True


def _name(direction: Direction) -> str:
    if isinstance(direction, Vector):
        return "a given displacement"
    if direction == "random":
        return "a random direction"
    return f"the gradient of {getattr(direction, '__name__', type(direction).__name__)}"
