"""Curvature: eigenvalues, trace and spectral density of the Hessian, Gauss-Newton or Fisher matrix of a training loss.

    >>> import torch
    >>> from bisam import ModelOracle, cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> oracle = ModelOracle(torch.nn.Linear(4, 3).double(), cross_entropy)
    >>> data = [(torch.randn(32, 4).double(), torch.randint(3, (32,)))]
    >>> top = eigenvalues(oracle, data, k=2)
    >>> top.by, top.values[0] > top.values[1] > 0            # linear logits: the loss is convex
    ('curvlinops', True)

Products with the matrix are exact where curvlinops (Dangel et al., 2025, https://arxiv.org/abs/2501.19183) serves:
models of one input tensor that return logits, without a wrapper. For all other models, losses and precisions a product
is the central difference of two gradients, (g(w + h v) - g(w - h v)) / 2 h, with a relative error of about 1e-9 in
float64 and 1e-3 in float32 where the loss is smooth. In float32 the step is long enough to cross kinks of ReLU, which
have no part in an exact product, so that results can differ by some 20 %: convert such models with `model.double()`. A
result says which it is. It needs the extra `bisam[analysis]`.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bisam.analysis.samples import Mode, Progress, Result, Sample, Source, sampled
from bisam.validation import positive, whole
from bisam.vector import WHOLE

Matrix = Literal["hessian", "ggn", "fisher", "empirical-fisher"]
"""A matrix of the mean loss.

