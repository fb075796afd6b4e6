"""Operators: the curvature of the loss as linear operators of curvlinops, which this module imports."""

from __future__ import annotations

import warnings
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from bisam import objectives
from bisam.analysis.samples import Passes, Sample
from bisam.batches import size
from bisam.model.oracle import ModelOracle
from bisam.objectives import Objective
from bisam.vector import Vector

with warnings.catch_warnings():
    # torch's own warnings: of a dependency that scripts functions, and of the first use of forward mode.
    warnings.simplefilter("ignore", FutureWarning)
    from curvlinops import GGNLinearOperator, HessianLinearOperator
    from curvlinops._torch_base import PyTorchLinearOperator

    torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))

_OPERATORS = {"hessian": HessianLinearOperator, "ggn": GGNLinearOperator}


class Counted(PyTorchLinearOperator):
    """A symmetric operator that counts its products.

    Args:
        operator: the operator.
        by: how it computes products.
        passes: is told of each product.
    """

    SELF_ADJOINT = True

    def __init__(self, operator: Any, by: str, passes: Passes) -> None:
        super().__init__(operator._in_shape, operator._out_shape)
        self.by, self.products = by, 0
        self._operator, self._passes = operator, passes

    def _matmat(self, X: list[Tensor]) -> list[Tensor]:
        self.products += X[0].shape[-1]
        return self._operator._matmat(X)

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


def exact(sample: Sample, matrix: Literal["hessian", "ggn"]) -> tuple[Any, str]:
    """Returns the operator with exact products, or None and the reason why it cannot be had."""
    oracle = cast(ModelOracle, sample.model)
    loss = oracle.loss
    for batch in sample.batches:
        if (n := size(batch)) is None or float(objectives.count(torch.empty(n), batch[1], loss)) != n:
            return None, "some labels are ignored, or the numbers of examples differ"
    model_parameters = {id(p) for p in oracle.model.parameters()}
    if any(id(p) not in model_parameters for p in oracle.parameters):
        return None, "the loss has parameters of its own"
    try:
        operator = _OPERATORS[matrix](
            oracle.model,
            _Mean(loss),
            oracle.parameters,
            sample.batches,
            check_deterministic=False,
        )
        v = torch.ones(operator.shape[1], device=operator.device, dtype=operator.dtype)
        with oracle.fork(sample.seed), oracle.random_state().kept():
            finite = bool((operator @ v).isfinite().all())
    except Exception as error:  # functorch refuses models and losses by errors of many types
        return None, f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return (operator, "") if finite else (None, "a product is not finite")
