"""Network: networks of one architecture, run at once.

    stack = Stack([build("mlp", 10, channels=1) for _ in range(30)])
    logits = stack.train_logits(images, stack.weights, track=True)         # (30, N, 1, 8, 8) -> (30, N, 10)

Linear layers are batched products of matrices. Activations are features by examples, (S, F, N), so that the features of
all networks are the channels of one batch normalisation, without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYERS = (nn.AdaptiveAvgPool2d, nn.Flatten, nn.Linear, nn.BatchNorm1d, nn.ReLU)
"""The layers of networks that can be stacked: the first one, if any, at the beginning, and the second one before the
others."""


class Stack:
    """Networks of one architecture: a sequence of `LAYERS`.

    Args:
        models: the networks, one for each seed, whose weights and buffers are copied; on one device and of one dtype.

    Raises:
        ValueError: a layer is none of `LAYERS`, or is not used as in most networks.

    Attributes:
        weights: the parameters of all networks, each (S, ...), in the order of `nn.Module.parameters`.
        names: their names in one network.
        layers: class names of the modules that they belong to.
        buffers: running statistics, each (S, ...), by their names in one network.
    """

    def __init__(self, models: Sequence[nn.Module]) -> None:
        first = models[0]
        if (fault := layers_fault(first)) is not None:
            raise ValueError(fault)
        self.count = len(models)
        self.names = [name for name, _ in first.named_parameters()]
        owners = dict(first.named_modules())
        self.layers = [type(owners[name.rpartition(".")[0]]).__name__ for name in self.names]
        each = [dict(model.named_parameters()) for model in models]
        self.weights = nn.ParameterList(torch.stack([one[name].detach() for one in each]) for name in self.names)
        kept = [dict(model.named_buffers()) for model in models]
        self.buffers = {name: torch.stack([one[name] for one in kept]) for name in kept[0]}
        self._steps = [_step(name, layer) for name, layer in first.named_children()]

    def train_logits(self, inputs: Tensor, weights: Sequence[Tensor], *, track: bool) -> Tensor:
        """Return logits (S, N, K) in training mode.

        Args:
            inputs: (S, N, ...).
            weights: as the attribute, or displaced ones.
            track: whether running statistics are updated.
        """
        return self._logits(inputs, weights, training=True, track=track)

    @torch.no_grad()
    def predict_logits(self, inputs: Tensor) -> Tensor:
        """Return logits (S, N, K) in evaluation mode, at the present weights."""
        return self._logits(inputs, list(self.weights), training=False, track=False)

    def state(self) -> dict[str, Tensor]:
        """The weights and buffers, each (S, ...), by name; not copied."""
        return {**dict(zip(self.names, (w.detach() for w in self.weights), strict=True)), **self.buffers}

    def load(self, state: dict[str, Tensor]) -> None:
        """Copy weights and buffers, as `state` returns them."""
        with torch.no_grad():
            for name, tensor in self.state().items():
                tensor.copy_(state[name])

    def finite(self) -> Tensor:
        """Whether all weights and buffers of each network are finite, (S,)."""
        floats = [t for t in self.state().values() if t.is_floating_point()]
        return torch.stack([t.flatten(1).isfinite().all(1) for t in floats]).all(0)

    def _logits(self, inputs: Tensor, weights: Sequence[Tensor], *, training: bool, track: bool) -> Tensor:
        named = dict(zip(self.names, weights, strict=True))
        x = inputs
        for step in self._steps:
            x = step.apply(x, named, self.buffers, training=training, track=track)
        return x.transpose(1, 2)


@dataclass(frozen=True)
class _Linear:
    name: str
    bias: bool

    def apply(
        self, x: Tensor, weights: dict[str, Tensor], buffers: dict[str, Tensor], *, training: bool, track: bool
    ) -> Tensor:
        weight = weights[f"{self.name}.weight"]
        return torch.baddbmm(weights[f"{self.name}.bias"].unsqueeze(2), weight, x) if self.bias else weight @ x


@dataclass(frozen=True)
class _BatchNorm:
    name: str
    momentum: float
    eps: float

    def apply(
        self, x: Tensor, weights: dict[str, Tensor], buffers: dict[str, Tensor], *, training: bool, track: bool
    ) -> Tensor:
        mean, variance = (buffers[f"{self.name}.running_{what}"] for what in ("mean", "var"))
        if track:
            buffers[f"{self.name}.num_batches_tracked"].add_(1)
        used = not training or track
        return F.batch_norm(
            x.reshape(1, -1, x.shape[2]),
            mean.view(-1) if used else None,
            variance.view(-1) if used else None,
            weights[f"{self.name}.weight"].flatten(),
            weights[f"{self.name}.bias"].flatten(),
            training,
            self.momentum,
            self.eps,
        ).view(x.shape)


class _Rectifier:
    def apply(
        self, x: Tensor, weights: dict[str, Tensor], buffers: dict[str, Tensor], *, training: bool, track: bool
    ) -> Tensor:
        return F.relu(x)


class _Flatten:
    def apply(
        self, x: Tensor, weights: dict[str, Tensor], buffers: dict[str, Tensor], *, training: bool, track: bool
    ) -> Tensor:
        return x.flatten(2).transpose(1, 2)  # a view: products of matrices take transposed ones as they are


@dataclass(frozen=True)
class _Pool:
    size: Any

    def apply(
        self, x: Tensor, weights: dict[str, Tensor], buffers: dict[str, Tensor], *, training: bool, track: bool
    ) -> Tensor:
        pooled = F.adaptive_avg_pool2d(x.flatten(0, 1), self.size)
        return pooled.unflatten(0, (len(x), -1))


def _step(name: str, layer: nn.Module) -> _Linear | _BatchNorm | _Rectifier | _Flatten | _Pool:
    match layer:
        case nn.AdaptiveAvgPool2d():
            return _Pool(layer.output_size)
        case nn.Flatten():
            return _Flatten()
        case nn.Linear():
            return _Linear(name, cast("Tensor | None", layer.bias) is not None)
        case nn.BatchNorm1d():
            return _BatchNorm(name, cast(float, layer.momentum), layer.eps)
        case _:
            return _Rectifier()


def layers_fault(model: nn.Module) -> str | None:
    """Return why a network cannot be stacked, or None."""
    layers = list(model.children())
    known = ", ".join(kind.__name__ for kind in LAYERS)
    if not isinstance(model, nn.Sequential) or not layers:
        return f"it is no sequence of {known}"
    pools = isinstance(layers[0], nn.AdaptiveAvgPool2d)
    for i, layer in enumerate(layers):
        if type(layer) not in LAYERS:
            return f"it has {type(layer).__name__}, and a stack {known}"
        if isinstance(layer, nn.AdaptiveAvgPool2d) != (pools and i == 0) or isinstance(layer, nn.Flatten) != (
            i == pools
        ):
            return "it does not begin with Flatten, with or without AdaptiveAvgPool2d before it, or has another one"
        if isinstance(layer, nn.BatchNorm1d) and not (
            layer.affine and layer.track_running_stats and layer.momentum is not None
        ):
            return "it has BatchNorm1d without weights or running statistics, or with a cumulative average"
    return None
