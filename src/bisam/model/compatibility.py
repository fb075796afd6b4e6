"""Compatibility: refuses combinations that would train the model wrongly, not at all, or deadlock.

`RULES` is the table of these combinations, with one function for each. A rule returns the error message, or None if it
does not apply.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bisam.distributed.fsdp import finalizes_by_hand, fsdp_module_type
from bisam.distributed.layout import dtensor_type
from bisam.distributed.peers import world_size
from bisam.distributed.placement import Scope
from bisam.methods.method import data_dependent, follows_flips
from bisam.validation import shown


@dataclass(frozen=True)
class Setup:
    """The properties that the rules examine.

    Attributes:
        sharp: the loss around the model.
        method: the method of the loss.
        scope: the argument `scope` of the loss.
        overlap: the argument `overlap` of the loss.
    """

    sharp: nn.Module
    method: Any
    scope: Scope | None
    overlap: bool = False

    @cached_property
    def modules(self) -> list[nn.Module]:
        """All modules."""
        return list(self.sharp.modules())

    @cached_property
    def parameters(self) -> list[tuple[str, Tensor]]:
        """The trainable parameters, with their names."""
        return [(name, p) for name, p in self.sharp.named_parameters() if p.requires_grad]

    @cached_property
    def ddp_inside(self) -> list[nn.Module]:
        """The DistributedDataParallel wrappers inside the loss."""
        return [module for module in self.modules if hasattr(module, "reducer")]

    @cached_property
    def fsdp_modules(self) -> list[nn.Module]:
        """The modules to which FSDP2 was applied."""
        kind = fsdp_module_type()
        return [module for module in self.modules if isinstance(module, kind)]

    @cached_property
    def whole(self) -> list[str]:
        """The names of the trainable parameters that are not sharded."""
        return [name for name, p in self.parameters if not isinstance(p, dtensor_type())]

    @property
    def some_sharded(self) -> bool:
        """Whether some trainable parameter is sharded."""
        return len(self.whole) < len(self.parameters)


def fully_shard_around_the_loss(setup: Setup) -> str | None:
    """`fully_shard(SharpnessAware(...))`."""
    if not isinstance(setup.sharp, fsdp_module_type()):
        return None
    return "fully_shard the model, not the loss around it: SharpnessAware(fully_shard(model), ...)"


def loss_inside_its_own_model(setup: Setup) -> str | None:
    """`self.sharp = SharpnessAware(self, ...)`."""
    if not any(module is setup.sharp for model in setup.sharp.children() for module in model.modules()):
        return None
    return (
        "the loss is a part of the model that it trains, SharpnessAware(self, ...): give the network a module of "
        "its own, self.sharp = SharpnessAware(self.network, ...)"
    )


def fsdp1(setup: Setup) -> str | None:
    """`torch.distributed.fsdp.FullyShardedDataParallel`."""
    if not any(base.__name__ == "FullyShardedDataParallel" for m in setup.modules for base in type(m).__mro__):
        return None
    return (
        "FullyShardedDataParallel (FSDP1) flattens parameters, so that they cannot be displaced: use its successor, "
        "torch.distributed.fsdp.fully_shard(model)"
    )


def deepspeed_zero3(setup: Setup) -> str | None:
    """Parameters that DeepSpeed partitions."""
    if not any(hasattr(p, "ds_id") for _, p in setup.parameters):
        return None
    return (
        "DeepSpeed ZeRO-3 frees parameters between two passes, and gradients during the backward pass: use "
        "torch.distributed.fsdp.fully_shard(model), or ZeRO stage 1 or 2"
    )


def per_sample_gradients(setup: Setup) -> str | None:
    """`opacus.GradSampleModule` and other wrappers that compute the gradient of each example in hooks."""
    names = (base.__name__ for m in setup.modules for base in type(m).__mro__)
    found = next((name for name in names if "GradSampleModule" in name or "GradSampleHooks" in name), None)
    if found is None and not any(hasattr(p, "grad_sample") for _, p in setup.parameters):
        return None
    return (
        f"{found or 'a wrapper for per-sample gradients'} (differentially private training, as in Opacus) computes the "
        "gradient of each example in hooks of a backward pass, and the gradient of a sharpness-aware method is no sum "
        "of such gradients: the promised privacy would not hold. Train the model with one or the other"
    )


def uninitialised_parameters(setup: Setup) -> str | None:
    """Lazy modules, for example `torch.nn.LazyLinear`, before their first forward pass."""
    lazy = [name for name, p in setup.parameters if is_lazy(p)]
    if not lazy:
        return None
    return (
        f"{len(lazy)} parameters have no shape yet ({', '.join(lazy[:3])}): run a batch through the model before the "
        "optimizer and the first call, with torch.no_grad(): model(x)"
    )


def conjugated_parameters(setup: Setup) -> str | None:
    """`nn.Parameter(z.conj())`, whose values are computed when they are read."""
    lazy = [name for name, p in setup.parameters if p.is_conj() or p.is_neg()]
    if not lazy:
        return None
    return (
        f"{len(lazy)} parameters are conjugated lazily ({', '.join(lazy[:3])}) and cannot be changed in place: make "
        "them of z.conj().resolve_conj()"
    )


def ddp_static_graph_inside(setup: Setup) -> str | None:
    """`SharpnessAware(DistributedDataParallel(model, static_graph=True))`."""
    if not any(getattr(module, "static_graph", False) for module in setup.ddp_inside):
        return None
    return (
        "DistributedDataParallel(static_graph=True) inside the loss would never average gradients: wrap the "
        "other way round, DistributedDataParallel(SharpnessAware(model, ...), static_graph=True)"
    )


def overlap_without_ddp_inside(setup: Setup) -> str | None:
    """`overlap=True` where no DistributedDataParallel inside the loss averages gradients of this rank's batch."""
    if not setup.overlap or (setup.ddp_inside and setup.scope != "global"):
        return None
    return (
        "overlap=True lets the wrapper inside the loss average gradients while they are computed: use it with "
        'SharpnessAware(DistributedDataParallel(model), ...) and without scope="global", or leave it out'
    )


