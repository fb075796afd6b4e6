"""Reference: SAM as in the formula, slow. The second pass runs on a copy, so that there is nothing to restore.

It passes every case that does not need a loss, which shows that the cases favour no design.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .adapter import LOSS, Adapter, Batch, Trainer


@dataclass
class Reference(Trainer):
    model: nn.Module
    criterion: Callable[[Tensor, Tensor], Tensor]
    optimizer: torch.optim.Optimizer
    rho: float
    adaptive: bool
    scaler: torch.amp.GradScaler

    def displacements(self, weights: list[Tensor], g: list[Tensor]) -> list[Tensor]:
        """rho g / |g|, and in ASAM rho w^2 g / |w g|."""
        rho = {p: group.get("rho", self.rho) for group in self.optimizer.param_groups for p in group["params"]}
        scales = [w.detach().abs() if self.adaptive else torch.ones_like(w) for w in weights]
        norm = torch.cat([(s * t).reshape(-1) for s, t in zip(scales, g, strict=True)]).norm()
        return [rho[w] * s**2 * t / norm.clamp(min=1e-30) for w, s, t in zip(weights, scales, g, strict=True)]

    def sam(self, x: Tensor, y: Tensor) -> tuple[Tensor, dict[Tensor, Tensor | None]]:
        """The loss at the weights, and the gradient of each weight at the displaced weights."""
        model = getattr(self.model, "module", self.model)
        weights = trainable(model)
        loss = self.criterion(model(x), y)
        g = torch.autograd.grad(loss, weights, allow_unused=True, materialize_grads=True)
        displaced = copy.deepcopy(model)
        there = trainable(displaced)
        with torch.no_grad():
            for p, e in zip(there, self.displacements(weights, [t.to_dense() for t in g]), strict=True):
                p.add_(e)
        h = torch.autograd.grad(self.criterion(displaced(x), y), there, allow_unused=True)
        return loss.detach(), dict(zip(weights, h, strict=True))

    def backward(self, *parts: Batch) -> Tensor:
        """Fill `.grad` with the mean over parts and processes; return the mean loss at the weights."""
        self.optimizer.zero_grad()
        total = torch.zeros(())
        for x, y in parts:
            loss, gradients = self.sam(x, y)
            total = total + loss / len(parts)
            for p, h in gradients.items():
                if h is not None:
                    share = self.scaler.scale(h / len(parts))
                    p.grad = share if p.grad is None else p.grad + share
        self.average([p.grad for p in self.model.parameters() if p.grad is not None])
        return total

    def average(self, gradients: list[Tensor]) -> None:
        """Average over the processes, in place."""
        if dist.is_initialized():
            for g in gradients:
                dist.all_reduce(g.div_(dist.get_world_size()))

    def closure(self, batch: Batch) -> Callable[[], Tensor]:
        return lambda: self.backward(batch)

    def step(self, *parts: Batch) -> Tensor:
        loss = self.backward(*parts)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss


def trainable(model: nn.Module) -> list[Tensor]:
    return [p for p in model.parameters() if p.requires_grad]


@dataclass(frozen=True)
class Looped(Adapter):
    """Adapter of a subclass of `Reference`."""

    trainer: type[Reference] = Reference
    version: str = "-"

    @property
    def name(self) -> str:
        return self.trainer.__name__.lower()

    @property
    def not_offered(self) -> dict[str, str]:
        return {} if hasattr(self.trainer, "loss") else {LOSS: "an optimizer's loop"}

    def make(self, model, loss, params, base, *, rho, adaptive=False, scaler=None, **options: Any) -> Reference:
        scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        return self.trainer(model, loss, base(params, **options), rho, adaptive, scaler)


adapter = Looped()
