"""PEFT: Flat-LoRA, noise on the merged weights of LoRA layers in the forward passes of training.

Requires the package `peft`:

    from bisam.integrations.peft import FlatLoRA

    model = get_peft_model(model, LoraConfig(r=8, target_modules=["query", "value"]))
    noise = FlatLoRA(model, sigma=Cosine(0.0, 0.05, steps=steps))

Other methods need no integration: adapters are trained parameters, and frozen ones are neither displaced nor copied.
"""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

try:
    from peft.tuners.lora import Linear as LoraLinear
except ImportError as error:
    raise ImportError("FlatLoRA needs PEFT: pip install peft") from error

from bisam import schedules
from bisam.schedules import Radius
from bisam.seeded import Seeded
from bisam.validation import shown, whole
from bisam.vector import Vector


class FlatLoRA:
    """Flat-LoRA: training at random points around the merged weights, in proportion to each filter (Li et al., 2024).

    Source: https://arxiv.org/abs/2409.14396. In each forward pass in training mode a LoRA layer computes with W + E +
    s B A in place of W + s B A, where row i of E, of n entries, has

        E_ij = sigma / sqrt(n) ||(W + s B A)_i|| z_ij,    z_ij ~ N(0, 1).

    A and B are trained, by any loop: a plain one, which is the authors' method with one gradient per step, or one with
    `SharpnessAware`, whose method displaces A and B besides. The authors' `sigma` rises from 0 to 0.05 along a cosine.

    The authors add E to W and subtract it after the step. Here W is not changed: a layer draws E from its seed in the
    forward pass and again in the backward pass, so that no more than the noise of one layer is in memory, and W keeps
    its bits. The noise is a function of `seed`, the number of the pass and the layer. It is the same on all ranks, and
    in a pass that activation checkpointing repeats, unless another pass with gradients was made before `backward()`.

    Layers whose adapters are merged or disabled have no noise, and neither has the model in eval mode. A pass without
    gradients, as that of the reference model of DPO, is not counted and has the noise of the pass before it.

    Args:
        model: a PEFT model with LoRA layers around `nn.Linear`.
        sigma: length of the noise in units of the norm of each filter, >= 0, a number or a schedule, whose steps are
            forward passes in training mode with gradients: SAM makes two in a step.
        seed: seed of the noise, >= 0.

    Attributes:
        passes: number of forward passes in training mode with gradients; store it in a checkpoint, and set it after
            loading.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `sigma` or `seed` is outside its range; the model has no LoRA layer around `nn.Linear`, has noise of
            another `FlatLoRA`, or the weights of a layer are trained.

    Raises in a forward pass:
        ValueError: the weights of a layer are trained since.
    """

    def __init__(self, model: nn.Module, sigma: Radius = 0.05, seed: int = 0) -> None:
        if not isinstance(cast(Any, model), nn.Module):
            raise TypeError(f"model must be a PEFT model, a torch.nn.Module, got {shown(model)}")
        schedules.check("sigma", sigma)
        whole("seed", seed, least=0)
        self.sigma, self.seed, self.passes = sigma, seed, 0
        layers = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
        self._layers = [layer for layer in layers if type(layer.base_layer) is nn.Linear]
        if not self._layers:
            raise ValueError(
                "FlatLoRA adds noise to LoRA layers around nn.Linear, and the model has none: call get_peft_model(...) "
                "with a LoraConfig first"
            )
        self._before = [vars(layer.base_layer).get("forward") for layer in self._layers]  # as that of a hook
        for layer, before in zip(self._layers, self._before, strict=True):
            _check_frozen(cast(nn.Linear, layer.base_layer))
            if isinstance(getattr(getattr(before, "func", None), "__self__", None), FlatLoRA):
                raise ValueError(
                    "the model has the noise of another FlatLoRA, which this one would replace: call its remove() first"
                )
        self._count = model.register_forward_pre_hook(self._begin)
        for i, layer in enumerate(self._layers):
            base = cast(Any, layer.base_layer)
            base.forward = partial(self._forward, i, layer, base, base.forward)

    def remove(self) -> None:
        """Removes the noise from the model."""
        self._count.remove()
        for layer, before in zip(self._layers, self._before, strict=True):
            vars(layer.base_layer).pop("forward", None)
            if before is not None:
                vars(layer.base_layer)["forward"] = before

    def _begin(self, model: nn.Module, args: Any) -> None:
        repeated = torch._C._current_graph_task_id() != -1  # by checkpointing, in the backward pass
        self.passes += model.training and torch.is_grad_enabled() and not repeated

    def _forward(self, i: int, layer: Any, base: nn.Linear, plain: Any, x: Tensor) -> Tensor:
        if not layer.training or layer.merged or layer.disable_adapters:
            return plain(x)
        _check_frozen(base)
        step, active = max(self.passes - 1, 0), [name for name in layer.active_adapters if name in layer.lora_A]
        with torch.no_grad():
            merged = base.weight + sum([layer.get_delta_weight(name) for name in active])
            scale = torch.linalg.vector_norm(merged, dim=1, keepdim=True) / merged.shape[1] ** 0.5
            del merged
        noise = Seeded([(self.seed, step, i)], scales=[scale * schedules.at(self.sigma, step)])
        return cast(Tensor, _Noisy.apply(x, base.weight, base.bias, noise))


def _check_frozen(base: nn.Linear) -> None:
    if base.weight.requires_grad:
        raise ValueError(
            "FlatLoRA adds noise to frozen weights, and those of a LoRA layer are trained: freeze them, or use "
            "the method FilterNoise for weights that are trained"
        )


class _Noisy(torch.autograd.Function):
    """A linear layer with noise on its weights, which are frozen; the noise is drawn again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, noise: Seeded) -> Tensor:
        """Returns x (W + E)^T + b."""
        ctx.noise, ctx.dtype = noise, x.dtype
        ctx.save_for_backward(weight)
        return F.linear(x, _moved(weight, noise), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the gradient with respect to x, and to the bias if it is trained."""
        (weight,) = ctx.saved_tensors
        g = grads[0]
        of_x = (g @ _moved(weight, ctx.noise).to(g.dtype)).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        of_bias = g.sum_to_size(g.shape[-1:]) if ctx.needs_input_grad[2] else None
        return of_x, None, of_bias, None


def _moved(weight: Tensor, noise: Seeded) -> Tensor:
    ((_, e),) = noise.each(Vector([weight]))
    return e.add_(weight)
