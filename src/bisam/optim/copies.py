"""Copies: a step of any optimizer, taken on copies of its parameters and of its state.

It serves optimizers whose step has no closed form here:

    copies, twin = copied(optimizer, weights, gradients)
    take_step(twin)                                 # moves the copies and changes nothing else
"""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict
from collections.abc import Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.optim.optimizer as torch_optimizer
from torch import Tensor, nn
from torch.optim import Optimizer


def is_optimizer(value: object) -> bool:
    """Whether a value is an optimizer, or has the interface of one, as wrappers that are no `Optimizer` have."""
    kind = type(value)
    return isinstance(value, Optimizer) or (hasattr(value, "param_groups") and callable(getattr(kind, "step", None)))


def copied(
    optimizer: Optimizer, weights: Mapping[Tensor, Tensor], gradients: Mapping[Tensor, Tensor]
) -> tuple[dict[Tensor, Tensor], Optimizer]:
    """Returns copies of parameters, by their originals, and a copy of the optimizer that holds them.

    Parameters of the optimizer that are not among `weights` have no gradient and no state in the copy, and take no
    memory: one number stands for all their entries, so an operation that writes to them raises an error.

    Args:
        optimizer: the optimizer, which is read and not changed.
        weights: the values of parameters, as ordinary tensors or as DTensors. The copies take these tensors over.
        gradients: the gradients of some of them, which the copies take over.

    Raises:
        TypeError: an attribute of the optimizer cannot be copied.
    """
    copies: dict[Tensor, Tensor] = {}
    strangers: set[int] = set()
    with torch.no_grad():
        memo: dict[int, Any] = {}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            if p in weights:
                copies[p] = memo[id(p)] = nn.Parameter(weights[p], p.requires_grad)
                copies[p].grad = gradients.get(p)
            else:
                one = torch.zeros((), dtype=p.dtype, device=p.device)
                memo[id(p)] = nn.Parameter(one.expand(p.shape), requires_grad=False)
                strangers.add(id(p))
            memo[id(p)].__dict__.update(vars(p))  # marks that an optimizer reads, as `p.use_muon`
        return copies, _Copier(memo, strangers).optimizer(optimizer)


def take_step(optimizer: Optimizer) -> None:
    """Takes a step of a copied optimizer, without hooks; random generators are as before at the end.

    An error in the step is raised with a note.
    """
    step: Any = type(optimizer).step
    if getattr(step, "hooked", False):  # torch wraps the function in one that calls hooks and the profiler
        step = step.__wrapped__
    devices = {p.device for group in optimizer.param_groups for p in group["params"]}
    with _generators_kept(devices), _without_global_hooks(), torch.no_grad():
        try:
            step(optimizer)
        except Exception as error:
            error.add_note(f"next_step has taken a step of {type(optimizer).__name__} on copies, to know it in advance")
            raise


class _Copier:
    """Copies values deeply. An optimizer keeps all its attributes, which `copy.deepcopy` would reduce to its state.

    Args:
        memo: the copies of parameters by the identities of their originals.
        strangers: the identities of parameters whose state is left out.
    """

    def __init__(self, memo: dict[int, Any], strangers: set[int]) -> None:
        self._memo, self._strangers = memo, strangers
        self._identities = {number: id(value) for number, value in memo.items()}

    def optimizer(self, original: Any) -> Any:
        """Returns a copy without the hooks and the methods that were set on the instance, as schedulers do."""
        kind = type(original)
        twin = self._memo[id(original)] = object.__new__(kind)
        for name, value in vars(original).items():
            hooks = name.startswith("_optimizer_") and name.endswith("_hooks")
            if hooks or callable(getattr(kind, name, None)):
                continue
            try:
                vars(twin)[name] = self.value(value)
            except (TypeError, RuntimeError) as error:  # of copy.deepcopy
                raise TypeError(
                    f"next_step needs a copy of the {kind.__name__}, whose attribute {name!r} cannot be copied "
                    f"({error}): write the displacement of its step as a function (gradient, oracle) -> Vector"
                ) from error
        if isinstance(twin, Optimizer):
            Optimizer.__setstate__(twin, {})  # adds empty hooks
        return twin

    def value(self, value: Any) -> Any:
        """Returns a copy of a value; parameters are replaced by their copies."""
        if id(value) in self._memo:
            return self._memo[id(value)]
        if isinstance(value, Tensor):
            # Not copy.deepcopy, which copies the whole storage of a view, and the device mesh of a DTensor.
            new: Any = value.detach().clone()
            new = nn.Parameter(new, value.requires_grad) if isinstance(value, nn.Parameter) else new
        elif isinstance(value, dict):
            new = copy.copy(value)
            new.clear()
            self._memo[id(value)] = new
            for key, entry in value.items():
                identity = key if type(key) is int else id(key)  # some optimizers keep a state by id(parameter)
                if identity not in self._strangers:
                    new[self._identities.get(key, key) if type(key) is int else self.value(key)] = self.value(entry)
        elif type(value) is list:
            new = self._memo[id(value)] = []
            new.extend(map(self.value, value))
        elif type(value) is tuple:
            new = tuple(map(self.value, value))
        elif isinstance(value, torch.Generator):
            new = value.clone_state()
        elif isinstance(value, _external()):
            new = value
        elif is_optimizer(value):
            return self.optimizer(value)
        else:
            new = copy.deepcopy(value, self._memo)
        self._memo[id(value)] = new
        return new


def _external() -> tuple[type, ...]:
    """Returns the types of objects for communication, which copies share."""
    kinds = (
        getattr(dist, "ProcessGroup", None),
        getattr(sys.modules.get("torch.distributed.device_mesh"), "DeviceMesh", None),
    )
    return tuple(kind for kind in kinds if kind is not None)


@contextmanager
def _generators_kept(devices: Iterable[torch.device]) -> Generator[None]:
    """A context at whose end the generators of torch, Python and numpy are as before."""
    python, numpy = random.getstate(), sys.modules.get("numpy")
    arrays = None if numpy is None else numpy.random.get_state()
    others = [d for d in devices if d.type not in ("cpu", "meta")]
    with ExitStack() as stack:
        for kind in {d.type for d in others} or {"cuda"}:
            of_kind = [d for d in others if d.type == kind]
            stack.enter_context(torch.random.fork_rng(of_kind, device_type=kind))
        try:
            yield
        finally:
            random.setstate(python)
            if numpy is not None:
                numpy.random.set_state(arrays)


@contextmanager
def _without_global_hooks() -> Generator[None]:
    """A context without the hooks of all optimizers, which a step would call that calls the step of its base class."""
    before = torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks
    try:
        if any(before):
            torch_optimizer._global_optimizer_pre_hooks = OrderedDict()
            torch_optimizer._global_optimizer_post_hooks = OrderedDict()
        yield
    finally:
        torch_optimizer._global_optimizer_pre_hooks, torch_optimizer._global_optimizer_post_hooks = before
