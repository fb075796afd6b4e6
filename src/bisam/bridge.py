"""Bridge: a scalar with a given gradient, as autograd takes it; the chain rule does the rest."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bisam.vector import Tensors


class WithGradient(torch.autograd.Function):
    """`apply(value, overflow, gradient, wraps, *parameters)`: `value`, with `gradient` for the parameters.

    `overflow` is added to the factor that `backward` gets: 0, or NaN. `wraps` make of the parts of a gradient that are
    here what the parameters are; None where these are ordinary tensors.
    """

    @staticmethod
    def forward(
        ctx: Any,
        value: Tensor,
        overflow: Tensor | None,
        gradient: Tensors,
        wraps: Sequence[Callable[[Tensor], Tensor]] | None,
        *_: Tensor,
    ) -> Tensor:
        """The value, and what is kept for `backward`."""
        ctx.overflow, ctx.wraps = overflow, wraps
        ctx.save_for_backward(*gradient)  # freed by backward(): a loss that is kept for logging holds no memory
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *factors: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient, times the factor that autograd has come to."""
        factor = factors[0] if ctx.overflow is None else factors[0] + ctx.overflow
        if ctx.wraps is None:
            return None, None, None, None, *torch._foreach_mul(ctx.saved_tensors, factor)
        # Here and not before: parts can be multiplied together, DTensors of several meshes cannot.
        parts = torch._foreach_mul(ctx.saved_tensors, factor.to(ctx.saved_tensors[0].device))
        return None, None, None, None, *[wrap(part) for wrap, part in zip(ctx.wraps, parts, strict=True)]
