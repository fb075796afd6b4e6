"""Two extreme models: the time of one is dominated by arithmetic, of the other by the number of tensors."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (He et al., 2016, option A)."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.stride, self.extra = stride, after - before

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.extra:
            half = self.extra // 2
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.extra - half))
        return F.relu(x + y)


class ResNet(nn.Module):
    """ResNet of depth 6n + 2 for 32x32 images (He et al., 2016, https://arxiv.org/abs/1512.03385)."""

    def __init__(self, depth: int = 56, classes: int = 10) -> None:
        super().__init__()
        n = (depth - 2) // 6
        widths = [16] + [16] * n + [32] * n + [64] * n
        self.conv = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.blocks = nn.Sequential(*[Block(before, after, after // before) for before, after in pairwise(widths)])
        self.head = nn.Linear(64, classes)
        for m in self.modules():
            if isinstance(m, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(m.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.blocks(F.relu(self.norm(self.conv(x))))
        return self.head(y.mean((2, 3)))


def resnet56(classes: int = 10) -> ResNet:
    """853,018 parameters for 10 classes."""
    return ResNet(56, classes)


def mlp(layers: int = 86, width: int = 16) -> nn.Sequential:
    """Linear layers with ReLU: 172 small tensors, dominated by call overhead.

    He initialisation (2015), because with torch's default the gradients of the first layers would be denormal.
    """
    linears = [nn.Linear(width, width) for _ in range(layers)]
    for m in linears:
        nn.init.kaiming_normal_(m.weight)
    return nn.Sequential(*[layer for m in linears for layer in (m, nn.ReLU())][:-1])


def batch_for(model: nn.Module, n: int) -> tuple[Tensor, Tensor]:
    """Random inputs and labels that fit the model."""
    if isinstance(model, ResNet):
        return torch.randn(n, 3, 32, 32), torch.randint(model.head.out_features, (n,))
    width = next(model.parameters()).shape[1]
    return torch.randn(n, width), torch.randint(width, (n,))
