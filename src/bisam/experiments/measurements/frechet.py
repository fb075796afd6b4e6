"""Frechet: the distance between two sets of images, as that of two normal distributions of their features.

Networks of features by name:

    convnet                  this package's ConvNet, trained on the digits with a fixed seed, which takes some seconds
    squeezenet:PATH          torchvision's SqueezeNet 1.1 with weights from a file, standardised as torchvision's
    squeezenet-caffe:PATH    the same for weights that expect values from 0 to 255 less (123, 117, 104)
    inception:PATH           torch-fidelity's Inception with weights from a file: this distance alone is the FID
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bisam.experiments.data.digits import digits
from bisam.experiments.errors import unknown
from bisam.experiments.models.networks import ConvNet

NAMES = ("convnet", "squeezenet:PATH", "squeezenet-caffe:PATH", "inception:PATH")
"""Networks of features."""


@dataclass(frozen=True)
class Features:
    """A network of features.

    Attributes:
        name: for a report, with the name of the distance.
        of: from images (N, channels, 32, 32) with values in [-1, 1] to features (N, d).
    """

    name: str
    of: Callable[[Tensor], Tensor]

    @torch.no_grad()
    def moments(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return mean (d,) and covariance (d, d) of the features of at least two images, in float64."""
        found = torch.cat([self.of(part) for part in images.split(256)]).double()
        return found.mean(0), torch.cov(found.T)


def distance(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    """Return the squared Frechet distance of two normal distributions (Dowson and Landau, 1982), given their moments.

    ||m - n||^2 + tr(A + B - 2 (A B)^(1/2)), with the eigenvalues of A^(1/2) B A^(1/2), which is symmetric.
    """
    (m, a), (n, b) = first, second
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt().sum()
    return max(0.0, ((m - n).square().sum() + a.trace() + b.trace() - 2 * cross).item())


def features(name: str, device: torch.device) -> Features:
    """Return a network of features.

    Args:
        name: one of `NAMES`.
        device: where the images are.

    Raises:
        ValueError: the name is unknown, its package is missing, or its weights cannot be loaded.
    """
    kind, colon, path = name.partition(":")
    if kind == "convnet" and not colon:
        network, accuracy = _convnet()
        network = network.to(device)
        return Features(f"ConvNet of this package on digits, test accuracy {accuracy:.3f}", network)
    if kind in _CHANNELS and path:
        return Features(f"SqueezeNet 1.1 ({kind})", _squeezenet(path, *_CHANNELS[kind]).to(device))
    if kind == "inception" and path:
        return Features("FID (Inception of torch-fidelity)", _inception(path, device))
    raise unknown("network of features", name, NAMES)


_CHANNELS = {  # mean and standard deviation of the channels, as shares of 255
    "squeezenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "squeezenet-caffe": (tuple(v / 255 for v in (123, 117, 104)), (1 / 255,) * 3),
}


class _Standardised(nn.Module):
    """A network that averages its last layer over positions, of enlarged images."""

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        x = F.interpolate(images.expand(-1, 3, -1, -1) / 2 + 0.5, scale_factor=3, mode="bilinear")
        return self.network((x - self.mean) / self.std).mean((2, 3))


def _squeezenet(path: str, mean: tuple[float, ...], std: tuple[float, ...]) -> nn.Module:
    from torchvision.models import squeezenet1_1

    network = squeezenet1_1()
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict({k: v.float() for k, v in weights.items()})
    except (OSError, RuntimeError, AttributeError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"weights of SqueezeNet 1.1 cannot be loaded from {path} ({reason})") from error
    return _Standardised(network.features, mean, std).eval().requires_grad_(False)


def _inception(path: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    try:
        module: Any = import_module("torch_fidelity.feature_extractor_inceptionv3")
    except ImportError as error:
        raise ValueError("features=inception:PATH needs torch-fidelity: pip install torch-fidelity") from error
    try:
        network = module.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], path).to(device).eval()
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(f"weights of Inception cannot be loaded from {path} ({error})") from error

    def of(images: Tensor) -> Tensor:
        whole = ((images.expand(-1, 3, -1, -1).clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return network(whole)[0]

    return of


@cache
def _convnet() -> tuple[nn.Module, float]:
    """Return a ConvNet without its head, and its test accuracy with it; the same in every process."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        data = digits(seed=0)
        network, order = ConvNet(10, channels=1), torch.Generator().manual_seed(0)
        optimizer = torch.optim.Adam(network.parameters())
        steps = _EPOCHS * -(-len(data.train) // _BATCH)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=steps)
        for _ in range(_EPOCHS):
            for x, y in data.train.batches(_BATCH, order):
                optimizer.zero_grad()
                F.cross_entropy(network(enlarged(x)), y).backward()
                optimizer.step()
                schedule.step()
    network.eval().requires_grad_(False)
    ((x, y),) = data.test.batches(len(data.test))
    accuracy = (network(enlarged(x)).argmax(1) == y).double().mean().item()
    return nn.Sequential(_Restandardised(data), *list(network)[:-1]), accuracy


_EPOCHS, _BATCH = 20, 64


class _Restandardised(nn.Module):
    """From values in [-1, 1] to those of the data set, whose 0 and 16 are standardised."""

    def __init__(self, data: Any) -> None:
        super().__init__()
        ((x, _),) = data.train.batches(len(data.train))
        self.low, self.high = x.min().item(), x.max().item()

    def forward(self, images: Tensor) -> Tensor:
        return (images + 1) / 2 * (self.high - self.low) + self.low


def enlarged(images: Tensor) -> Tensor:
    """Return images of 8x8 at 32x32 pixels."""
    return F.interpolate(images, size=32, mode="bilinear")
