"""Gradients: the norm of the gradient, and how much the gradients of batches differ.

>>> import torch
>>> from bisam import ModelOracle, cross_entropy
>>> _ = torch.manual_seed(0)
>>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
>>> data = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(4)]
>>> found = gradient_norm(oracle, data)
>>> found.norm < found.mean == sum(found.norms) / 4
True
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite, sqrt
from statistics import fmean
from typing import Any

from bisam.analysis.samples import Mode, Progress, Result, Source, sampled


@dataclass(frozen=True)
class GradientNorm(Result):
    """The norm of the gradient of the mean training loss, and those of the batches.

    Attributes:
        norm: the norm of the gradient of the mean loss over all examples.
        mean: the mean of the norms of the batches' gradients, weighted by the numbers of losses that count.
        std: their standard deviation with the same weights; 0 for one batch.
        norms: the norm of the gradient of each batch with losses that count.
        noise: an estimate of the trace of the covariance of the gradients of single examples, from the differences of
            the batches; None for one batch and in train mode.
        noise_scale: the simple noise scale, `noise` divided by an estimate of the squared norm of the true gradient:
            the batch size in examples beyond which larger batches save few steps (McCandlish et al., 2018,
            https://arxiv.org/abs/1812.06162); None where it cannot be estimated, see `gradient_norm`.
        mode: see `Result`.
        seed: see `Result`.
        examples: number of losses that count.
        forward: number of forward passes over all examples.
        backward: number of backward passes over all examples.
    """

    norm: float
    mean: float
    std: float
    norms: tuple[float, ...]
    noise: float | None
    noise_scale: float | None
    forward: float
    backward: float

    def plot(self, axes: Any = None) -> Any:
        """Draws the norms of the batches, and that of all examples, into matplotlib axes, which are returned."""
        from bisam.analysis.plots import around

        return around(self.norms, self.norm, "batch", "norm of the gradient", axes=axes)


def gradient_norm(
    source: Source,
    data: Iterable[Any],
    *,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> GradientNorm:
    """Returns the norm of the gradient of the training loss, in one forward and one backward pass.

    The noise scale takes the batches as random and disjoint samples: shuffle the examples. With K batches of n_b of the
    N examples, sum n_b |G_b - G|^2 / (K - 1) has the trace of the covariance as its mean, and |G|^2 exceeds the squared
    norm of the true gradient by 1/N of the trace on average, which is subtracted. The noise scale is given where it is
    at most N. Where it is larger, more than half of |G|^2 is noise, as near a minimum: pass more examples. It is not
    given in train mode, in which the gradient of a batch need not be the mean of those of its examples (BatchNorm).

    The model is not changed.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches, read once and kept, for example a DataLoader without augmentation.
        mode: see `sharpness`.
        seed: seeds the random numbers of forward passes.
        progress: see `sharpness`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, the data is empty, no loss counts, or a loss or a gradient is not
            finite.
    """
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        sample.passes.expected = 1
        total, ranks = None, sample.ranks
        counts: list[float] = []
        norms: list[float] = []
        for i, answer in enumerate(sample.each(grad=True)):
            if not (count := float(answer.count) * ranks):
                continue
            gradient = answer.gradient * count
            total = gradient if total is None else total + gradient
            norms.append(float(answer.gradient.norm()))
            counts.append(count)
            if not isfinite(norms[-1]):
                raise ValueError(f"the norm of the gradient of batch {i} is {norms[-1]}: the model has diverged")
        if total is None:
            raise ValueError("no loss counts: the targets of all examples are those that the loss ignores")
        n = sum(counts)
        norm = float(total.norm()) / n
        noise = None if mode == "train" else _noise(norms, counts, norm)
        return GradientNorm(
            mode=mode,
            seed=seed,
            examples=n,
            norm=norm,
            mean=fmean(norms, counts),
            std=_std(norms, counts),
            norms=tuple(norms),
            noise=noise,
            noise_scale=None if noise is None else _scale(noise, norm, n),
            forward=sample.passes.forward,
            backward=sample.passes.backward,
        )


def _std(norms: list[float], counts: list[float]) -> float:
    """Returns the weighted standard deviation, which is that of a sample if all counts are equal."""
    centre, k = fmean(norms, counts), len(norms)
    return sqrt(fmean([(each - centre) ** 2 for each in norms], counts) * k / (k - 1)) if k > 1 else 0.0


def _noise(norms: list[float], counts: list[float], norm: float) -> float | None:
    """Returns the estimate of the trace of the covariance; None for one batch."""
    if len(norms) < 2:
        return None
    between = sum(count * each**2 for each, count in zip(norms, counts, strict=True)) - sum(counts) * norm**2
    return max(between, 0.0) / (len(norms) - 1)


def _scale(noise: float, norm: float, n: float) -> float | None:
    """Returns the noise scale if it is at most `n`, the number of examples that it was estimated from."""
    signal = norm**2 - noise / n
    return noise / signal if signal > 0 and noise <= n * signal else None
