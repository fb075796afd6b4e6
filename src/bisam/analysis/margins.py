"""Margins: how far the logit of the label is above the largest other one.

    >>> import torch
    >>> from bisam import ModelOracle, cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
    >>> data = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(2)]
    >>> found = margins(oracle, data)
    >>> found.quantiles[0] < found.median < found.quantiles[100]
    True
    >>> 0 <= found.ties <= found.error <= 1
    True

The distribution of normalised margins predicts the gap between training and test accuracy (Jiang et al., 2019,
https://arxiv.org/abs/1810.00113).
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bisam.analysis.features import Centred, captured
from bisam.analysis.logits import Rows, rows
from bisam.analysis.samples import Mode, Progress, Result, Sample, Source, sampled
from bisam.model.capture import Capture

Normalization = Literal["logits", "features"]
"""A divisor of margins: the spread of the logits, or that of the features of the last layer."""


@dataclass(frozen=True)
class Margins(Result):
    """The distribution of the margins f_y - max_{j != y} f_j.

    Attributes:
        mean: the mean.
        std: the standard deviation.
        error: the share of margins <= 0. It is the error in which ties are wrong; `argmax` has between `error - ties`
            and `error`.
        ties: the share of margins that are 0.
        quantiles: the percentiles 0, 1, ..., 100, with linear interpolation.
        normalized: what the margins were divided by; None: nothing.
        at: the last layer, where it was needed; None: it was not.
        mode: see `Result`.
        seed: see `Result`.
        examples: number of margins, one for each label that counts.
        forward: number of forward passes over all examples.
    """

    mean: float
    std: float
    error: float
    ties: float
    quantiles: tuple[float, ...]
    normalized: str | None
    at: str | None
    forward: float

    @property
    def median(self) -> float:
        """The median."""
        return self.quantiles[50]

    def plot(self, axes: Any = None) -> Any:
        """Draws the cumulative distribution into matplotlib axes, which are returned."""
        from bisam.analysis.plots import distribution

        label = "margin" if self.normalized is None else f"margin, normalised by {self.normalized}"
        return distribution(self.quantiles, label, axes)


def margins(
    source: Source,
    data: Iterable[Any],
    *,
    normalized: Normalization | None = None,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Margins:
    """Returns the distribution of the margins of all examples, in one forward pass. The model is not changed.

    Margins grow with the scale of the logits. `normalized` chooses a measure that does not:

    * "logits" divides the logits of each example by their standard deviation over the classes, as in
      `sharpness(normalized=True)` (Andriushchenko et al., 2023, https://arxiv.org/abs/2302.07011).
    * "features" is the distance to the decision boundary among the inputs of the last layer, which must be linear,
      (f_y - f_j) / ||w_y - w_j|| for the largest other class j (Elsayed et al., 2018,
      https://arxiv.org/abs/1803.05598), divided by the square root of the total variance of these inputs (Jiang et al.,
      2019). It does not depend on the scale of the features either.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches, read once and kept, for example a DataLoader without augmentation.
        normalized: what the margins are divided by.
        mode: see `sharpness`.
        seed: seeds the random numbers of forward passes.
        progress: see `sharpness`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, the data is empty, the outputs are no logits of several classes, a
            label is outside the classes, a loss or a margin is not finite, or with "features" the logits are not the
            outputs of a linear layer.
    """
    if normalized not in ("logits", "features", None):
        raise ValueError(f"normalized must be 'logits', 'features' or None, got {normalized!r}")
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        sample.passes.expected = 1
        parts: list[Tensor] = []
        with _last_layer(sample) if normalized == "features" else nullcontext() as last:
            for batch in rows(sample):
                margin, other = _against_the_largest(batch.logits, batch.labels)
                if last is not None:
                    margin = margin / last.slopes(batch, other)
                elif normalized == "logits":
                    margin = margin / batch.logits.std(1, correction=0).clamp_min(_TINY)  # both are 0 for equal logits
                parts.append(margin)
        values = torch.cat(parts).sort().values
        if last is not None:
            values = values / max(last.features.variance**0.5, _TINY)
        if not bool(values.isfinite().all()):
            raise ValueError("a margin is not finite: a logit is infinite, or two classes have the same weights")
        return Margins(
            mode=mode,
            seed=seed,
            examples=float(len(values)),
            mean=float(values.mean()),
            std=float(values.std(correction=0)),
            error=float((values <= 0).double().mean()),
            ties=float((values == 0).double().mean()),
            quantiles=_percentiles(values),
            normalized=normalized,
            at=None if last is None else last.name,
            forward=sample.passes.forward,
        )


def _against_the_largest(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the margins (n,), and the largest other classes (n,)."""
    own = logits.gather(1, labels[:, None])
    largest, other = logits.scatter(1, labels[:, None], -torch.inf).max(1)
    return own[:, 0] - largest, other


def _percentiles(values: Tensor) -> tuple[float, ...]:
    # Not torch.quantile, which refuses more than 2^24 values.
    at = torch.linspace(0, len(values) - 1, 101, dtype=torch.float64)
    below = at.floor().long()
    above = (below + 1).clamp_max(len(values) - 1)
    found = values[below] + (values[above] - values[below]) * (at - below)
    return tuple(found.tolist())


class _LastLayer:
    """The last layer, whose inputs are the features.

    Attributes:
        name: its name.
        features: its inputs so far.
    """

    def __init__(self, sample: Sample, capture: Capture) -> None:
        self._sample, self._capture = sample, capture
        self.name, self.features = "", Centred()

    def slopes(self, batch: Rows, other: Tensor) -> Tensor:
        """Returns ||w_y - w_j|| (n,), by which the margins grow with the features, and adds the features of the batch.

        Raises:
            ValueError: the logits are not the outputs of the layer.
        """
        call, gathered = self._capture.last(), self._sample.oracle.gathered
        output, self.name = call.output, call.name
        counts = batch.counts
        if output.shape[:-1] != counts.shape or not torch.equal(gathered(output[counts]).cpu().double(), batch.logits):
            raise ValueError(
                f"the logits are not the outputs of the last linear layer, {call.name!r}, which the distance to the "
                "decision boundary needs: pass normalized='logits' or None"
            )
        self.features.add(gathered(call.features[counts]).cpu())
        weight = cast(nn.Linear, call.module).weight.detach().cpu().double()
        return (weight[batch.labels] - weight[other]).norm(dim=1)


@contextmanager
def _last_layer(sample: Sample) -> Generator[_LastLayer]:
    if sample.model is not None and sample.model.layout.sharded:
        raise ValueError("normalized='features' needs the whole last layer, and the weights are sharded over ranks")
    with captured(sample, None) as capture:
        yield _LastLayer(sample, capture)


_TINY = torch.finfo(torch.float64).tiny
