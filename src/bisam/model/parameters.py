"""Parameters: collects the weights, the state and the FSDP2 modules of a model and its loss in one traversal."""

from __future__ import annotations

from collections.abc import Container, Sequence
from functools import cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from bisam.distributed.fsdp import fsdp_module_type
from bisam.model.module_state import Kind, Place, ScriptEntries


class Inventory(NamedTuple):
    """The parts of a model and its loss that a training step uses.

    Attributes:
        parameters: the trainable parameters; tied parameters count once.
        places: the places of buffers, frozen parameters and plain attributes.
        fsdp_modules: the modules to which `fully_shard` was applied, outer ones first.
    """

    parameters: list[nn.Parameter]
    places: list[Place]
    fsdp_modules: list[Any]


def inventory(model: nn.Module, loss: object, with_tensors: Container[int] | None = None) -> Inventory:
    """Returns the parameters, state and FSDP2 modules of a model, and of its loss if that is a module.

    Parameters that FSDP2 has gathered are freed first, so that the sharded ones are found.

    Args:
        model: the model.
        loss: the loss.
        with_tensors: identities of those modules of torch.nn whose attributes may be tensors; of other classes all
            attributes are looked at. Default: all.
    """
    # As nn.Module.parameters() and buffers(), without building names: this runs at every step.
    parameters: dict[int, nn.Parameter] = {}  # by identity
    places: list[Place] = []
    fsdp_modules, fsdp = list[Any](), fsdp_module_type()
    everything, known = with_tensors is None, with_tensors or ()
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
            frozen = False
            for p in own.values():
                if p is not None:
                    if p.requires_grad:
                        parameters[id(p)] = p
                    else:
                        frozen = True
            if frozen:
                places.append(_place(module, "frozen", own))
        if everything or _is_custom(type(module)) or (known and id(module) in known):
            places.append(_place(module, "buffer", module._buffers))
            places.append(Place(module, "attribute", module.__dict__))
        elif buffers := module._buffers:
            places.append(_place(module, "buffer", buffers))
    return Inventory(list(parameters.values()), places, fsdp_modules)


@cache
def _is_custom(kind: type[nn.Module]) -> bool:
    return not kind.__module__.startswith("torch.nn.")


def _place(module: nn.Module, kind: Kind, entries: Any) -> Place:
    return Place(
        module, kind, ScriptEntries(module, entries) if isinstance(module, torch.jit.ScriptModule) else entries
    )


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


def owners_of(model: nn.Module, loss: object, parameters: Sequence[Tensor]) -> set[nn.Module]:
    """Returns the modules that hold some of these parameters."""
    wanted = {id(p) for p in parameters}
    modules = (module for root in _roots(model, loss) for module in root.modules()) if wanted else ()
    return {module for module in modules if any(id(p) in wanted for p in module.parameters(recurse=False))}


def _roots(model: nn.Module, loss: object) -> list[nn.Module]:
    return [root for root in (cast(Any, loss), model) if isinstance(root, nn.Module)]
