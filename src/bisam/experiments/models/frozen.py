"""Frozen: pretrained networks whose lower layers keep their weights, and what these layers return.

freeze(model, "hf:bert-base-uncased", 8)     # the embeddings and 8 of the 12 layers
states = hidden_states(model, inputs)        # constant during training: frozen layers are in eval mode
skip_frozen(model, inputs, "bert")           # from now on the model takes the states in place of tokens:
model({"hidden_states": states, "attention_mask": inputs["attention_mask"]})
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor, nn

from bisam.experiments.models.logits import HIDDEN, Logits


def freeze(model: nn.Module, name: str, layers: int) -> None:
    """Freeze the embeddings or the stem of a network, and its lower layers.

    Their parameters lose `requires_grad`: they have no gradient, no perturbation and no weight decay. `to_train` leaves
    them in eval mode.

    Args:
        model: of Hugging Face, with `embeddings` and a list of layers above them, or of timm, whose layers are the
            blocks or stages that timm numbers.
        name: of the model, for messages.
        layers: number of frozen layers, besides the embeddings or the stem.

    Raises:
        ValueError: the model has no such layers, or fewer.
    """
    if isinstance(model, Logits):
        parts = _parts(model, name)
        count = len(parts) - 1
        frozen = [p for part in parts[: layers + 1] for p in part.parameters()]
    elif hasattr(model, "group_matcher"):
        timm: Any = import_module("timm.models")
        places = timm.group_parameters(model, cast(Any, model).group_matcher(coarse=True), reverse=True)
        count = max(places.values()) - 1  # the stem is 0, the head the last
        frozen = [p for key, p in model.named_parameters() if places[key] <= layers]
    else:
        raise _without_layers(name)
    if layers > count:
        raise ValueError(f"frozen must be at most {count}, the number of layers of {name!r}, got {layers}")
    for p in frozen:
        p.requires_grad_(False)


def without_frozen(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return a state dict of a module without the parameters that are not trained."""
    frozen = _names(module)
    return {name: value for name, value in state.items() if name not in frozen}


def with_frozen(state: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """Return a complete state dict of a module: `state`, and the module's own parameters that are not trained."""
    own = module.state_dict() if _names(module) - state.keys() else {}
    return {**{name: own[name] for name in _names(module) if name in own}, **state}


def _names(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters(remove_duplicate=False) if not p.requires_grad}


def to_train(module: nn.Module) -> None:
    """Set a module to training mode, except the parts whose parameters are all frozen, which are set to eval mode.

    So frozen layers have no dropout, and their normalisation keeps its running statistics.
    """
    module.train()
    for part in module.modules():
        parameters = list(part.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            part.eval()


@torch.no_grad()
def hidden_states(model: Logits, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return what the highest frozen layer of a model of Hugging Face returns, (N, length, width).

    Args:
        model: with frozen layers; it is in eval mode afterwards.
        inputs: tokens and masks (N, length), by name.
    """
    return _first(_traced(model, inputs)[1][-1])


@torch.no_grad()
def skip_frozen(model: Logits, inputs: Mapping[str, Tensor], name: str) -> None:
    """Let a model of Hugging Face take the states of its frozen layers in place of tokens; see `Logits`.

    Its parameters keep their names, and the frozen ones are not used any more.

    Args:
        model: with frozen layers; it is in eval mode afterwards.
        inputs: tokens and masks (N, length), by name, on which this is tried.
        name: of the model, for messages.

    Raises:
        ValueError: the logits from the states are not those from the tokens: the upper layers use more than the states.
    """
    wanted, outputs = _traced(model, inputs)
    embeddings, *layers = _frozen(model)
    embeddings.forward = _given
    for layer, output in zip(layers, outputs[1:], strict=True):
        layer.forward = _same_in_tuple if isinstance(output, tuple) else _same  # a tuple before transformers 5
    try:
        found = model({HIDDEN: _first(outputs[-1]), "attention_mask": inputs["attention_mask"]})
        differ = not torch.allclose(found.float(), wanted.float(), rtol=1e-3, atol=1e-3)
    except Exception as error:  # each network raises another type of error
        raise _without_layers(name) from error
    if differ:
        raise _without_layers(name)


def _traced(model: Logits, inputs: Mapping[str, Tensor]) -> tuple[Tensor, list[Any]]:
    """Return the logits, and what each of the frozen parts returns."""
    outputs: list[Any] = []
    hooks = [part.register_forward_hook(lambda *call: outputs.append(call[-1])) for part in _frozen(model)]
    try:
        logits = model.eval()(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return logits, outputs


def _parts(model: Logits, name: str) -> list[nn.Module]:
    """Return the embeddings and the layers, from below."""
    network: Any = model.network
    base, count = network.base_model, getattr(network.config, "num_hidden_layers", 0)
    lists = [part for part in base.modules() if isinstance(part, nn.ModuleList) and len(part) == count]
    if not isinstance(getattr(base, "embeddings", None), nn.Module) or not lists:
        raise _without_layers(name)
    return [base.embeddings, *lists[0]]


def _frozen(model: Logits) -> list[nn.Module]:
    return [part for part in _parts(model, "") if not any(p.requires_grad for p in part.parameters())]


def _without_layers(name: str) -> ValueError:
    return ValueError(
        f"frozen layers need an encoder of Hugging Face, such as BERT, or a model of timm, and not {name!r}: leave "
        "--frozen out"
    )


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _given(*inputs: Any, inputs_embeds: Tensor | None = None, **_: Any) -> Tensor:
    return next(x for x in (inputs_embeds, *inputs) if x is not None)


def _same(states: Tensor, *_: Any, **__: Any) -> Tensor:
    return states


def _same_in_tuple(states: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
    return (states,)