"hessian": its second derivatives. "ggn": the Gauss-Newton matrix. "fisher": the Fisher matrix, which is the mean of the
outer product of the gradient with itself, over examples and over labels that are distributed as the model predicts. For
cross-entropy of logits, also with label smoothing, it is the Gauss-Newton matrix; for other losses it is refused.
"empirical-fisher": the same with the labels of the data, which does not approximate the curvature in general (Kunstner
et al., 2019, https://arxiv.org/abs/1905.12558).
"""

_DENSE = 32  # weights up to which the matrix is computed
_ROUGH = 1e-2
_TITLES = {
    "hessian": "Hessian",
    "ggn": "Gauss-Newton matrix",
    "fisher": "Fisher matrix",
    "empirical-fisher": "empirical Fisher matrix",
}

By = Literal["curvlinops", "differences"]
"""How products with the matrix are computed."""


class ConvergenceError(RuntimeError):
    """The Lanczos method did not converge."""


@dataclass(frozen=True)
class Curvature(Result):
    """The base of results on curvature.

    Attributes:
        matrix: the matrix, see `Matrix`.
        by: how products were computed, "curvlinops" or "differences".
        products: number of products with the matrix; each costs two to three forward and backward passes.
        mode: see `Result`.
        seed: see `Result`.
        examples: see `Result`.
    """

    matrix: str
    by: str
    products: int


@dataclass(frozen=True)
class Eigenvalues(Curvature):
    """The largest eigenvalues.

    Attributes:
        values: the eigenvalues, the largest first. The other attributes are those of `Curvature`.
    """

    values: tuple[float, ...]

    def plot(self, axes: Any = None) -> Any:
        """Draws the eigenvalues into matplotlib axes, which are returned."""
        from bisam.analysis.plots import points

        return points(self.values, "number", "eigenvalue", axes)


@dataclass(frozen=True)
class Trace(Curvature):
    """An estimate of the trace.

    Attributes:
        value: the estimate. The attributes that are not listed are those of `Curvature`.
        error: its standard error.
        draws: number of random vectors.
        values: the estimate of each random vector.
    """

    value: float
    error: float
    draws: int
    values: tuple[float, ...]

    def plot(self, axes: Any = None) -> Any:
        """Draws the estimates of the random vectors, and their mean, into matplotlib axes, which are returned."""
        from bisam.analysis.plots import around

        return around(self.values, self.value, "random vector", "estimate of the trace", "mean", axes)


@dataclass(frozen=True)
class SpectralDensity(Curvature):
    """An estimate of the density of eigenvalues.

    Attributes:
        grid: eigenvalues. The attributes that are not listed are those of `Curvature`.
        density: the density at them, whose integral is 1.
    """

    grid: tuple[float, ...]
    density: tuple[float, ...]

    def plot(self, axes: Any = None) -> Any:
        """Draws the density on a logarithmic scale into matplotlib axes, which are returned."""
        from bisam.analysis.plots import density

        return density(self.grid, self.density, axes)


def eigenvalues(
    source: Source,
    data: Iterable[Any],
    k: int = 1,
    *,
    matrix: Matrix = "hessian",
    by: By | None = None,
    tolerance: float = 1e-4,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Eigenvalues:
    """Returns the largest eigenvalues of the Hessian or another matrix, by the Lanczos method (ARPACK).

    The largest eigenvalue of the Hessian is the sharpness of the literature on the edge of stability (Cohen et al.,
    2021, https://arxiv.org/abs/2103.00065).

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches, read once and kept, for example a DataLoader without augmentation.
        k: number of eigenvalues, >= 1 and at most the number of weights.
        matrix: "hessian", "ggn", "fisher" or "empirical-fisher", see `Matrix`. Central differences give the Hessian
            only.
        by: "curvlinops" for exact products, "differences" for central differences. Default: exact ones if they can be
            computed.
        tolerance: relative accuracy, > 0.
        mode: see `sharpness`.
        seed: seeds the first vector, and random numbers of forward passes.
        progress: called as `progress(done, total)`, where the total grows with what is done.

    Raises:
        ImportError: the extra `analysis` is not installed.
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, the data is empty, a loss is not finite, or exact products are
            asked for and cannot be computed.
        ConvergenceError: the method did not converge.
    """
    whole("k", k)
    positive("tolerance", tolerance)
    with _operator(source, data, matrix, by, mode, seed, progress) as (operator, examples):
        n = operator.shape[0]
        if k > n:
            raise ValueError(f"k={k} eigenvalues are more than the {n} weights have")
        values = _all(operator) if n <= max(2 * k, _DENSE) else _by_arpack(operator.to_scipy(), k, tolerance, seed)
        found = sorted(values, reverse=True)[:k]
        return Eigenvalues(mode, seed, examples, matrix, operator.by, operator.products, tuple(found))


def trace(
    source: Source,
    data: Iterable[Any],
    *,
    draws: int = 50,
    matrix: Matrix = "hessian",
    by: By | None = None,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Trace:
    """Returns an estimate of the trace with its standard error (Hutchinson, 1989).

    Args:
        source: see `eigenvalues`.
        data: see `eigenvalues`.
        draws: number of random vectors of +-1, >= 2; each takes one product.
        matrix: see `eigenvalues`.
        by: see `eigenvalues`.
        mode: see `eigenvalues`.
        seed: seeds the random vectors, and random numbers of forward passes.
        progress: see `eigenvalues`.

    Raises:
        ImportError: see `eigenvalues`.
        TypeError: see `eigenvalues`.
        ValueError: see `eigenvalues`.
    """
    whole("draws", draws, least=2)
    with _operator(source, data, matrix, by, mode, seed, progress) as (operator, examples):
        random = torch.Generator().manual_seed(seed)
        products: list[Tensor] = []
        for _ in range(draws):
            v = torch.randint(2, (operator.shape[0],), generator=random).to(operator.device, operator.dtype) * 2 - 1
            products.append((v * (operator @ v)).sum())
        each = torch.stack(products).double()
        error = float(each.std() / draws**0.5)
        return Trace(
            mode,
            seed,
            examples,
            matrix,
            operator.by,
            operator.products,
            value=float(each.mean()),
            error=error,
            draws=draws,
            values=tuple(each.tolist()),
        )


def spectral_density(
    source: Source,
    data: Iterable[Any],
    *,
    vectors: int = 64,
    draws: int = 2,
    points: int = 512,
    matrix: Matrix = "hessian",
    by: By | None = None,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> SpectralDensity:
    """Returns the density of eigenvalues by Lanczos quadrature with Gaussian smoothing (Papyan, 2020).

    Source: https://arxiv.org/abs/2008.11865, as curvlinops computes it.

    Args:
        source: see `eigenvalues`.
        data: see `eigenvalues`.
        vectors: number of Lanczos vectors of each draw, >= 2; at most the number of weights are used.
        draws: number of random first vectors, >= 1.
        points: number of points of the grid, >= 2.
        matrix: see `eigenvalues`.
        by: see `eigenvalues`.
        mode: see `eigenvalues`.
        seed: seeds the first vectors, and random numbers of forward passes.
        progress: see `eigenvalues`.

    Raises:
        ImportError: see `eigenvalues`.
        TypeError: see `eigenvalues`.
        ValueError: see `eigenvalues`.
    """
    whole("vectors", vectors, least=2)
    whole("draws", draws)
    whole("points", points, least=2)
    with _operator(source, data, matrix, by, mode, seed, progress) as (operator, examples):
        from curvlinops.papyan2020traces.spectrum import LanczosApproximateSpectrumCached

        ends = _ends(operator, seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            lanczos = LanczosApproximateSpectrumCached(operator, min(vectors, operator.shape[0]), boundaries=ends)
            grid, density = lanczos.approximate_spectrum(num_repeats=draws, num_points=points)
        values, heights = (tuple(cast("list[float]", t.tolist())) for t in (grid, density))
        return SpectralDensity(mode, seed, examples, matrix, operator.by, operator.products, values, heights)


def _all(operator: Any) -> list[float]:
    dense = operator @ torch.eye(operator.shape[0], device=operator.device, dtype=operator.dtype)
    return torch.linalg.eigvalsh((dense + dense.T) / 2).tolist()


def _ends(operator: Any, seed: int) -> tuple[float, float]:
    """Returns the smallest and the largest eigenvalue, to a hundredth of the larger one in magnitude."""
    if operator.shape[0] <= _DENSE:
        values = _all(operator)
        return min(values), max(values)
    from scipy.sparse.linalg import LinearOperator

    products: Any = operator.to_scipy()
    far = _by_arpack(products, 1, _ROUGH, seed, "LM")[0]
    sign = 1.0 if far >= 0 else -1.0
    # The tolerance is relative to the eigenvalue: at an end near 0, as that of a singular Gauss-Newton matrix, nothing
    # converges. The distance from the other end is large.
    how: Any = {"matvec": lambda v: sign * (far * v - products @ v), "dtype": products.dtype}
    distances = LinearOperator(products.shape, **how)
    near = far - sign * _by_arpack(distances, 1, _ROUGH, seed)[0]
    return min(far, near), max(far, near)


def _by_arpack(products: Any, k: int, tolerance: float, seed: int, which: str = "LA") -> list[float]:
    from scipy.sparse.linalg import ArpackNoConvergence, eigsh

    first = torch.randn(products.shape[0], generator=torch.Generator().manual_seed(seed)).double().numpy()
    try:
        how: dict[str, Any] = {"k": k, "which": which, "v0": first, "tol": tolerance}
        found: Any = eigsh(products, return_eigenvectors=False, **how)
    except ArpackNoConvergence as error:
        raise ConvergenceError(
            f"the Lanczos method did not converge to {k} eigenvalues with tolerance {tolerance:g}: ask for fewer, or "
            "for a larger tolerance"
        ) from error
    return found.tolist()


@contextmanager
def _operator(
    source: Source,
    data: Iterable[Any],
    matrix: Matrix,
    by: By | None,
    mode: Mode | None,
    seed: int,
    progress: Progress | None,
) -> Generator[tuple[Any, float]]:
    """A context with the matrix as a linear operator of curvlinops, and the number of losses that count."""
    if matrix not in _TITLES:
        raise ValueError(f"matrix must be {', '.join(map(repr, _TITLES))}, got {matrix!r}")
    if by not in ("curvlinops", "differences", None):
        raise ValueError(f"by must be 'curvlinops', 'differences' or None, got {by!r}")
    try:
        from bisam.analysis.operators import Counted, Differences, exact
    except ImportError as error:
        raise ImportError('curvature needs curvlinops: pip install "bisam[analysis]"') from error
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        answers = sample.answers()
        examples = answers.count
        fault = "" if by == "differences" else _fault(sample)
        if not fault and by != "differences":
            operator, fault = exact(sample, matrix, answers)
            if operator is not None:
                yield Counted(operator, sample.oracle.weights, "curvlinops"), examples
                return
        if by == "curvlinops" and matrix == "hessian":
            raise ValueError(f"curvlinops cannot compute exact products here ({fault}): pass by='differences'")
        if matrix != "hessian":
            raise ValueError(
                f"central differences give the Hessian only, not the {_TITLES[matrix]}"
                + (f", and curvlinops cannot serve here ({fault})" if fault else "")
            )
        yield Counted(Differences(sample), sample.oracle.weights, "differences"), examples


def _fault(sample: Sample) -> str:
    """Returns why curvlinops cannot serve, or an empty text."""
    oracle = sample.model
    if oracle is None:
        return "the oracle is not that of a torch module"
    if not oracle.has_default_forward:
        return "the loss has a forward= of its own"
    if oracle.layout is not WHOLE or not oracle.is_local:
        return "the weights are shared by ranks"
    if type(oracle.model).__module__.startswith("torch.nn.parallel"):
        return "the model is in a wrapper"
    if any(len(batch) != 2 or not all(isinstance(part, Tensor) for part in batch) for batch in sample.batches):
        return "a batch is not a pair of tensors"
    return ""
