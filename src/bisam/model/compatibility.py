"""Hosts: what a model may be wrapped in, and what is refused because it would fail silently or wait for ever."""

from __future__ import annotations

from typing import Any, cast

from torch import nn

from bisam.distributed.layout import fully_sharded_kind, sharded_kind
from bisam.validation import having


def check(sharp: nn.Module, method: Any, perturbation: str | None) -> None:
    """Make sure that the model of a loss is not wrapped in what would train it wrongly, not at all, or wait for ever.

    Raises:
        ValueError: with the remedy.
    """
    if isinstance(sharp, fully_sharded_kind()):
        raise ValueError("fully_shard the model, not the loss around it: SharpnessAware(fully_shard(model), ...)")
    if any(module is sharp for model in sharp.children() for module in model.modules()):
        raise ValueError(
            "the loss is a part of the model that it trains, SharpnessAware(self, ...): give the network a module of "
            "its own, self.sharp = SharpnessAware(self.network, ...)"
        )
    parameters = [p for p in sharp.parameters() if p.requires_grad]
    kinds = {base.__name__ for module in sharp.modules() for base in type(module).__mro__}
    if "FullyShardedDataParallel" in kinds:
        raise ValueError(
            "FullyShardedDataParallel (FSDP1) keeps parameters where no displacement reaches them: use its successor, "
            "torch.distributed.fsdp.fully_shard(model)"
        )
    if any(hasattr(p, "ds_id") for p in parameters):
        raise ValueError(
            "DeepSpeed ZeRO-3 takes parameters away between two passes, and gradients inside the backward pass: use "
            "torch.distributed.fsdp.fully_shard(model), or ZeRO stage 1 or 2"
        )
    wrappers = [module for module in sharp.modules() if hasattr(module, "reducer")]
    if any(getattr(module, "static_graph", False) for module in wrappers):
        raise ValueError(
            "DistributedDataParallel(static_graph=True) inside the loss would never average gradients: wrap the "
            "other way round, DistributedDataParallel(SharpnessAware(model, ...), static_graph=True)"
        )
    waits = any(getattr(module, "broadcast_buffers", False) and list(module.buffers()) for module in wrappers)
    if waits and perturbation != "global" and (name := having("decides", method)):
        raise ValueError(
            f"with {name} replicas may differ in their number of forward passes, and DistributedDataParallel inside "
            "the loss waits in each to broadcast buffers: use DistributedDataParallel(SharpnessAware(model, ...)), or "
            'perturbation="global", where replicas decide together'
        )
    gathers = fully_sharded_kind()
    fully = any(isinstance(module, gathers) for module in sharp.modules())
    sharded = [isinstance(p, sharded_kind()) for p in parameters]
    if fully and any(sharded) and not all(sharded):
        names = [name for name, p in sharp.named_parameters() if p.requires_grad and not isinstance(p, sharded_kind())]
        raise ValueError(
            f"{len(names)} trainable parameters are not sharded ({', '.join(names[:3])}), and nothing would average "
            "their gradients: fully_shard(model) last, around all of it, and fully_shard(loss) if the loss has "
            "parameters of its own; or freeze them"
        )
    contexts = [
        cast(Any, module)._get_fsdp_state()._state_ctx for module in sharp.modules() if isinstance(module, gathers)
    ]
    if any(getattr(context, "manual_backward_finalization", False) for context in contexts):
        raise ValueError(
            "set_manual_backward_finalization(True) keeps gradients back, and a method needs those of each query: "
            "leave it out"
        )
    if any(sharded) and fully and perturbation == "local":
        raise ValueError(
            'perturbation="local" needs the gradient of each rank\'s own batch, and FSDP2 reduces all gradients: use '
            'perturbation="global", or DistributedDataParallel'
        )
    if any(sharded) and not fully and perturbation == "global":
        raise ValueError(
            'perturbation="global" would average parameters that are different parts of one tensor (tensor '
            "parallelism): leave the argument out, or shard the model over the data-parallel ranks, fully_shard(model)"
        )
