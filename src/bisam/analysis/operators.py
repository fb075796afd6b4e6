"""Operators: the curvature of the loss as linear operators of curvlinops, which this module imports."""

from __future__ import annotations

import warnings
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from bisam import objectives
from bisam.analysis.curvature import Matrix
from bisam.analysis.samples import Answers, Sample
from bisam.batches import Batch, size
from bisam.evaluation import Evaluation
from bisam.model.oracle import ModelOracle
from bisam.objectives import Objective
from bisam.vector import Vector

with warnings.catch_warnings():
    # torch's own warnings: of a dependency that scripts functions, and of the first use of forward mode.
    warnings.simplefilter("ignore", FutureWarning)
    from curvlinops import EFLinearOperator, GGNLinearOperator, HessianLinearOperator
    from curvlinops._torch_base import PyTorchLinearOperator

    torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))

# The Hessian of cross-entropy with respect to the logits does not depend on the labels, so that the Gauss-Newton matrix
# is the Fisher matrix itself: nothing is sampled. curvlinops' own Fisher draws labels.
_OPERATORS: dict[str, Any] = {
    "hessian": HessianLinearOperator,
    "ggn": GGNLinearOperator,
    "fisher": GGNLinearOperator,
    "empirical-fisher": EFLinearOperator,
}


class Counted(PyTorchLinearOperator):
    """A symmetric operator that counts its products.

    Args:
        operator: the operator.
        weights: the weights, whose shapes it has.
        by: how it computes products.
    """

    SELF_ADJOINT = True

    def __init__(self, operator: Any, weights: Vector, by: str) -> None:
        shapes = [tuple(t.shape) for t in weights]
        super().__init__(shapes, shapes)
        self.by, self.products = by, 0
        self._operator = operator

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.products += X[0].shape[-1]
        return self._operator @ X

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._operator.device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self._operator.dtype


class Differences(PyTorchLinearOperator):
    """The Hessian of the mean loss, by central differences of gradients.

    Args:
        sample: the loss and its data.
    """

    SELF_ADJOINT = True

    def __init__(self, sample: Sample) -> None:
        weights = sample.oracle.weights
        shapes = [tuple(t.shape) for t in weights]
        super().__init__(shapes, shapes)
        self._sample, self._weights = sample, weights
        wide = torch.promote_types(self.dtype, torch.float32)
        self._step = torch.finfo(wide).eps ** (1 / 3) * max(1.0, float(weights.norm()))

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        columns = [self._product(self._weights.like([x[..., i] for x in X])) for i in range(X[0].shape[-1])]
        return [torch.stack(list(parts), -1) for parts in zip(*columns, strict=True)]

    def _product(self, v: Vector) -> Vector:
        length = float(v.norm())
        if length == 0:
            return v
        h = self._step / length
        ahead, behind = (self._sample.gradient(v * sign, None)[0] for sign in (h, -h))
        return (ahead - behind) * (0.5 / h)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self._weights.tensors[0].device

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights."""
        return self._weights.tensors[0].dtype


class _Mean(nn.Module):
    """The mean of the losses that count, as curvlinops takes a loss."""

    reduction = "mean"

    def __init__(self, loss: Objective) -> None:
        super().__init__()
        self._loss = (loss,)  # in a tuple: parameters of a loss are not those of the model

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Returns the mean loss."""
        (loss,) = self._loss
        losses = loss(outputs, targets)
        return losses.mean() if losses.dim() else losses


class _MeanOfEach(nn.CrossEntropyLoss):
    """The mean of the losses, for the empirical Fisher matrix: each loss is that of one row of the outputs.

    curvlinops takes the classes that it knows only. Of cross-entropy it uses how outputs (N, K, ...) are flattened, and
    that the mean is over N; so any loss of one row of logits can be in its place.
    """

    def __init__(self, loss: Objective) -> None:
        super().__init__()
        self._loss = (loss,)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Returns the mean loss."""
        (loss,) = self._loss
        losses = loss(input, target)
        if losses.shape == target.shape:
            return losses.mean()
        if _is_plain_mean(loss):
            return losses
        raise TypeError("the loss is not one number for each label: pass one with reduction='none'")


def _is_plain_mean(loss: Objective) -> bool:
    return isinstance(loss, nn.CrossEntropyLoss) and loss.weight is None and loss.reduction == "mean"


def _is_likelihood(loss: Objective) -> bool:
    """Whether the loss is the cross-entropy of the distribution that the logits are."""
    if isinstance(loss, nn.CrossEntropyLoss | nn.BCEWithLogitsLoss):
        return loss.weight is None and getattr(loss, "pos_weight", None) is None and loss.reduction != "sum"
    return isinstance(loss, objectives.CrossEntropy) or loss is functional.cross_entropy


def _losses_of_each(batch: Batch, answer: Evaluation) -> float | None:
    """Returns the number of losses of each example of a batch; None if it is not known or if some do not count."""
    n, counted = size(batch), float(answer.count)
    if answer.losses.dim():
        losses = answer.losses.numel()
    else:
        known = objectives.count_of_mean(answer.targets, cast(Objective, answer.objective))
        losses = counted if known is None else answer.targets.numel()
    return counted / n if n and counted == losses else None


def exact(sample: Sample, matrix: Matrix, answers: Answers) -> tuple[Any, str]:
    """Returns the operator with exact products, or None and the reason why it cannot be had.

    Args:
        sample: the loss and its data.
        matrix: the matrix.
        answers: those at the weights, whose counts are the weights of the batches in the mean.
    """
    oracle = cast(ModelOracle, sample.model)
    loss = oracle.loss
    if matrix == "fisher" and not _is_likelihood(loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        return None, f"{name} is not the cross-entropy of logits without weights: matrix='ggn' can serve"
    shares = {_losses_of_each(batch, answer) for batch, answer in zip(sample.batches, answers.parts, strict=True)}
    if len(shares) > 1 or None in shares:  # curvlinops weights a batch with its number of examples
        return None, "some labels are ignored, or the numbers of examples or of labels of each example differ"
    model_parameters = {id(p) for p in oracle.model.parameters()}
    if any(id(p) not in model_parameters for p in oracle.parameters):
        return None, "the loss has parameters of its own"
    try:
        operator = _OPERATORS[matrix](
            oracle.model,
            _MeanOfEach(loss) if matrix == "empirical-fisher" else _Mean(loss),
            oracle.parameters,
            sample.batches,
            check_deterministic=False,
        )
        v = torch.ones(operator.shape[1], device=operator.device, dtype=operator.dtype)
        with oracle.fork(sample.seed), oracle.random_state().kept():
            finite = bool(cast(Tensor, operator @ v).isfinite().all())
    except Exception as error:  # functorch refuses models and losses by errors of many types
        return None, f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return (operator, "") if finite else (None, "a product is not finite")
