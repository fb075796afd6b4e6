"""Metrics: scores of predictions on held-out data, and running sums of what is measured during training.

>>> scores(("accuracy", "top5"), ranked(logits, ("accuracy", "top5")), labels, classes=10)

Scores are in [0, 1], or in [-1, 1] for a correlation, and the larger the better. Labels (N, T) of tokens have as many
decisions as labels that count: accuracy is that of the tokens, one minus the token error. An answer is an exact match
if all of its tokens are the most likely ones, so that greedy generation, which goes on from its own tokens, gives it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning_fabric import Fabric
from sklearn.metrics import f1_score, matthews_corrcoef, recall_score
from torch import Tensor

from bisam import Evaluation
from bisam.experiments.data.long_tail import BALANCED, groups
from bisam.experiments.data.splits import IGNORED
from bisam.experiments.runs.folder import Row
from bisam.statistics import NAMES, StatsMean
from bisam.vector import widened


def ranked(logits: Tensor, metrics: Sequence[str]) -> Tensor:
    """Return the classes (N, R) of the largest logits (N, K), the most likely first, with R as the metrics need.

    Those of tokens are (N, 1, T), for logits (N, K, T).
    """
    if "top5" in metrics:
        return logits.topk(min(5, logits.shape[1]), 1).indices
    return logits.argmax(1, keepdim=True)


def log_likelihoods(logits: Tensor, labels: Tensor, metrics: Sequence[str]) -> Tensor | None:
    """Return the sum of the log-likelihoods of each example's labels (N,), in float64; None if no metric needs it.

    Args:
        logits: (N, K), or (N, K, T) of tokens.
        labels: (N,) or (N, T).
        metrics: names.
    """
    if "likelihood" not in metrics:
        return None
    losses = F.cross_entropy(logits.float(), labels, reduction="none", ignore_index=IGNORED)
    return -losses.double().reshape(len(labels), -1).sum(1)


def scores(
    metrics: Sequence[str], predicted: Tensor, labels: Tensor, classes: int, log_likelihood: Tensor | None = None
) -> list[float]:
    """Return the score of predictions for each metric.

    Args:
        metrics: names: accuracy, top5, f1 (of class 1), matthews, balanced (the mean of the accuracies of the classes
            that there are), the same of the classes with many, medium and few training examples (see
            `long_tail.groups`), exact_match, likelihood. The likelihood is the geometric mean over labels, exp(-loss)
            or one over the perplexity.
        predicted: the result of `ranked`, (N, R) or (N, 1, T).
        labels: classes (N,), or tokens (N, T), of which those that are `IGNORED` do not count.
        classes: number of classes.
        log_likelihood: the result of `log_likelihoods`, for the likelihood.
    """
    return [_score(metric, predicted.cpu(), labels.cpu(), classes, log_likelihood) for metric in metrics]


def _score(metric: str, ranks: Tensor, labels: Tensor, classes: int, log_likelihood: Tensor | None) -> float:
    predicted = ranks[:, 0]
    counted = labels != IGNORED
    match metric:
        case "likelihood":
            assert log_likelihood is not None
            return float((log_likelihood.sum().cpu() / counted.sum()).exp().nan_to_num())
        case "exact_match":
            right = (predicted == labels) | ~counted
            return right.reshape(len(labels), -1).all(1).sum().item() / len(labels)
        case "top5":
            return (ranks == labels[:, None]).any(1).sum().item() / len(labels)
        case "accuracy":
            return (predicted == labels).sum().item() / int(counted.sum())
        case "f1":
            return float(f1_score(labels.numpy(), predicted.numpy(), zero_division=0))  # pyright: ignore[reportArgumentType]
        case "matthews":
            with warnings.catch_warnings():  # warns if there is a single class, for which it is 0 by convention
                warnings.simplefilter("ignore", UserWarning)
                return float(matthews_corrcoef(labels.numpy(), predicted.numpy()))
        case "balanced" | "many" | "medium" | "few":
            members = {BALANCED: range(classes), **groups(classes)}[metric]
            there = sorted(set(labels.tolist()) & set(members))
            given: Any = {"labels": there, "average": "macro", "zero_division": 0}
            return float(recall_score(labels.numpy(), predicted.numpy(), **given))
        case _:
            raise AssertionError(metric)


def stats_row(mean: StatsMean, fabric: Fabric) -> Row:
    """Return the means of statistics over all steps of all processes, without those that no step knew."""
    zero = widened(torch.zeros((), device=fabric.device))
    steps = [zero + mean.steps.get(name, 0) for name in NAMES]
    rows = [[of.get(name, zero).to(zero) for name in NAMES] for of in (mean.sums, mean.finite)]
    sums, finite, known = cast(
        Tensor, fabric.all_reduce(torch.stack([*rows[0], *rows[1], *steps]), reduce_op="sum")
    ).view(3, len(NAMES))
    return {name: value for name, value, n in zip(NAMES, (sums / finite).tolist(), known.tolist(), strict=True) if n}


class TrainingSums:
    """Sums of loss, correct and flipped predictions over the batches of an epoch, kept on the device.

    A prediction is flipped if it is correct at the weights and wrong where the method took its descent gradient.
    """

    def __init__(self, device: torch.device) -> None:
        zeros = (torch.zeros((), device=device) for _ in range(5))
        self._loss, self._correct, self._flipped, self._examples, self._labels = zeros

    def add(self, clean: Evaluation, outputs: Tensor, labels: Tensor) -> None:
        """Add a batch.

        Args:
            clean: loss and logits at the weights, from the forward pass that the method needs anyway.
            outputs: logits where the method took its descent gradient.
            labels: classes (n,), class probabilities (n, K), of which the largest counts as the class, or tokens (n,
                T), of which those that are `IGNORED` do not count.
        """
        labels = labels.argmax(1) if labels.is_floating_point() else labels
        correct = clean.outputs.argmax(1) == labels
        count = len(labels) if labels.dim() == 1 else (labels != IGNORED).sum()
        self._loss += clean.value * count
        self._correct += correct.sum()
        self._examples += len(labels)
        self._labels += count
        if len(outputs) == len(labels):
            self._flipped += (correct & (outputs.argmax(1) != labels)).sum()
        else:
            self._flipped += float("nan")  # the method descended on a part of the batch

    def totals(self) -> tuple[float, float]:
        """Return the sum of the losses so far and the number of labels, in this process; waits for the device."""
        return float(self._loss), float(self._labels)

    def is_finite(self, fabric: Fabric) -> bool:
        """Return whether the loss of all batches so far is finite, over all processes; waits for the device."""
        return bool(cast(Tensor, fabric.all_reduce(self._loss.clone(), reduce_op="sum")).isfinite())

    def row(self, fabric: Fabric, gradients: int, forwards: int) -> Row:
        """Return the metrics over all processes.

        Args:
            fabric: the processes.
            gradients: examples in queries with gradient, in this process.
            forwards: examples in queries without gradient, in this process.
        """
        counts = (torch.tensor(float(count), device=fabric.device) for count in (gradients, forwards))
        sums = torch.stack([self._loss, self._correct, self._flipped, *counts, self._examples, self._labels])
        loss, correct, flipped, all_gradients, all_forwards, examples, labels = cast(
            Tensor, fabric.all_reduce(sums, reduce_op="sum")
        ).tolist()
        return {
            "train_loss": loss / labels,
            "train_accuracy": correct / labels,
            "flipped": flipped,
            "gradients": all_gradients / examples,
            "forwards": all_forwards / examples,
        }
