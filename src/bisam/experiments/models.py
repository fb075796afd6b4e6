"""Models by name."""

from __future__ import annotations

from torch import nn

from bisam.experiments.names import unknown


def build(name: str, classes: int) -> nn.Module:
    """The network `name` for `classes` classes, freshly initialised from torch's generator.

    Raises:
        ValueError: the name is unknown.
    """
    if name != "convnet":
        raise unknown("model", name, ["convnet"])
    return nn.Sequential(
        *_block(1, 16),
        *_block(16, 32, stride=2),
        *_block(32, 32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, classes),
    )


def _block(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return conv, nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)
