"""Slow twins: each method again in a few lines on one flat vector, written from the paper and not from the library."""

from __future__ import annotations

from collections.abc import Callable
from math import e as euler, log

import torch
from torch import Tensor, nn
from torch.func import functional_call

Grad = Callable[[Tensor], Tensor]  # gradient at a flat point


def sam(w: Tensor, ascent: Grad, descent: Grad, rho: float) -> Tensor:
    g = ascent(w)
    return descent(w + rho * g / g.norm())


def asam(w: Tensor, ascent: Grad, descent: Grad, rho: float, eta: float, scaled: Tensor) -> Tensor:
    t = torch.where(scaled, w.abs() + eta, torch.ones_like(w))
    g = ascent(w)
    return descent(w + rho * t**2 * g / (t * g).norm())


def q(phi: Callable[[Tensor], Tensor], mu: float, logits: Tensor, labels: Tensor) -> Tensor:
    """Xie et al., 2024, Lemma 3.1, with its sums written out."""
    rows = []
    for f, y in zip(logits, labels, strict=True):
        rows.append(sum(torch.exp(mu * phi(f[j] - f[y])) for j in range(len(f))).log() / mu)
    return torch.stack(rows)


def phi_log(x: Tensor) -> Tensor:
    return 1 - torch.log1p(torch.exp(log(euler - 1) - x))


def phi_tanh(alpha: float) -> Callable[[Tensor], Tensor]:
    return lambda x: torch.tanh(alpha * x)


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


def load(model: nn.Module, w: Tensor) -> None:
    with torch.no_grad():
        for p, part in zip(model.parameters(), w.split([p.numel() for p in model.parameters()]), strict=True):
            p.copy_(part.view_as(p))


def gradient(model: nn.Module, loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, y: Tensor) -> Grad:
    """The gradient of the mean loss as a function of one flat vector; buffers are constants of the batch."""
    names = [n for n, _ in model.named_parameters()]
    shapes = [p.shape for p in model.parameters()]
    buffers = {n: b.clone() for n, b in model.named_buffers()}

    def at(w: Tensor) -> Tensor:
        w = w.detach().requires_grad_()
        parts = w.split([s.numel() for s in shapes])
        weights = {n: p.view(s) for n, p, s in zip(names, parts, shapes, strict=True)}
        copies = {n: b.clone() for n, b in buffers.items()}
        return torch.autograd.grad(loss(functional_call(model, {**weights, **copies}, x), y).mean(), w)[0]

    return at
