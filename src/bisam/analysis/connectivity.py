"""Connectivity: loss and error between checkpoints, on a line through two or on a plane through three.

    >>> import torch
    >>> from bisam import ModelOracle, cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> model, other = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> data = [(torch.randn(32, 4), torch.randint(3, (32,)))]
    >>> line = connectivity(ModelOracle(model, cross_entropy), data, other.state_dict(), points=5)
    >>> line.xs, line.barrier                                # the loss is convex in the weights of a linear model
    ((0.0, 0.25, 0.5, 0.75, 1.0), 0.0)

Two checkpoints are linearly connected if the loss on the line between them does not rise (Frankle et al., 2020,
https://arxiv.org/abs/1912.05671). The running statistics of normalisation layers belong to one point of the weights
only, and those between two checkpoints have too small a variance (Jordan et al., 2023,
https://arxiv.org/abs/2211.08403), so they are recomputed from training batches at each point.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf, isfinite, isnan
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bisam.analysis.landscape import Landscape, surface
from bisam.analysis.samples import Mode, Progress, Sample, Source, read, sampled
from bisam.batches import Batch, size
from bisam.distributed.layout import dtensor_type
from bisam.loss import SharpnessAware
from bisam.model import running_statistics
from bisam.model.oracle import ModelOracle
from bisam.validation import non_negative, whole
from bisam.vector import Vector

Checkpoint = Mapping[str, Any]
"""A state dict of the model, on any device."""

_WRAPPERS = {"module", "_orig_mod"}  # the names that DistributedDataParallel and torch.compile give to a model
_LISTED = 3
_COLLINEAR = 1e-6


@dataclass(frozen=True)
class Connectivity(Landscape):
    """Loss and error between checkpoints.

    Attributes:
        xs: for a line, 0 at the weights and 1 at the other checkpoint; for a plane, the distance from the weights
            towards the second checkpoint. The attributes that are not listed are those of `Landscape`.
        ys: (0.0,) for a line; for a plane, the distance at a right angle, on the side of the third checkpoint.
        marks: the coordinates of the weights and of the other checkpoints.
        barrier: the largest rise of the loss between two checkpoints above the straight line from one loss to the other
            (Entezari et al., 2022, https://arxiv.org/abs/2110.06296), >= 0; None for a plane.
        error_barrier: the same of the error; None for a plane, and for outputs that are no logits of several classes.
        statistics: the running statistics at each point: "recomputed", "interpolated", "of each batch" or "none".
        distance: the Euclidean distance from the weights to each of the other checkpoints.
    """

    marks: tuple[tuple[float, float], ...]
    barrier: float | None
    error_barrier: float | None
    statistics: str
    distance: tuple[float, ...]

    def to_dict(self) -> dict[str, Any]:
        """Returns all attributes, for JSON; a loss that is not finite is None."""
        found = super().to_dict()
        found["barrier"] = self.barrier if self.barrier is not None and isfinite(self.barrier) else None
        return found

    def plot(self, axes: Any = None) -> Any:
        """Draws loss and error as lines, or the loss as contours, into matplotlib axes, which are returned."""
        from bisam.analysis.plots import contours, profile

        if len(self.ys) == 1:
            across = "from the weights (0) to the other checkpoint (1)"
            return profile(self.xs, self.loss[0], self.error[0] if self.error else (), across, (0.0, 1.0), axes)
        labels = ("distance towards the second checkpoint", "distance at a right angle")
        return contours(self.xs, self.ys, self.loss, labels, dict(zip(("1", "2", "3"), self.marks, strict=True)), axes)


def connectivity(
    source: Source,
    data: Iterable[Any],
    other: Checkpoint | Sequence[Checkpoint],
    *,
    recalibrate: Iterable[Any] | Literal["interpolate"] | None = None,
    points: int = 21,
    beyond: float | None = None,
    mode: Mode = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Connectivity:
    """Returns loss and error on the line from the weights to another checkpoint, or on the plane through three.

    The plane is that of Garipov et al. (2018, https://arxiv.org/abs/1802.10026). The trainable weights are displaced as
    in training. Other buffers with floating-point entries are interpolated as the weights are, unless they are running
    statistics (see `recalibrate`); all others, and buffers that are no part of a state dict, are those of the model.
    With p points on the line and running statistics from r times as many examples as `data` has, it takes
    p (1 + r) + 1 forward passes over the data, and for a plane p^2 (1 + r) + 1. Weights, buffers and modes of the model
    are the same bits afterwards, also after an error or an interruption.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`. Its weights may be sharded by
            FSDP2; all ranks then call the function together.
        data: batches, read once and kept, for example a DataLoader without augmentation.
        other: the state dict of another checkpoint, or two of them for a plane. The prefixes of
            DistributedDataParallel and of torch.compile may differ.
        recalibrate: training batches from which the running statistics of BatchNorm are recomputed at each point: they
            are reset and averaged over the batches by forward passes in train mode, as by
            `torch.optim.swa_utils.update_bn`; read once and kept. "interpolate" interpolates running statistics as if
            they were weights: both ends are then the checkpoints themselves, and the points between are worse than
            their weights are. Default: none, for a model without running statistics.
        points: number of points from checkpoint to checkpoint, both included, >= 3; for a plane of each axis.
        beyond: share of the line that is added at both ends, in whole steps between points; for a plane the share of
            the extent of each axis. Default: 0 for a line, 0.2 for a plane.
        mode: "eval", or "train" for the statistics of each batch, which need no recalibration.
        seed: seeds the random numbers of forward passes.
        progress: see `sharpness`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range; the data is empty; a checkpoint has other names or shapes than the
            model, or frozen parameters that differ; it has the same weights; three checkpoints are on a line; the model
            has running statistics and `recalibrate` is not given, or it has none and `recalibrate` is given; the loss
            of a checkpoint is not finite.
    """
    whole("points", points, least=3)
    others = cast("tuple[Checkpoint, ...]", tuple(other) if isinstance(other, list | tuple) else (other,))
    if not 1 <= len(others) <= 2 or not all(isinstance(cast(Any, one), Mapping) for one in others):
        kinds = ", ".join(type(one).__name__ for one in others) or "none"
        raise TypeError(f"other must be a state dict such as model.state_dict(), or two of them, got {kinds}")
    margin = (0.0 if len(others) == 1 else 0.2) if beyond is None else beyond
    non_negative("beyond", margin)
    if mode not in ("eval", "train"):
        raise ValueError(f"mode must be 'eval' or 'train', got {mode!r}")
    if not isinstance(cast(Any, source), ModelOracle | SharpnessAware):
        raise TypeError(
            "checkpoints are those of a torch module: pass the loss SharpnessAware(model, ...) or "
            f"ModelOracle(model, loss), got {type(source).__name__}"
        )
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        oracle = cast(ModelOracle, sample.model)
        states = [_matched(one, oracle) for one in others]
        deltas = [_difference(state, oracle) for state in states]
        statistics = _Statistics(sample, states, recalibrate, mode)
        lengths = [float(delta.norm()) for delta in deltas]
        if not all(map(isfinite, lengths)):
            raise ValueError("a checkpoint has weights that are not finite: it has diverged")
        if not all(lengths):
            raise ValueError(
                "a checkpoint has the weights of the model itself: a state dict refers to the tensors of its model, so "
                "copy it (copy.deepcopy) before training goes on"
            )
        frame = _Line(deltas) if len(deltas) == 1 else _Plane(deltas)
        xs, ys = frame.coordinates(points, margin)
        sample.passes.expected = len(xs) * len(ys) * (1 + statistics.passes) + 1
        plain = sample.answers()

        def around(x: float, y: float) -> Any:
            return statistics.at(frame.shares(x, y), lambda: frame.displacement(x, y))

        loss, error = surface(sample, plain, frame.displacement, xs, ys, around)
        barriers = [None, None]
        if isinstance(frame, _Line):
            ends = (xs.index(0.0), xs.index(1.0))
            for end in ends:
                if not isfinite(loss[0][end]):
                    raise ValueError(
                        f"the loss is {loss[0][end]} at {xs[end]:g} of the line: a checkpoint has diverged"
                    )
            barriers = [_barrier(xs, rows[0], *ends) if rows else None for rows in (loss, error)]
        return Connectivity(
            mode=mode,
            seed=seed,
            examples=plain.count * sample.ranks,
            xs=xs,
            ys=ys,
            loss=loss,
            error=error,
            along=tuple(f"the difference to checkpoint {i}" for i in range(2, 2 + len(deltas))),
            marks=frame.marks,
            barrier=barriers[0],
            error_barrier=barriers[1],
            statistics=statistics.kind,
            distance=tuple(lengths),
        )


def _barrier(xs: Sequence[float], values: Sequence[float], first: int, last: int) -> float:
    """Returns the largest rise above the straight line between two values; infinite where one is not finite."""
    rises = [values[i] - (1 - xs[i]) * values[first] - xs[i] * values[last] for i in range(first, last + 1)]
    return max(inf if isnan(rise) else rise for rise in rises)


@dataclass(frozen=True)
class _Line:
    """The line from the weights to another checkpoint, with 0 and 1 at its ends."""

    deltas: Sequence[Vector]
    marks: tuple[tuple[float, float], ...] = ((0.0, 0.0), (1.0, 0.0))

    def coordinates(self, points: int, margin: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        steps = points - 1
        extra = int(margin * steps + 1e-9)
        return tuple(i / steps for i in range(-extra, steps + extra + 1)), (0.0,)

    def shares(self, x: float, y: float) -> tuple[float, ...]:
        """Returns the share of the difference to each of the other checkpoints."""
        return (x,)

    def displacement(self, x: float, y: float) -> Vector:
        return self.deltas[0] * x


class _Plane:
    """The plane through three checkpoints, with distances from the first as coordinates (Garipov et al., 2018)."""

    def __init__(self, deltas: Sequence[Vector]) -> None:
        self._second, self._third = deltas
        self._right = float(self._second.norm())
        self._along = float(self._third.dot(self._second)) / self._right
        self._up = float((self._third - self._third.onto(self._second)).norm())
        if self._up <= _COLLINEAR * float(self._third.norm()):
            raise ValueError("the three checkpoints are on a line: pass one of them, and beyond= for what lies outside")
        self.marks = ((0.0, 0.0), (self._right, 0.0), (self._along, self._up))

    def coordinates(self, points: int, margin: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
        axes: list[tuple[float, ...]] = []
        for values in zip(*self.marks, strict=True):
            low, high = min(values), max(values)
            room = margin * (high - low)
            axes.append(tuple(torch.linspace(low - room, high + room, points, dtype=torch.double).tolist()))
        return axes[0], axes[1]

    def shares(self, x: float, y: float) -> tuple[float, ...]:
        third = y / self._up
        return (x - third * self._along) / self._right, third

    def displacement(self, x: float, y: float) -> Vector:
        second, third = self.shares(x, y)
        return self._second * second + self._third * third


class _Statistics:
    """The buffers of a model between checkpoints.

    Args:
        sample: the loss and its data.
        states: the other checkpoints, by the names of the model.
        recalibrate: see `connectivity`.
        mode: see `connectivity`.

    Attributes:
        kind: see `Connectivity.statistics`.
        passes: number of forward passes over the data that the statistics of one point take.
    """

    def __init__(
        self,
        sample: Sample,
        states: Sequence[Mapping[str, Tensor]],
        recalibrate: Iterable[Any] | Literal["interpolate"] | None,
        mode: Mode,
    ) -> None:
        self._sample, self._oracle = sample, cast(ModelOracle, sample.model)
        model = self._oracle.model
        layers = running_statistics.layers_of(model)
        if isinstance(recalibrate, str) and recalibrate != "interpolate":
            raise ValueError(f"recalibrate must be training batches or 'interpolate', got {recalibrate!r}")
        if recalibrate is not None and (mode == "train" or not layers):
            why = "mode='train' uses the statistics of each batch" if layers else "the model has no running statistics"
            raise ValueError(f"recalibrate has no effect, leave it out: {why}")
        if layers and mode == "eval" and recalibrate is None:
            raise ValueError(
                f"the model has running statistics ({type(layers[0]).__name__}), which belong to one checkpoint only: "
                "pass recalibrate=training batches, or mode='train' for the statistics of each batch"
            )
        self._batches: list[Batch] = []
        self._layers: list[nn.Module] = []
        if recalibrate is not None and recalibrate != "interpolate":
            if by_hand := [m for m in layers if not isinstance(m, running_statistics.RECOMPUTED)]:
                raise ValueError(
                    f"the running statistics of {type(by_hand[0]).__name__} cannot be recomputed, only those of "
                    "BatchNorm: pass recalibrate='interpolate', or mode='train'"
                )
            self._batches, self._layers = read(recalibrate, sample.oracle), layers
        running = {id(b) for layer in layers for b in layer.buffers(recurse=False)}
        self._moved: list[tuple[Tensor, list[Tensor]]] = []
        for name, buffer in model.named_buffers():
            taken = all(name in state for state in states) and buffer.is_floating_point()
            if taken and (recalibrate == "interpolate" or id(buffer) not in running):
                ends = [state[name].to(buffer.device, buffer.dtype) for state in states]
                if any(not torch.equal(end, buffer) for end in ends):
                    self._moved.append((buffer, [end - buffer for end in ends]))
        kinds = {"train": "of each batch", "eval": "recomputed" if self._batches else "interpolated"}
        self.kind = kinds[mode] if layers else "none"
        self.passes = sum(size(batch) or 1 for batch in self._batches) / sample.passes.examples

    @contextmanager
    def at(self, shares: Sequence[float], displacement: Callable[[], Vector]) -> Generator[None]:
        """A context in which the buffers of the model are those of a point; they are restored at its end."""
        with running_statistics.buffers_as(self._oracle, self._moved_by(shares)):
            if self._batches:
                self._recompute(displacement)
            yield

    def _moved_by(self, shares: Sequence[float]) -> list[tuple[Tensor, Tensor]]:
        """Returns the buffers that are interpolated, with their contents at a point."""
        found: list[tuple[Tensor, Tensor]] = []
        for buffer, deltas in self._moved:
            content = buffer.detach().clone()
            for share, delta in zip(shares, deltas, strict=True):
                content.add_(delta, alpha=share)
            found.append((buffer, content))
        return found

    def _recompute(self, displacement: Callable[[], Vector]) -> None:
        oracle = self._oracle
        with running_statistics.recomputing(oracle, self._layers):
            for i, batch in enumerate(self._batches):
                with oracle.fork(self._sample.seed, -1 - i):
                    oracle.query(batch, at=displacement(), grad=False, track=True)
                self._sample.passes.add(batch, grad=False)


def _matched(other: Checkpoint, oracle: ModelOracle) -> dict[str, Tensor]:
    """Returns the tensors of a checkpoint by the names of the model.

    Raises:
        ValueError: they differ in names, or in frozen parameters.
    """
    found = {name: value for name, value in other.items() if isinstance(value, Tensor)}
    own = {name for name, value in oracle.model.state_dict().items() if isinstance(value, Tensor)} | {*oracle.names}
    if own != found.keys():
        plain = {_unwrapped(name): name for name in own}
        found = {plain.get(_unwrapped(name), name): value for name, value in found.items()}
    if own != found.keys():
        missing, foreign = sorted(own - found.keys()), sorted(found.keys() - own)
        said = [f"it lacks {_list(missing)}"] * bool(missing) + [f"the model lacks {_list(foreign)}"] * bool(foreign)
        raise ValueError(f"a checkpoint is not one of this model: {'; '.join(said)}")
    for name, p in oracle.model.named_parameters():
        if not p.requires_grad and not torch.equal(_full(p), _full(found[name]).to(p.device, p.dtype)):
            raise ValueError(
                f"the frozen parameter {name} differs in a checkpoint, and only trainable weights are displaced: call "
                "requires_grad_(True) on the parameters that differ"
            )
    return found


def _unwrapped(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (f" and {len(names) - _LISTED} more" if len(names) > _LISTED else "")


def _difference(state: Mapping[str, Tensor], oracle: ModelOracle) -> Vector:
    """Returns the displacement from the weights to a checkpoint.

    Raises:
        ValueError: a shape differs.
    """
    parts: list[Tensor] = []
    for i, (name, p, w) in enumerate(zip(oracle.names, oracle.parameters, oracle.weights, strict=True)):
        there = state[name].detach()
        if there.shape != p.shape:
            raise ValueError(
                f"a checkpoint is not one of this model: {name} has shape {tuple(there.shape)} there and "
                f"{tuple(p.shape)} in the model"
            )
        parts.append(oracle.layout.part(i, _full(there).to(w.device, w.dtype)) - w)
    return oracle.weights.like(parts)


def _full(tensor: Tensor) -> Tensor:
    """Returns a tensor whose parts are gathered; all ranks call it together."""
    return cast(Any, tensor).full_tensor() if isinstance(tensor, dtensor_type()) else tensor
