"""A step on the meta device: shapes, operators and memory of a model that does not fit, without its values."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bisam import (
    ASAM,
    FSAM,
    SAM,
    AsyncSAM,
    BiSAM,
    FilterNoise,
    LookSAM,
    MomentumSAM,
    SharpnessAware,
    ZerothOrder,
    cross_entropy,
)
from bisam.masks import RandomMask

METHODS = {
    "SAM": SAM(),
    "ASAM": ASAM(0.5),
    "BiSAM": BiSAM(0.05),
    "RandomMask": SAM(RandomMask(0.05, beta=0.5)),
    "LookSAM": LookSAM(),
    "FSAM": FSAM(),
    "MomentumSAM": MomentumSAM(),
    "AsyncSAM": AsyncSAM(),
    "ZerothOrder": ZerothOrder(draws=2),
    "ZerothOrder, redrawn": ZerothOrder(draws=2, restore="redraw"),
    "FilterNoise": FilterNoise(),
    "FilterNoise, redrawn": FilterNoise(restore="redraw"),
}


@pytest.mark.parametrize("name", METHODS)
def test_steps(name):
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(40_000, 30_000), nn.BatchNorm1d(30_000), nn.ReLU(), nn.Linear(30_000, 5))
        x, y = torch.randn(8, 40_000), torch.randint(5, (8,))
    sharp = SharpnessAware(model, METHODS[name], cross_entropy)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(3):
        loss = sharp(x, y)
        loss.backward()
        assert loss.is_meta
        assert loss.shape == ()
        assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
