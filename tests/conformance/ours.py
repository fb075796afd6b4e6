"""`SharpnessAware` replaces the criterion in a plain PyTorch loop; a batch in parts is accumulated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from bisam import ASAM, SAM, SharpnessAware, __version__
from bisam.perturbations import L2, PerGroup

from .adapter import SPARSE, Adapter, Trainer


@dataclass
class Ours(Trainer):
    loss: SharpnessAware
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler

    @property
    def model(self):
        return self.loss.model

    def backward(self, *parts):
        self.optimizer.zero_grad()
        clean = 0.0
        for x, y in parts:
            self.scaler.scale(self.loss(x, y) / len(parts)).backward()
            clean += self.loss.clean.value / len(parts)
        return clean

    def closure(self, batch):
        return lambda: self.backward(batch)

    def step(self, *parts):
        clean = self.backward(*parts)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return clean

    def state_dict(self):
        return {"loss": self.loss.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state):
        self.loss.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])


class Bisam(Adapter):
    name, version = "bisam", __version__
    not_offered: ClassVar = {
        SPARSE: "raises a ValueError, as documented",
    }

    def make(self, model, loss, params, base, *, rho, adaptive=False, scaler=None, **options):
        scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
        optimizer = base(params, **options)
        method = ASAM(rho) if adaptive else SAM(L2(rho))
        if any("rho" in group for group in optimizer.param_groups):
            method = SAM(PerGroup.of(optimizer))
        return Ours(SharpnessAware(model, method, loss, scaler=scaler), optimizer, scaler)


adapter = Bisam()
