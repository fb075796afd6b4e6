"""GAN: a residual generator and discriminator for images of 32x32 pixels, with spectral normalisation.

The kind of networks of Miyato et al. (2018, https://arxiv.org/abs/1802.05957), which RAPP's image experiment uses, at
any width. The first weights are drawn from torch's global generator (Glorot and Bengio, 2010).
"""

from __future__ import annotations

from math import sqrt

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


class Generator(nn.Module):
    """Maps noise (N, noise) to images (N, channels, 32, 32) with values in (-1, 1): three blocks from 4x4 pixels.

    Args:
        noise: entries of the noise of an image.
        width: channels of all blocks; 256 in the experiment of the paper.
        channels: of the images.
    """

    def __init__(self, noise: int, width: int, channels: int) -> None:
        super().__init__()
        self.width = width
        self.dense = nn.Linear(noise, width * 16)
        nn.init.xavier_uniform_(self.dense.weight)
        self.blocks = nn.Sequential(*[_Up(width) for _ in range(3)])
        self.last = nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), _conv(width, channels), nn.Tanh())

    def forward(self, noise: Tensor) -> Tensor:
        """Return images."""
        return self.last(self.blocks(self.dense(noise).view(-1, self.width, 4, 4)))


class Discriminator(nn.Module):
    """Maps images (N, channels, 32, 32) to scores (N,), high for real ones: two blocks that halve, and two that do not.

    Args:
        width: channels of all blocks; 128 in the experiment of the paper.
        channels: of the images.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            _Block(channels, width, halves=True, first=True),
            _Block(width, width, halves=True),
            _Block(width, width),
            _Block(width, width),
        )
        self.score = nn.Linear(width, 1)
        nn.init.xavier_uniform_(self.score.weight)
        spectral_norm(self.score)

    def forward(self, images: Tensor) -> Tensor:
        """Return scores."""
        return self.score(F.relu(self.blocks(images)).mean((2, 3)))[:, 0]


class _Up(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *(nn.BatchNorm2d(width), nn.ReLU(), nn.Upsample(scale_factor=2), _conv(width, width)),
            *(nn.BatchNorm2d(width), nn.ReLU(), _conv(width, width)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + F.interpolate(x, scale_factor=2)


class _Block(nn.Module):
    def __init__(self, inside: int, outside: int, halves: bool = False, first: bool = False) -> None:
        super().__init__()
        self.halves, self.first = halves, first
        self.one, self.two = spectral_norm(_conv(inside, outside)), spectral_norm(_conv(outside, outside))
        self.bypass = spectral_norm(_conv(inside, outside, size=1, gain=sqrt(2))) if halves else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        inner = self.two(F.relu(self.one(x if self.first else F.relu(x))))  # no ReLU of the image itself
        outer = self.bypass(x)
        return F.avg_pool2d(inner + outer, 2) if self.halves else inner + outer


def _conv(inside: int, outside: int, size: int = 3, gain: float = 1.0) -> nn.Conv2d:
    conv = nn.Conv2d(inside, outside, size, padding=size // 2)
    nn.init.xavier_uniform_(conv.weight, gain)
    return conv
