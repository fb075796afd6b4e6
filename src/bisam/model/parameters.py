"""Parameters: collects the weights, the buffers and the FSDP2 modules of a model and its loss in one traversal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from torch import Tensor, nn

from bisam.distributed.fsdp import fsdp_module_type
from bisam.model.buffers import Slot


class Inventory(NamedTuple):
    """The parts of a model and its loss that a training step uses.

    Attributes:
        parameters: the trainable parameters; tied parameters count once.
        slots: the buffers and their places.
        fsdp_modules: the modules to which `fully_shard` was applied, outer ones first.
    """

    parameters: list[nn.Parameter]
    slots: list[Slot]
    fsdp_modules: list[Any]


def inventory(model: nn.Module, loss: object) -> Inventory:
    """Returns the parameters, buffers and FSDP2 modules of a model, and of its loss if that is a module.

    Parameters that FSDP2 has gathered are freed first, so that the sharded ones are found.
    """
    # As nn.Module.parameters() and buffers(), without building names: this runs at every step.
    parameters: dict[int, nn.Parameter] = {}  # by identity
    slots: list[Slot] = []
    fsdp_modules, fsdp = list[Any](), fsdp_module_type()
    todo = _roots(model, loss)
    seen: set[nn.Module] = set()
    while todo:
        module = todo.pop()
        if module in seen:
            continue
        seen.add(module)
        if fsdp and isinstance(module, fsdp):
            fsdp_modules.append(module)
            cast(Any, module).reshard()  # it may hold gathered parameters, for example after an evaluation
        if children := module._modules:
            todo += [m for m in reversed(children.values()) if m is not None]
        if own := module._parameters:
            for p in own.values():
                if p is not None and p.requires_grad:
                    parameters[id(p)] = p
        if buffers := module._buffers:
            for name, buffer in buffers.items():
                if buffer is not None:
                    slots.append((buffers, name, buffer))
    return Inventory(list(parameters.values()), slots, fsdp_modules)


def parameter_names(model: nn.Module, loss: object, parameters: Sequence[Tensor]) -> list[str]:
    """Returns the names of the parameters in the model; names of the loss's parameters begin with `loss.`."""
    named = {id(p): name for name, p in model.named_parameters()}
    if isinstance(loss, nn.Module):
        named = {id(p): f"loss.{name}" for name, p in loss.named_parameters()} | named
    return [named[id(p)] for p in parameters]


def layer_names(model: nn.Module, loss: object, parameters: Sequence[Tensor]) -> list[str]:
    """Returns the class names of the modules that the parameters belong to."""
    modules = [module for root in _roots(model, loss) for module in root.modules()]
    owners = {id(p): type(module).__name__ for module in modules for p in module.parameters(recurse=False)}
    return [owners[id(p)] for p in parameters]


def _roots(model: nn.Module, loss: object) -> list[nn.Module]:
    return [root for root in (cast(Any, loss), model) if isinstance(root, nn.Module)]