def overlap_with_unused_parameters(setup: Setup) -> str | None:
    """`overlap=True` with `DistributedDataParallel(model, find_unused_parameters=True)`."""
    if not setup.overlap or not any(getattr(module, "find_unused_parameters", False) for module in setup.ddp_inside):
        return None
    return (
        "with overlap=True, backward() stores gradients that are averaged already, and "
        "DistributedDataParallel(find_unused_parameters=True) would count their parameters as used in the next step: "
        "leave one of the two arguments out"
    )


def flip_rate_without_flips(setup: Setup) -> str | None:
    """A radius `FlipRate` in a method that does not compare the predictions at w and w + e."""
    if not follows_flips(setup.method, uncounted=True):
        return None
    return (
        f"a FlipRate follows the predictions that the ascent step flips, which SAM, BiSAM and ASAM count, alone or in "
        f"RSAM, Every and During, and other methods do not: use a number or another schedule as the radius in "
        f"{shown(setup.method)}"
    )


def data_dependent_method_with_sync_batchnorm(setup: Setup) -> str | None:
    """A method with a data-dependent number of forward passes, and layers that wait for all ranks in each pass."""
    waits = any(isinstance(m, nn.SyncBatchNorm) for m in setup.modules) and world_size() > 1
    name = data_dependent(setup.method) if waits and setup.scope != "global" and not setup.fsdp_modules else None
    if name is None:
        return None
    return (
        f"with {name} replicas may differ in their number of forward passes, and SyncBatchNorm waits in each for all "
        'replicas: use BatchNorm, or scope="global", where replicas decide together'
    )


def fsdp2_with_unsharded_parameters(setup: Setup) -> str | None:
    """A model in which FSDP2 shards some trainable parameters but not all."""
    if not (setup.fsdp_modules and setup.some_sharded and setup.whole):
        return None
    return (
        f"{len(setup.whole)} trainable parameters are not sharded ({', '.join(setup.whole[:3])}), and nothing would "
        "average their gradients: fully_shard(model) last, around all of it, and fully_shard(loss) if the loss has "
        "parameters of its own; or freeze them"
    )


def fsdp2_manual_backward_finalization(setup: Setup) -> str | None:
    """`set_manual_backward_finalization(True)`."""
    if not any(finalizes_by_hand(module) for module in setup.fsdp_modules):
        return None
    return (
        "set_manual_backward_finalization(True) keeps gradients back, and a method needs those of each query: "
        "leave it out"
    )


def fsdp2_with_local_scope(setup: Setup) -> str | None:
    """`scope="local"` under FSDP2."""
    if not (setup.some_sharded and setup.fsdp_modules and setup.scope == "local"):
        return None
    return (
        'scope="local" needs the gradient of each rank\'s own batch, and FSDP2 reduces all gradients: use '
        'scope="global", or DistributedDataParallel'
    )


def tensor_parallelism_with_global_scope(setup: Setup) -> str | None:
    """`scope="global"` under tensor parallelism without FSDP2."""
    if not (setup.some_sharded and not setup.fsdp_modules and setup.scope == "global"):
        return None
    return (
        'scope="global" would average parameters that are different parts of one tensor (tensor '
        "parallelism): leave the argument out, or shard the model over the data-parallel ranks, fully_shard(model)"
    )


RULES: tuple[Callable[[Setup], str | None], ...] = (
    fully_shard_around_the_loss,
    loss_inside_its_own_model,
    fsdp1,
    deepspeed_zero3,
    per_sample_gradients,
    uninitialised_parameters,
    conjugated_parameters,
    ddp_static_graph_inside,
    overlap_without_ddp_inside,
    overlap_with_unused_parameters,
    flip_rate_without_flips,
    data_dependent_method_with_sync_batchnorm,
    fsdp2_with_unsharded_parameters,
    fsdp2_manual_backward_finalization,
    fsdp2_with_local_scope,
    tensor_parallelism_with_global_scope,
)


def check(sharp: nn.Module, method: Any, scope: Scope | None, *, overlap: bool = False) -> None:
    """Checks that model, method, scope and overlap are not a combination in `RULES`.

    Raises:
        ValueError: they are; the message shows the remedy.
    """
    setup = Setup(sharp, method, scope, overlap)
    for rule in RULES:
        if message := rule(setup):
            raise ValueError(message)
