"""Models by name."""

from __future__ import annotations

from difflib import get_close_matches

from torch import nn


def build(name: str, classes: int) -> nn.Module:
    """The network `name` for `classes` classes, freshly initialised from torch's generator.

    Raises:
        ValueError: the name is unknown.
    """
    if name != "convnet":
        near = get_close_matches(name, ["convnet"], 1)
        hint = f", did you mean {near[0]!r}?" if near else ": it comes with the data set it is for."
        raise ValueError(f"unknown model {name!r}{hint} There is: convnet")
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
