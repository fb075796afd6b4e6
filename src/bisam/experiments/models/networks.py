"""Networks: the convolutional networks of the SAM literature for images of about 32x32 pixels.

Each takes images (N, channels, H, W) and returns logits (N, classes), in the dtype of its weights. Widths do not depend
on the image's size, so larger images work as well; where one is too small for the halvings, the error names the least.

All draw their first weights from torch's global generator and from nothing else: as He et al. (2015) do, normal with
variance 2 / fan-in (https://arxiv.org/abs/1502.01852), and biases are zero. Only `ConvNet` and `MLP` keep torch's own.

    >>> model = ResNet(56, classes=10)
    >>> sum(p.numel() for p in model.parameters())
    853018
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ConvNet(nn.Sequential):
    """Three convolutions with 16, 32 and 32 channels, for digits of 8x8 pixels; trains in seconds on a laptop."""

    def __init__(self, classes: int, channels: int = 3) -> None:
        super().__init__(
            *_block(channels, 16),
            *_block(16, 32, stride=2),
            *_block(32, 32),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, classes),
        )


class MLP(nn.Sequential):
    """Two hidden layers of 64 units with batch normalisation; the smallest of the networks, which can train in stacks.

    Images of other sizes than 8x8 are pooled to it.
    """

    def __init__(self, classes: int, channels: int = 3) -> None:
        side, width = 8, 64
        super().__init__(
            nn.AdaptiveAvgPool2d(side),
            nn.Flatten(),
            nn.Linear(channels * side**2, width),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, width),
            nn.BatchNorm1d(width),
            nn.ReLU(inplace=True),
            nn.Linear(width, classes),
        )


class ResNet(nn.Sequential):
    """Residual network for CIFAR with shortcuts without parameters, He et al. 2016 (https://arxiv.org/abs/1512.03385).

    One convolution and three stages of (depth - 2) / 6 blocks with 16, 32 and 64 channels, each stage but the first at
    half the resolution. ResNet-56 has 853,018 parameters for 10 classes.

    Args:
        depth: layers with weights, 6n + 2: the paper's are 20, 32, 44, 56 and 110; 8 has one block in each stage.
        classes: number of logits.
        channels: of the images.

    Raises:
        ValueError: the depth is not 6n + 2.
    """

    def __init__(self, depth: int, classes: int, channels: int = 3) -> None:
        blocks = _blocks(depth, plus=2)
        super().__init__(
            *_block(channels, 16),
            *_stages([16, 16, 32, 64], blocks, ResidualBlock),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64, classes),
        )
        _initialise(self)


class ResidualBlock(nn.Module):
    """Two convolutions around the identity, or around a shortcut without parameters where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            *_block(inputs, outputs, stride),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else PaddedShortcut(outputs - inputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride), rounded up."""
        return F.relu(self.residual(x) + self.shortcut(x), inplace=True)


class PaddedShortcut(nn.Module):
    """The shortcut "option A" of the paper: every `stride`-th pixel, and `extra` zero channels, half on each side."""

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra = extra
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C + extra, H / stride, W / stride), rounded up."""
        before = self.extra // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, before, self.extra - before))


class WideResNet(nn.Sequential):
    """Wide residual network, Zagoruyko and Komodakis 2016 (https://arxiv.org/abs/1605.07146).

    One convolution and three stages of (depth - 4) / 6 pre-activation blocks with 16, 32 and 64 times `width` channels.
    WRN-28-2 has 1,467,610 parameters for 10 classes and WRN-28-10 has 36,479,194.

    The networks of this name in the SAM literature, whose code descends from https://github.com/davda54/sam, have one
    block more in each stage, since theirs counts the blocks after the one that changes the shape: 1,855,578 and
    46,160,474 parameters. As the paper counts layers, they are `WideResNet(34, 2)` and `WideResNet(34, 10)`.

    Args:
        depth: layers with weights, 6n + 4, the shortcuts' included.
        width: factor of the channels.
        classes: number of logits.
        channels: of the images.
        dropout: probability between the two convolutions of a block.

    Raises:
        ValueError: the depth is not 6n + 4, or the probability is not in [0, 1].
    """

    def __init__(self, depth: int, width: int, classes: int, channels: int = 3, *, dropout: float = 0.0) -> None:
        blocks = _blocks(depth, plus=4)

        def block(inputs: int, outputs: int, stride: int) -> PreactivationBlock:
            return PreactivationBlock(inputs, outputs, stride, dropout=dropout)

        super().__init__(
            nn.Conv2d(channels, 16, 3, padding=1, bias=False),
            *_stages([16, 16 * width, 32 * width, 64 * width], blocks, block),
            nn.BatchNorm2d(64 * width),
            nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(64 * width, classes),
        )
        _initialise(self)


class PreactivationBlock(nn.Module):
    """Two convolutions, each after its own normalisation, around the identity, He et al. 2016 (https://arxiv.org/abs/1603.05027).

    Where the shape changes, the shortcut is a convolution of 1x1 of the activated input.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.activate = nn.Sequential(nn.BatchNorm2d(inputs), nn.ReLU(inplace=True))
        self.residual = nn.Sequential(
            *_block(inputs, outputs, stride),
            nn.Dropout(dropout),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        )
        same = inputs == outputs and stride == 1
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, outputs, H / stride, W / stride), rounded up."""
        activated = self.activate(x)
        return self.residual(activated) + (x if self.shortcut is None else self.shortcut(activated))


class DenseNet(nn.Sequential):
    """Densely connected network with bottlenecks and compression, Huang et al. 2017 (https://arxiv.org/abs/1608.06993).

    The defaults are DenseNet-121 with the stem of the CIFAR networks: a convolution of 3x3 to 64 channels, neither
    normalised nor pooled. It has 6,956,298 parameters for 10 classes.

    Args:
        classes: number of logits.
        channels: of the images, whose sides are of 8 pixels or more.
        growth: channels that a layer adds.
        blocks: layers of each dense block; between two of them, channels and resolution are halved.
    """

    def __init__(
        self, classes: int, channels: int = 3, *, growth: int = 32, blocks: tuple[int, ...] = (6, 12, 24, 16)
    ) -> None:
        width = 2 * growth
        layers: list[nn.Module] = [
            _AtLeast(2 ** (len(blocks) - 1)),
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
        ]
        for i, block in enumerate(blocks):
            if i:
                layers += [*_activated(width), nn.Conv2d(width, width // 2, 1, bias=False), nn.AvgPool2d(2)]
                width //= 2
            layers += [DenseLayer(width + j * growth, growth) for j in range(block)]
            width += block * growth
        layers += [*_activated(width), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
        super().__init__(*layers)
        _initialise(self)


class DenseLayer(nn.Module):
    """A bottleneck of 1x1 and a convolution of 3x3, whose `growth` channels are concatenated to the input."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.new = nn.Sequential(
            *_activated(inputs),
            nn.Conv2d(inputs, 4 * growth, 1, bias=False),
            *_activated(4 * growth),
            nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) to (N, inputs + growth, H, W)."""
        return torch.cat([x, self.new(x)], 1)


class VGG(nn.Sequential):
    """VGG-19 with batch normalisation, Simonyan and Zisserman 2015 (https://arxiv.org/abs/1409.1556).

    As usual for CIFAR, the classifier has two hidden layers of 512, not of 4096, with dropout before each. It has
    20,565,834 parameters for 10 classes. Images have sides of 32 pixels or more; what five halvings leave is averaged.

    Args:
        classes: number of logits.
        channels: of the images.
        dropout: probability before each hidden layer.
    """

    def __init__(self, classes: int, channels: int = 3, *, dropout: float = 0.5) -> None:
        layers: list[nn.Module] = [_AtLeast(32)]
        for width, depth in ((64, 2), (128, 2), (256, 4), (512, 4), (512, 4)):
            for _ in range(depth):
                layers += _block(channels, width, bias=True)
                channels = width
            layers.append(nn.MaxPool2d(2))
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        for _ in range(2):
            layers += [nn.Dropout(dropout), nn.Linear(512, 512), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.Linear(512, classes))
        _initialise(self)


class _AtLeast(nn.Module):
    """The identity for images of `side` pixels or more; raises an error with a remedy for smaller ones."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        if min(height, width) < self.side:
            raise ValueError(f"images of {height}x{width} are too small: this network needs {self.side}x{self.side}")
        return x


def _block(inputs: int, outputs: int, stride: int = 1, bias: bool = False) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)


def _activated(channels: int) -> tuple[nn.Module, ...]:
    return nn.BatchNorm2d(channels), nn.ReLU(inplace=True)


def _blocks(depth: int, plus: int) -> int:
    """Returns n for depth = 6n + plus."""
    n, rest = divmod(depth - plus, 6)
    if n < 1 or rest:
        raise ValueError(f"depth must be 6n + {plus}, as {6 + plus} or {24 + plus}, got {depth}")
    return n


def _stages(widths: list[int], blocks: int, block: Callable[[int, int, int], nn.Module]) -> Iterator[nn.Module]:
    for i, (inputs, outputs) in enumerate(pairwise(widths)):
        yield block(inputs, outputs, 2 if i else 1)
        for _ in range(blocks - 1):
            yield block(outputs, outputs, 1)


def _initialise(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)
