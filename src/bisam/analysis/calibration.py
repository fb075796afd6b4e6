"""Calibration: whether the confidence of a classifier is its accuracy.

    >>> import torch
    >>> from bisam import ModelOracle, cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
    >>> data = [(torch.randn(32, 4), torch.randint(3, (32,))) for _ in range(2)]
    >>> found = calibration(oracle, data, bins=10)
    >>> sum(found.counts), 0 <= found.ece <= found.mce <= 1
    (64, True)

The expected calibration error is that of Guo et al. (2017, https://arxiv.org/abs/1706.04599), computed by torchmetrics.
It needs the extra `bisam[analysis]`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import nan
from typing import Any

import torch

from bisam.analysis.logits import rows
from bisam.analysis.samples import Mode, Progress, Result, Source, sampled
from bisam.validation import whole

_ALMOST_ONE = 1 - 2.0**-24
"""The largest float32 below 1. torchmetrics puts a confidence of 1 into a bin of its own, above the last one."""


@dataclass(frozen=True)
class Calibration(Result):
    """The calibration of the most probable class, and proper scores of all probabilities.

    Attributes:
        ece: the expected calibration error, the mean over the examples of |accuracy - confidence| of their bin.
        mce: the maximum calibration error, the largest |accuracy - confidence| of a bin.
        brier: the Brier score, the mean of the sum over the classes of (p_k - 1{k = y})^2, in [0, 2] (Brier, 1950).
        nll: the mean negative log-likelihood of the labels, in nats; of the softmax of the outputs, whatever the
            training loss is.
        error: the error, in [0, 1].
        confidence: the mean probability of the predicted class. It is above 1 - `error` for overconfident models.
        counts: number of examples of each bin of equal width, [0, 1/bins), [1/bins, 2/bins), ..., [1 - 1/bins, 1].
        confidences: the mean confidence of each bin; nan for an empty one.
        accuracies: the accuracy of each bin; nan for an empty one.
        mode: see `Result`.
        seed: see `Result`.
        examples: number of labels that count.
        forward: number of forward passes over all examples.
    """

    ece: float
    mce: float
    brier: float
    nll: float
    error: float
    confidence: float
    counts: tuple[int, ...]
    confidences: tuple[float, ...]
    accuracies: tuple[float, ...]
    forward: float

    def plot(self, axes: Any = None) -> Any:
        """Draws the reliability diagram, with the shares of the bins above it, into matplotlib axes, which it returns.

        The inset with the shares is the last of `axes.child_axes`.
        """
        from bisam.analysis.plots import reliability

        return reliability(self.confidences, self.accuracies, self.counts, axes)


def calibration(
    source: Source,
    data: Iterable[Any],
    *,
    bins: int = 15,
    mode: Mode | None = "eval",
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Returns the calibration of a classifier, in one forward pass. The model is not changed.

    Args:
        source: a `SharpnessAware` loss, or an oracle such as `ModelOracle(model, loss)`.
        data: batches, read once and kept, for example a DataLoader without augmentation. Examples that were not trained
            on show the calibration; a fitted model is confident and right on the others.
        bins: number of bins of the confidence, >= 1.
        mode: see `sharpness`.
        seed: seeds the random numbers of forward passes.
        progress: see `sharpness`.

    Raises:
        ImportError: the extra `analysis` is not installed.
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range, the data is empty, the outputs are no logits of several classes, a
            label is outside the classes, or a loss is not finite.
    """
    whole("bins", bins, most=10_000)
    try:
        from torchmetrics.classification import MulticlassCalibrationError
    except ImportError as error:
        raise ImportError('calibration needs torchmetrics: pip install "bisam[analysis]"') from error
    with sampled(source, data, seed=seed, mode=mode, progress=progress) as sample:
        sample.passes.expected, n, totals = 1, 0, torch.zeros(4, dtype=torch.float64)
        in_bins, edges, metrics = torch.zeros(3, bins, dtype=torch.float64), torch.linspace(0, 1, bins + 1), {}
        for batch in rows(sample):
            logs, predicted = batch.logits.log_softmax(1), batch.logits.argmax(1)
            p = logs.exp()
            confidence, right = p.gather(1, predicted[:, None])[:, 0], (predicted == batch.labels).double()
            nll = -logs.gather(1, batch.labels[:, None])[:, 0]
            brier = p.scatter_add(1, batch.labels[:, None], -torch.ones_like(p)).square().sum(1)
            totals += torch.stack([brier, nll, right, confidence]).sum(1)
            n += len(right)
            clamped = p.clamp_max(_ALMOST_ONE)
            index = torch.bucketize(clamped.gather(1, predicted[:, None])[:, 0].float(), edges, right=True) - 1
            in_bins.index_add_(1, index, torch.stack([torch.ones_like(right), confidence, right]))
            if not metrics:  # no synchronisation: ranks that share a batch have the examples of all of them already
                settings: dict[str, Any] = {"num_classes": p.shape[1], "n_bins": bins, "sync_on_compute": False}
                metrics = {norm: MulticlassCalibrationError(norm=norm, **settings) for norm in ("l1", "max")}
            for metric in metrics.values():
                metric.update(clamped, batch.labels)
        brier, nll, right, confidence = (totals / n).tolist()
        counts = in_bins[0].long().tolist()
        return Calibration(
            mode=mode,
            seed=seed,
            examples=float(n),
            ece=float(metrics["l1"].compute()),
            mce=float(metrics["max"].compute()),
            brier=brier,
            nll=nll,
            error=1 - right,
            confidence=confidence,
            counts=tuple(counts),
            confidences=_means(in_bins[1].tolist(), counts),
            accuracies=_means(in_bins[2].tolist(), counts),
            forward=sample.passes.forward,
        )


def _means(sums: list[float], counts: list[int]) -> tuple[float, ...]:
    return tuple([total / count if count else nan for total, count in zip(sums, counts, strict=True)])
