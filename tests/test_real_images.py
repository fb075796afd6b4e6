"""On CIFAR-10, where it is at hand: training goes on from real pixels, and the bounds hold on the logits."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torchvision.datasets import CIFAR10

from benchmarks.models import resnet56
from bisam import BiSAM, NegLog, SharpnessAware, Tanh, cross_entropy


@pytest.mark.slow
def test_resnet56_learns_a_batch_of_cifar_and_the_bounds_hold(data):
    cifar = CIFAR10(root=data, download=False)
    x = torch.from_numpy(cifar.data[:96]).permute(0, 3, 1, 2).float() / 127.5 - 1
    y = torch.tensor(cifar.targets[:96])
    model = resnet56()
    sharp = SharpnessAware(model, BiSAM(), nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    clean = []
    for _ in range(4):
        for part in torch.randperm(96).split(32):
            sharp(x[part], y[part]).backward()
            optimizer.step()
            optimizer.zero_grad()
            clean.append(cross_entropy(sharp.clean.outputs, y[part]).mean().item())
    assert sum(clean[-3:]) < 0.9 * sum(clean[:3])

    with torch.no_grad():
        logits = model.train()(x)
    wrong = (logits.argmax(1) != y).float()
    for bound in (NegLog(), NegLog(10.0), Tanh()):
        assert (bound(logits, y) - math.log(10) / bound.mu <= wrong + 1e-5).all()
