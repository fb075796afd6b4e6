"""Features: what a layer of a model is given, and how many dimensions it takes.

    >>> import torch
    >>> from bisam import ModelOracle, cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 2), torch.nn.Linear(2, 16), torch.nn.Linear(16, 3))
    >>> data = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(2)]
    >>> rank = feature_rank(ModelOracle(model, cross_entropy), data)
    >>> rank.at, rank.dimensions, rank.components          # 16 dimensions behind a bottleneck of 2
    ('2', 16, 2)

SAM lowers the rank of features (Andriushchenko et al., 2023, https://arxiv.org/abs/2305.16292).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bisam.analysis.samples import Mode, Progress, Result, Sample, Source, sampled
from bisam.model import capture
from bisam.model.capture import Capture
from bisam.validation import share


@dataclass(frozen=True)
class FeatureRank(Result):
    """The rank of the features, by three definitions, from the singular values of the centred features.

    Attributes:
        at: name of the module whose inputs are the features.
        rows: number of rows of the feature matrix: examples, or positions of sequences at a linear layer.
        dimensions: number of its columns.
        components: number of principal components that explain the share `explained` of the variance.
        stable: the stable rank, the sum of the squared singular values divided by the largest one.
        effective: the effective rank, exp of the entropy of the singular values as shares of their sum (Roy and
            Vetterli, 2007).
        explained: a share of the variance.
        values: the singular values, the largest first; at most min(rows, dimensions).
        mode: see `Result`.
        seed: see `Result`.
        examples: number of losses that count.
        forward: number of forward passes over all examples.
    """

    at: str
    rows: int
    dimensions: int
    components: int
    stable: float
    effective: float
    explained: float
    values: tuple[float, ...]
    forward: float

    def plot(self, axes: Any = None) -> Any:
        """Draws the explained variance against the number of components into matplotlib axes, which are returned."""
        from bisam.analysis.plots import explained

        squares = torch.tensor(self.values, dtype=torch.float64).square()
        shares: list[float] = (squares.cumsum(0) / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)).tolist()
        return explained(shares, self.components, self.explained, axes)


def feature_rank(
    source: Source,
    data: Iterable[Any],
    at: str | None = None,
    *,
    explained: float = 0.99,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> FeatureRank:
    """Returns the rank of the features that a module is given.

    The features are centred, and the singular values are exact: the matrix is reduced by QR decompositions in float64,
    on the CPU, in a memory of at most about 3 d² numbers for d dimensions (and never more than the features themselves
    take). It takes one forward pass over the data. The model is not changed.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches, read once and kept, for example a DataLoader without augmentation.
        at: name of the module in `model.named_modules()` whose first input is the features. A linear layer has a row
            for each position (..., d), any other module one for each example, flattened. Default: the linear layer that
            a forward pass calls last.
        explained: share of the variance that the principal components must explain.
        mode: see `sharpness`.
        seed: seeds the random numbers of forward passes.
        progress: see `sharpness`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, the data is empty, the model has no such module or does not call
            it, features or losses are not finite, or the oracle is not that of a torch module.
    """
    share("explained", explained)
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        sample.passes.expected, matrix, count, name = 1, Centred(), 0.0, ""
        with captured(sample, at) as calls:
            for answer in sample.each(grad=False):
                count += float(answer.count)
                call = calls.last()
                name = call.name
                matrix.add(sample.oracle.gathered(call.features).cpu())
        values = matrix.singular_values()
        squares, shares = values.square(), values / values.sum()
        flat = not bool(values.sum() > 0)  # all rows are equal
        return FeatureRank(
            mode=mode,
            seed=seed,
            examples=count * sample.ranks,
            at=name,
            rows=matrix.rows,
            dimensions=matrix.columns,
            components=0 if flat else int((squares.cumsum(0) < explained * squares.sum()).sum()) + 1,
            stable=0.0 if flat else float(squares.sum() / squares[0]),
            effective=0.0 if flat else float(torch.special.entr(shares).sum().exp()),
            explained=explained,
            values=tuple(values.tolist()),
            forward=sample.passes.forward,
        )


class Centred:
    """A matrix of rows that arrive one batch after another, of which the mean is subtracted.

    A column of ones is kept before the others. In the triangular factor of a QR decomposition the mean is then in the
    first row, and the other rows have the singular values of the centred matrix. The factor of two factors, one below
    the other, is that of all rows. Unlike a sum of X^T X it loses no accuracy for small singular values.
    """

    def __init__(self) -> None:
        self.rows, self.columns = 0, 0
        self._kept: list[Tensor] = []
        self._rounding = 0.0

    def add(self, rows: Tensor) -> None:
        """Adds rows (n, d).

        Raises:
            ValueError: they are not finite, or have another number of columns than earlier ones.
        """
        if not bool(rows.isfinite().all()):
            raise ValueError("the features are not finite: the model has diverged")
        if self.rows and rows.shape[1] != self.columns:
            raise ValueError(
                f"the features have {self.columns} and {rows.shape[1]} dimensions in two batches, so that they are no "
                "matrix: choose a layer at= whose inputs always have the same size"
            )
        self.rows, self.columns = self.rows + len(rows), rows.shape[1]
        self._rounding = max(self._rounding, torch.finfo(rows.dtype).eps)
        self._kept.append(torch.cat([rows.new_ones(len(rows), 1, dtype=torch.float64), rows.double()], 1))
        if sum(map(len, self._kept)) > 3 * (self.columns + 1):
            self._kept = [torch.linalg.qr(torch.cat(self._kept), mode="r").R]

    @property
    def variance(self) -> float:
        """The sum over the columns of their variances (divided by the number of rows)."""
        return float(self._factor().square().sum()) / self.rows

    def singular_values(self) -> Tensor:
        """Returns the singular values of the centred matrix, the largest first (min(n, d),), float64."""
        values = torch.linalg.svdvals(self._factor())
        return torch.nn.functional.pad(values, (0, min(self.rows, self.columns) - len(values)))

    def _factor(self) -> Tensor:
        """Returns a matrix with the singular values of the centred one; 0 if the rows differ by rounding only."""
        triangle = torch.linalg.qr(torch.cat(self._kept), mode="r").R
        centred, every = triangle[1:, 1:], triangle[:, 1:]
        return centred if centred.norm() > 10 * self._rounding * every.norm() else torch.zeros_like(centred)


def captured(sample: Sample, at: str | None) -> AbstractContextManager[Capture]:
    """Returns a context that captures the calls of a module of the model, see `bisam.model.capture.captured`.

    Raises:
        ValueError: the oracle is not that of a torch module.
    """
    if sample.model is None:
        raise ValueError("features are those of a torch module: pass SharpnessAware(model, ...) or a ModelOracle")
    return capture.captured(sample.model.model, at)
