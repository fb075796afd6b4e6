"""Models, batches, optimizers and methods as data, and what tests ask of weights: a new case is one more row."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import references
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bisam import ASAM, MSAM, SAM, ABiSAM, BiSAM, Evaluation, NegLog, Oracle, Tanh, Vector
from bisam.perturbations import L2, Adaptive

CLASSES = 4


class Tied(nn.Module):
    """One matrix as encoder and decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.middle, self.decode = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.decode.weight = self.encode.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.decode(torch.tanh(self.middle(torch.tanh(self.encode(x)))))[:, :CLASSES]


def mlp(norm: Callable[[int], nn.Module] | None = None) -> nn.Sequential:
    middle = [] if norm is None else [norm(8)]
    return nn.Sequential(nn.Linear(6, 8), *middle, nn.Tanh(), nn.Linear(8, CLASSES)).double()


def convnet() -> nn.Sequential:
    # No bias before a norm: its gradient is rounding noise, which AdamW would blow up to a step of full length.
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 3)),
        nn.Conv2d(1, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(24, CLASSES),
    ).double()


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "convnet": convnet, "tied": lambda: Tied().double()}

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=5e-3),
    "adamw": partial(torch.optim.AdamW, lr=1e-2, weight_decay=1e-2),
}


def batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator, dtype=torch.double)
    return x, torch.randint(CLASSES, (n,), generator=generator)


# name: the method, and its gradient on one flat vector: (w, at, scaled) -> gradient, where at(loss) is the gradient of
# a loss as a function of w and scaled marks the entries of parameters with "weight" in their name.

CE = partial(F.cross_entropy, reduction="none")
LOG = partial(references.q, references.phi_log, 1.0)
TANH = partial(references.q, references.phi_tanh(0.1), 10.0)
Twin = Callable[[Tensor, Callable[..., references.Grad], Tensor], Tensor]


def everywhere(scaled: Tensor) -> Tensor:
    return torch.ones_like(scaled)


def micro(w: Tensor, at: Callable[..., references.Grad], scaled: Tensor) -> Tensor:
    parts = [slice(0, 3), slice(3, 6), slice(6, 8)]
    return sum(references.sam(w, at(CE, p), at(CE, p), 0.1) * ((p.stop - p.start) / 8) for p in parts)


METHODS: dict[str, tuple[Any, Twin]] = {
    "SAM": (SAM(L2(0.1)), lambda w, at, s: references.sam(w, at(CE), at(CE), 0.1)),
    "BiSAM-log": (BiSAM(0.1), lambda w, at, s: references.sam(w, at(LOG), at(CE), 0.1)),
    "BiSAM-tanh": (BiSAM(0.1, Tanh()), lambda w, at, s: references.sam(w, at(TANH), at(CE), 0.1)),
    "ASAM": (ASAM(0.5), lambda w, at, s: references.asam(w, at(CE), at(CE), 0.5, 0.0, everywhere(s))),
    "ASAM-official": (
        SAM(Adaptive(0.5, eta=0.01, where=lambda name, w: "weight" in name)),
        lambda w, at, s: references.asam(w, at(CE), at(CE), 0.5, 0.01, s),
    ),
    "ABiSAM": (
        ABiSAM(0.5, NegLog(), eta=0.01),
        lambda w, at, s: references.asam(w, at(LOG), at(CE), 0.5, 0.01, everywhere(s)),
    ),
    "MSAM": (MSAM(3, SAM(L2(0.1))), micro),
}


class Quadratic(Oracle):
    """The mean over the rows a of the batch of f(w) = sum_i a_i (w_i - 1)^2 / 2, in closed form."""

    def __init__(self, *w: float) -> None:
        self.weights, self.names, self.state = Vector([torch.tensor(w, dtype=torch.double)]), ["w"], {}

    def query(self, batch, objective=None, *, at=None, grad=True, track=None) -> Evaluation:
        (a,), (w,) = batch, self.weights if at is None else self.weights + at
        return Evaluation((a * (w - 1) ** 2 / 2).sum(1), Vector([a.mean(0) * (w - 1)]) if grad else None)


# What a call must leave behind.


def bits(tensor: Tensor | None) -> list[int] | None:
    """What torch.equal compares, but NaN equals itself and -0.0 is not 0.0."""
    return None if tensor is None else tensor.detach().clone().reshape(-1).view(torch.uint8).tolist()


def parameters(model: nn.Module) -> dict[str, Any]:
    return {name: bits(p) for name, p in model.named_parameters()}


def buffers(model: nn.Module) -> dict[str, Any]:
    return {name: bits(b) for name, b in model.named_buffers()}


def gradients(model: nn.Module) -> dict[str, Any]:
    return {name: bits(p.grad) for name, p in model.named_parameters()}


def everything(model: nn.Module) -> tuple[Any, ...]:
    return parameters(model), buffers(model), gradients(model), [p.data_ptr() for p in model.parameters()]


def train(step: Callable[[Tensor, Tensor], Tensor], model: nn.Module, steps: int = 6, optimizer: str = "sgd") -> Any:
    """Bits of weights and buffers after a plain training loop with `step` as the loss."""
    optimizer = OPTIMIZERS[optimizer](model.parameters())
    for i in range(steps):
        optimizer.zero_grad()
        step(*batch(i)).backward()
        optimizer.step()
    return parameters(model), buffers(model)
