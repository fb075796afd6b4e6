"""FSDP2: the modules to which `fully_shard` was applied. This file has all private names of FSDP that bisam uses."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def fsdp_module_type() -> type | tuple[()]:
    """Returns the class of modules to which `fully_shard` was applied, or () if its module was not imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def reshard(model: nn.Module) -> None:
    """Frees parameters that were gathered for an evaluation, which replace the sharded parameters until then."""
    if kind := fsdp_module_type():
        FSDPModules([module for module in model.modules() if isinstance(module, kind)]).reshard()


def finalizes_by_hand(module: Any) -> bool:
    """Whether `set_manual_backward_finalization(True)` was called on a module of FSDP2."""
    return getattr(module._get_fsdp_state()._state_ctx, "manual_backward_finalization", False)


def accumulation_hooks(parameters: Sequence[Tensor]) -> list[dict[int, Any]]:
    """Returns the hooks that run after gradient accumulation, which a backward pass into `.grad` would run."""
    hooks = (getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
    return [of_one for of_one in hooks if of_one]


class FSDPModules:
    """The modules to which `fully_shard` was applied.

    Args:
        modules: outer modules before the modules inside them.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules

    def reshard(self) -> None:
        """Frees gathered weights that are or will be out of date."""
        for module in self._modules:
            for group in _groups(module):
                if getattr(group, "_all_gather_result", None) is not None:
                    group.wait_for_unshard()  # else a prefetched gather would end after the weights have changed
            module.reshard()

    def gradients(
        self, loss: Tensor, parameters: Sequence[Tensor], wrt: Sequence[bool] | None = None
    ) -> list[Tensor | None]:
        """Returns gradients of the mean of all ranks' losses; the contents of `.grad` are kept.

        With `wrt` (see `Query`) autograd computes the gradients of these parameters, and only they are reduced over the
        ranks. Weights are gathered as for the gradient of all: the forward pass needs them, and a backward pass gathers
        those of each module that it reaches, and of the module that FSDP2 expects next. If torch hides the gathered
        parameters (see `leaves`), all gradients are computed and reduced, and the others dropped.

        Raises:
            ValueError: gradients of another loss are not reduced yet, and would be added to these.
        """
        if any(leaf.grad is not None for leaf in self.leaves() or ()):
            raise ValueError(
                "gradients of another loss were not reduced yet, and would become part of the perturbation: leave out "
                "set_requires_gradient_sync(False) around that loss"
            )
        kept = [p.grad for p in parameters]
        try:
            for p in parameters:
                p.grad = None
            inputs = None if wrt is None else self._asked(parameters, wrt)
            with self._reduced():
                loss.backward(inputs=inputs or None)
            return [p.grad if wrt is None or wrt[i] else None for i, p in enumerate(parameters)]
        finally:
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad

    def leaves(self) -> list[Tensor] | None:
        """Returns the gathered parameters, which graphs hold instead of the sharded ones; None if torch hides them."""
        gathered = self._gathered()
        return None if gathered is None else [leaf for _, leaf in gathered if leaf is not None]

    def _gathered(self) -> list[tuple[Tensor | None, Tensor | None]] | None:
        """Returns sharded parameters and the gathered ones, which may be None; None if torch hides them."""
        groups = [group for module in self._modules for group in _groups(module)]
        if any(not hasattr(group, "fsdp_params") for group in groups):
            return None
        pairs = [(p, getattr(p, "_unsharded_param", None)) for group in groups for p in group.fsdp_params]
        return [(getattr(p, "sharded_param", None), leaf) for p, leaf in pairs]

    def _asked(self, parameters: Sequence[Tensor], wrt: Sequence[bool]) -> list[Tensor] | None:
        """Returns the leaves of the graph that belong to the parameters `wrt`; None if torch hides them."""
        gathered = self._gathered()
        if gathered is None or any(shard is None for shard, _ in gathered):
            return None
        leaves = {id(shard): leaf for shard, leaf in gathered}
        found = [leaves.get(id(p), p) for p, ask in zip(parameters, wrt, strict=True) if ask]
        return [leaf for leaf in found if leaf is not None]

    def recover(self, parameters: Sequence[Tensor]) -> None:
        """Resets FSDP2 after an interrupted forward or backward pass, if this version of torch supports it."""
        kept = [p.grad for p in parameters]
        for module in self._modules:
            if hasattr(module, "reset_iter_state") and getattr(module._get_fsdp_state(), "_is_root", False):
                module.reset_iter_state()
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad

    @contextmanager
    def _reduced(self) -> Generator[None]:
        """A context in which gradients are reduced, also under gradient accumulation: a method needs each gradient."""
        asked = [
            (module, [(group.reduce_grads, group.all_reduce_grads) for group in _groups(module)])
            for module in self._modules
        ]
        off = [(module, flags[0]) for module, flags in asked if flags and not all(flags[0])]
        contexts = [module._get_fsdp_state()._state_ctx for module in self._modules]
        last = [context.is_last_backward for context in contexts]
        for module, _ in off:
            module.set_requires_gradient_sync(True, recurse=False)
        for context in contexts:
            context.is_last_backward = True  # else FSDP2 would not wait for the reductions
        try:
            yield
        finally:
            for context, was in zip(contexts, last, strict=True):
                context.is_last_backward = was
            for module, (reduce, all_reduce) in off:
                module.set_requires_gradient_sync(reduce, recurse=False)
                module.set_requires_all_reduce(all_reduce, recurse=False)


def _groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:  # an older torch has one
        groups = [state._fsdp_param_group] if getattr(state, "_fsdp_param_group", None) else []
    return list(groups)
