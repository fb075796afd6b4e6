"""Its docstring's loop: a backward pass, then `step(closure)`, whose closure clears the gradients and makes the second.

Batch normalisation is paused in the second pass by the library's own helpers; a batch in parts is run part by part in
the closure.
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
class Theirs(Trainer):
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
        "torch_closure": "its docstring asks for a backward pass before `step(closure)`, with which the step is right",
        "instance_norm": "its helpers are for BatchNorm",
        "spectral_norm": "its helpers are for BatchNorm",
    }

    def make(self, model, loss, params, base, *, rho, adaptive=False, scaler=None, **options):
        return Theirs(model, loss, SAM(params, base, rho=rho, adaptive=adaptive, **options), scaler)


adapter = PytorchOptimizer()
