"""FSDP2: the modules that `fully_shard` was applied to. All private names of FSDP that bisam uses are in this file."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def fsdp_module_type() -> type | tuple[()]:
    """The class of modules that `fully_shard` was applied to, or () where its module was not imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())


def reshard(model: nn.Module) -> None:
    """Drop parameters that were gathered for an evaluation: until then the model has them in place of its own."""
    if kind := fsdp_module_type():
        FSDPModules([module for module in model.modules() if isinstance(module, kind)]).reshard()


def finalizes_by_hand(module: Any) -> bool:
    """Whether `set_manual_backward_finalization(True)` was called on a module of FSDP2."""
    return getattr(module._get_fsdp_state()._state_ctx, "manual_backward_finalization", False)


def accumulation_hooks(parameters: Sequence[Tensor]) -> list[dict[int, Any]]:
    """Hooks that run after a gradient was accumulated: FSDP2 runs them in every backward pass, also in a query's."""
    hooks = (getattr(p, "_post_accumulate_grad_hooks", None) for p in parameters)
    return [of_one for of_one in hooks if of_one]


class FSDPModules:
    """The modules that `fully_shard` was applied to.

    Args:
        modules: outer modules before the modules inside them.
    """

    def __init__(self, modules: Sequence[Any]) -> None:
        self._modules = modules

    def reshard(self) -> None:
        """Drop gathered weights, which belong to another point, or soon will."""
        for module in self._modules:
            for group in _groups(module):
                if getattr(group, "_all_gather_result", None) is not None:
                    group.wait_for_unshard()  # else a prefetched gather would arrive after the weights have moved
            module.reshard()

    def gradients(self, loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the mean of all ranks' losses; the contents of `.grad` are kept.

        Raises:
            ValueError: gradients of another loss wait for their reduction, and would become part of these.
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
            with self._reduced():
                loss.backward()
            return [p.grad for p in parameters]
        finally:
            for p, grad in zip(parameters, kept, strict=True):
                p.grad = grad

    def leaves(self) -> list[Tensor] | None:
        """The gathered parameters, which a graph holds in place of the sharded ones; None where torch hides them."""
        groups = [group for module in self._modules for group in _groups(module)]
        if any(not hasattr(group, "fsdp_params") for group in groups):
            return None
        found = (getattr(p, "_unsharded_param", None) for group in groups for p in group.fsdp_params)
        return [leaf for leaf in found if leaf is not None]

    def recover(self, parameters: Sequence[Tensor]) -> None:
        """Reset FSDP2 after a forward or backward pass that was interrupted, where this version of torch can."""
        kept = [p.grad for p in parameters]
        for module in self._modules:
            if hasattr(module, "reset_iter_state") and getattr(module._get_fsdp_state(), "_is_root", False):
                module.reset_iter_state()
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad

    @contextmanager
    def _reduced(self) -> Generator[None]:
        """Reduce gradients also while a loop accumulates and has turned that off: a method needs each gradient."""
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
            context.is_last_backward = True  # else nobody would wait for the reductions
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
