"""The loop of its docstring: a backward pass, then `step(closure)`; the closure clears gradients and runs a second one.

The library's helpers pause batch normalisation in the second pass; the closure processes a batch in parts one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import Any, ClassVar

import torch
from pytorch_optimizer import SAM, disable_running_stats, enable_running_stats
from torch import nn

from .adapter import GRAD_SCALER, LOSS, Adapter, Trainer


@dataclass
class SAMTrainer(Trainer):
    model: nn.Module
    criterion: Any
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None

    def closure(self, *parts):
        def closure():
            self.optimizer.zero_grad()
            total = 0.0
            for x, y in parts:
                loss = self.criterion(self.model(x), y) / len(parts)
                loss.backward()
                total += loss.detach()
            return total

        return closure

    def step(self, *parts):
        closure = self.closure(*parts)
        loss = closure()
        disable_running_stats(self.model)
        try:
            if self.scaler is None:
                self.optimizer.step(closure)
            else:
                self.scaler.step(self.optimizer, closure=closure)
        finally:
            enable_running_stats(self.model)
        return loss


class PytorchOptimizer(Adapter):
    name, version = "pytorch_optimizer", version("pytorch_optimizer")
    not_offered: ClassVar = {
        GRAD_SCALER: "`scaler.step(optimizer)` raises NoClosureError, and torch refuses a closure there",
        LOSS: "it is an optimizer",
    }
    remarks: ClassVar = {
        "torch_closure": "its docstring requires a backward pass before `step(closure)`; with it the step is correct",
        "instance_norm": "its helpers handle BatchNorm only",
        "spectral_norm": "its helpers handle BatchNorm only",
    }

    def make(self, model, loss, params, base, *, rho, adaptive=False, scaler=None, **options):
        return SAMTrainer(model, loss, SAM(params, base, rho=rho, adaptive=adaptive, **options), scaler)


adapter = PytorchOptimizer()
