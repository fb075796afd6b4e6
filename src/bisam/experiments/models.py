"""Models by name: ours for small images, and those of torchvision, timm and Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import nn

from bisam.experiments.names import unknown
from bisam.experiments.networks import VGG, ConvNet, DenseNet, ResNet, WideResNet

_OURS: dict[str, tuple[Callable[[int, int], nn.Module], str]] = {
    "convnet": (ConvNet, "three convolutions, for digits of 8x8"),
    "resnet20": (partial(ResNet, 20), "CIFAR ResNet, He et al. 2016, 0.27M parameters"),
    "resnet32": (partial(ResNet, 32), "CIFAR ResNet, He et al. 2016, 0.46M parameters"),
    "resnet44": (partial(ResNet, 44), "CIFAR ResNet, He et al. 2016, 0.66M parameters"),
    "resnet56": (partial(ResNet, 56), "CIFAR ResNet, He et al. 2016, 0.85M parameters"),
    "wrn28_2": (partial(WideResNet, 34, 2), "the SAM literature's WRN-28-2, which has 34 layers, 1.9M parameters"),
    "wrn28_10": (partial(WideResNet, 34, 10), "the SAM literature's WRN-28-10, which has 34 layers, 46M parameters"),
    "wrn28_2_published": (partial(WideResNet, 28, 2), "WRN-28-2, Zagoruyko and Komodakis 2016, 1.5M parameters"),
    "wrn28_10_published": (partial(WideResNet, 28, 10), "WRN-28-10, Zagoruyko and Komodakis 2016, 36M parameters"),
    "densenet121": (DenseNet, "DenseNet-121 for images of 32x32, Huang et al. 2017, 7.0M parameters"),
    "vgg19_bn": (
        VGG,
        "VGG-19 with batch normalisation for images of 32x32, Simonyan and Zisserman 2015, 21M parameters",
    ),
}


def build(name: str, classes: int, *, channels: int = 3, weights: str | None = None) -> nn.Module:
    """Placeholder."""
    if name not in _OURS:
        raise unknown("model", name, _OURS)
    return _OURS[name][0](classes, channels)
