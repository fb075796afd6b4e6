"""Capture: the inputs and outputs of modules in the forward passes of a model, by hooks."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """A call of a module in a forward pass.

    Attributes:
        name: name of the module.
        module: the module.
        features: its first input, as a matrix (n, d).
        output: its output.
    """

    name: str
    module: nn.Module
    features: Tensor
    output: Any


class Capture:
    """The calls of the modules of interest in the latest forward pass.

    Args:
        at: the name of the only module of interest; None: the linear layer that is called last.
    """

    def __init__(self, at: str | None) -> None:
        self._at = at
        self._call: Call | None = None
        self._before = ""

    def hook(self, name: str) -> Any:
        """Returns a forward hook for the module of this name."""

        def called(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
                raise ValueError(
                    f"the first input of {name!r} is no floating-point tensor, got "
                    f"{type(args[0]).__name__ if args else 'keyword arguments'}: choose another layer at="
                )
            inputs = args[0].detach()
            features = inputs.flatten(0, -2) if isinstance(module, nn.Linear) else inputs.flatten(1)
            self._call = Call(name, module, features, output)

        return called

    def last(self) -> Call:
        """Returns the call of the latest forward pass, and forgets it.

        Raises:
            ValueError: there was none, or that of the pass before was of another module.
        """
        call, self._call = self._call, None
        if call is None:
            what = "no linear layer" if self._at is None else f"not {self._at!r}"
            raise ValueError(
                f"the forward pass called {what}: name a layer that it calls, at=..., and pass the model without "
                "torch.compile, which calls no hooks"
            )
        if self._before not in ("", call.name):
            raise ValueError(
                f"the last linear layer is {self._before!r} in one batch and {call.name!r} in another: at="
            )
        self._before = call.name
        return call


@contextmanager
def captured(model: nn.Module, at: str | None) -> Generator[Capture]:
    """A context that captures the calls of a module in the forward passes of a model.

    Args:
        model: the model.
        at: name of the module in `model.named_modules()`; None: the linear layer that a forward pass calls last.

    Raises:
        ValueError: the model has no such module.
    """
    modules = dict(model.named_modules())
    if at is None:
        chosen = {name: module for name, module in modules.items() if isinstance(module, nn.Linear)}
        if not chosen:
            raise ValueError("the model has no linear layer: name the layer whose inputs are the features, at=...")
    elif at in modules:
        chosen = {at: modules[at]}
    else:
        near = get_close_matches(at, modules, 3) or [name for name in modules if name][-3:]
        raise ValueError(f"the model has no module {at!r}; it has {', '.join(map(repr, near))}")
    capture, handles = Capture(at), []
    try:
        for name, module in chosen.items():
            handles.append(module.register_forward_hook(capture.hook(name)))
        yield capture
    finally:
        for handle in handles:
            handle.remove()
