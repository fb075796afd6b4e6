"""State: saving, restoring and checking the state that a method keeps between steps.

A method writes numbers, tensors and Vectors into `oracle.state`. `save` converts each Vector to a list of tensors, so
that `torch.load(weights_only=True)` can read the file. `load` converts them back and checks that they belong to the
method and the model.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from itertools import zip_longest
from typing import Any, NoReturn, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import register_pytree_node, tree_flatten, tree_map_only, tree_unflatten

from bisam.distributed.layout import ShardedLayout, dtensor_type, local
from bisam.methods.method import stateful, unwrapped
from bisam.vector import WHOLE, Layout, Vector, finite, known

State = dict[str, Any]

_VECTOR, _TUPLE = "__vector__", "__tuple__"


class _NotAveraged(TypeError, AttributeError):
    """An error for code that calculates with each entry of a state dict; `hasattr` of an entry is still False."""


class ExtraState(OrderedDict[str, Any]):
    """The state of the method in a state dict, which is pickled as an OrderedDict.

    Averages of weights that take each entry of a state dict for a tensor get an error that shows the remedy.
    """

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("__"):
            raise AttributeError(name)
        self._refuse(name)

    def _refuse(self, *_: Any) -> NoReturn:
        raise _NotAveraged(
            "the state dict of SharpnessAware has an entry that is no tensor, the state of its method, and cannot be "
            "averaged: average the model itself, for example ModelEma(sharp.model) and ema.update(sharp.model)"
        )

    __mul__ = __rmul__ = __add__ = __radd__ = __sub__ = __rsub__ = _refuse


# As dictionaries are: whoever gathers or moves the tensors of a state dict finds those of the method.
register_pytree_node(
    ExtraState,
    lambda state: (list(state.values()), list(state)),
    lambda values, names: ExtraState(zip(names, values, strict=True)),
    serialized_type_name="bisam.state.ExtraState",
)


class StateError(ValueError):
    """The error of a method in the first step with a loaded state.

    Args:
        error: the error that the method raised.
        method: the method.
    """

    def __init__(self, error: Exception, method: Any) -> None:
        super().__init__(
            f"{kind(method)} failed in its first step with the state that was loaded "
            f"({type(error).__name__}: {error}): the state may be damaged, or another version of the method may have "
            "saved it. Then load the weights alone, sharp.model.load_state_dict(...), and begin with an empty state"
        )


def kind(method: Any) -> str:
    """Returns the names of the stateful classes in a method and their place in the nest, as `KSAM(method=LookSAM)`."""
    method = unwrapped(method)
    parts = {f.name: getattr(method, f.name) for f in fields(method)} if is_dataclass(method) else {}
    inner = ", ".join(f"{name}={kind(part)}" for name, part in parts.items() if stateful(part))
    name = getattr(method, "__qualname__", type(method).__name__)
    return f"{name}({inner})" if inner else name


def laid_out(state: State, layout: Layout = WHOLE) -> State:
    """Returns the same state with its Vectors in another layout: between steps the state holds no process groups."""
    return tree_map_only(Vector, lambda v: Vector(v.tensors, v.holes, layout), state)


def save(state: State, method: Any, layout: Layout = WHOLE) -> dict[str, Any]:
    """Returns the state of `method` in the form that is written to a file."""
    remembered = _without_empty(state if layout is WHOLE else laid_out(state, layout))
    return {"method": kind(method) if remembered else None, "state": _packed(remembered)}


def load(saved: dict[str, Any], method: Any, parameters: Sequence[nn.Parameter]) -> State:
    """Returns the state that was passed to `save`.

    Raises:
        ValueError: it belongs to another method or to another model.
    """
    if saved.get("method") and not saved["state"]:
        raise ValueError(
            f"the checkpoint has the memory of {saved['method']}, and none was loaded: torch.distributed.checkpoint "
            "loads into what is there; call bisam.integrations.checkpoint.make_room(sharp, checkpoint) before it"
        )
    if saved["state"] and (other := saved.get("method") or kind(method)) != kind(method):
        raise ValueError(
            f"the saved state is the memory of {other}, and the method here is {kind(method)}: give the loss the same "
            "method, or load the weights alone, sharp.model.load_state_dict(...), and begin with an empty memory"
        )
    return cast(State, _unpacked(saved["state"], parameters))


def check(state: State, weights: Vector) -> None:
    """Checks that a state belongs to these weights.

    Raises:
        ValueError: the trainable parameters have changed.
    """
    shapes = [w.shape for w in weights]
    for leaf in tree_flatten(state)[0]:
        if isinstance(leaf, Vector) and [t.shape for t in leaf.tensors] != shapes:
            raise ValueError(
                f"the method remembers {len(leaf)} parameters, and now {len(shapes)} are trained, or others: some were "
                "frozen, unfrozen or sharded since. Make a new SharpnessAware, which begins with an empty memory"
            )


def is_empty(state: State) -> bool:
    """Whether neither the method nor one of its parts has a state."""
    return not _without_empty(state)


def settled(
    new: State,
    old: State,
    gradient: Vector,
    overflow: Tensor | None = None,
    of_all_replicas: Callable[[Tensor], Tensor] | None = None,
) -> State:
    """Returns `new`, or `old` if the step is not finite: a running average would keep a NaN for good.

    A step is not finite if `gradient`, or a Vector, a 0-dimensional tensor or a float that the method wrote, has an
    entry that is not, or if a float16 gradient overflowed in a query. Other tensors of the state, such as a batch, may
    have such entries. All ranks that share the gradient decide together, and so do replicas whose gradients are
    averaged afterwards.

    It waits for the device only if the state changes in more than the values of tensors, as in the first steps. A step
    that wrote nothing costs nothing.

    Args:
        new: state after the step.
        old: state before the step.
        gradient: the gradient that the method returned.
        overflow: see `ModelOracle.overflow`.
        of_all_replicas: see `ModelOracle.of_all_replicas`; all replicas call this function with it, or none.
    """
    kept, before = _without_empty(new), _without_empty(old)
    written = list(_written(kept, before))
    if of_all_replicas is None and not (kept and written):
        return new
    flag = _finite(written, gradient, overflow)
    bad = (flag if of_all_replicas is None else of_all_replicas(flag)).isnan()
    if not (kept and written) or bad.is_meta:  # on the meta device there are no values, and so none that is not finite
        return new
    if (decided := known(bad)) is not None:
        return old if decided else new
    (after, structure), (before, other) = tree_flatten(kept), tree_flatten(before)
    if structure == other and all(_alike(a, b) for a, b in zip(after, before, strict=True)):
        return tree_unflatten([_chosen(bad, b, a) for a, b in zip(after, before, strict=True)], structure)
    return old if bool(bad) else new  # synchronises


def _written(new: Any, old: Any) -> Iterator[Any]:
    """Yields the leaves of `new` that are not those of `old` in the same place, and None where a place is gone."""
    if isinstance(new, dict):
        entries, others = cast(State, new), cast(State, old) if isinstance(old, dict) else {}
        pairs, gone = [(v, others.get(k, _NOTHING)) for k, v in entries.items()], others.keys() - entries.keys()
    elif isinstance(new, list | tuple):
        items, others = cast("Sequence[Any]", new), cast("Sequence[Any]", old) if isinstance(old, type(new)) else ()
        pairs, gone = zip_longest(items, others[: len(items)], fillvalue=_NOTHING), len(others) > len(items)
    else:
        pairs, gone = (), False
        if _identity(new) != _identity(old):
            yield new
    if gone:
        yield None
    for value, other in pairs:
        yield from _written(value, other)


_NOTHING = object()


def _finite(written: Sequence[Any], gradient: Vector, overflow: Tensor | None) -> Tensor:
    """Returns 0 if the step is finite, else NaN."""
    vectors = [leaf for leaf in written if isinstance(leaf, Vector) and _is_float(leaf.tensors[0])]
    flag = finite([gradient, *vectors])
    if overflow is not None:
        flag = flag + overflow
    for leaf in written:
        if isinstance(leaf, float) or (isinstance(leaf, Tensor) and leaf.dim() == 0 and _is_float(leaf)):
            flag = flag + leaf * 0
    return flag


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _identity(leaf: Any) -> int:
    return id(leaf.tensors) if isinstance(leaf, Vector) else id(leaf)  # `laid_out` makes new Vectors of the same list


def _alike(a: Any, b: Any) -> bool:
    if isinstance(a, Vector) and isinstance(b, Vector):
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and a.dtype == b.dtype and a.device == b.device
    plain = int | float | str | bytes | None  # `==` of other types, such as arrays, may not return a bool
    return a is b or (isinstance(a, plain) and type(a) is type(b) and a == b)


def _chosen(condition: Tensor, yes: Any, no: Any) -> Any:
    if _identity(yes) == _identity(no):
        return no
    if isinstance(no, Vector):
        tensors = [cast(Tensor, _chosen(condition, a, b)) for a, b in zip(yes.tensors, no.tensors, strict=True)]
        return no.like(tensors, yes.holes & no.holes)
    return torch.where(condition.to(no.device), yes, no) if isinstance(no, Tensor) else no


def _without_empty(state: State) -> State:
    """Removes the parts of the method that have no state."""
    parts = {k: _without_empty(cast(State, v)) if isinstance(v, dict) else v for k, v in state.items()}
    return {k: v for k, v in parts.items() if not (isinstance(v, dict) and not v)}


def _packed(state: Any) -> Any:
    if isinstance(state, Vector):
        tensors = [state.layout.wrapped(i, _compact(t)) for i, t in enumerate(state.tensors)]
        return {_VECTOR: tensors, "holes": sorted(state.holes)}
    if isinstance(state, Tensor):
        return _compact(state)
    if isinstance(state, dict):
        return {k: _packed(v) for k, v in cast(State, state).items()}
    if isinstance(state, list | tuple):
        items = [_packed(v) for v in cast("list[Any]", state)]
        return items if isinstance(state, list) else {_TUPLE: items}
    return state


def _compact(tensor: Tensor) -> Tensor:
    """Copies a tensor that is a view of a storage of another size.

    `torch.save` writes a larger storage as a whole. Expanded zeros have a smaller one, and a checkpoint that is loaded
    in place needs memory for each entry.
    """
    return tensor.clone() if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


def _unpacked(state: Any, parameters: Sequence[nn.Parameter]) -> Any:
    # Copies, as torch does for the state of a module: the caller may still use the dictionary.
    if isinstance(state, Tensor):
        return state.to(parameters[0].device, copy=True)
    if isinstance(state, list):
        return [_unpacked(v, parameters) for v in cast("list[Any]", state)]
    if not isinstance(state, dict):
        return state
    entries = cast(State, state)
    if _TUPLE in entries:
        return tuple(_unpacked(v, parameters) for v in entries[_TUPLE])
    if _VECTOR not in entries:
        return {k: _unpacked(v, parameters) for k, v in entries.items()}
    tensors: list[Tensor] = entries[_VECTOR]
    if [t.shape for t in tensors] != [p.shape for p in parameters]:
        raise ValueError(
            f"the saved state of the method has {len(tensors)} tensors, and the model {len(parameters)} trainable "
            "parameters of other shapes: it was saved with another model, or with other parameters frozen"
        )
    shards = ShardedLayout.of(parameters)
    parts = [_here(i, t, p, shards) for i, (t, p) in enumerate(zip(tensors, parameters, strict=True))]
    moved = [torch.empty_like(local(p.data), dtype=t.dtype).copy_(t) for t, p in zip(parts, parameters, strict=True)]
    return Vector(moved, frozenset(cast("list[int]", entries["holes"])))


def _here(i: int, tensor: Any, parameter: Any, shards: ShardedLayout | None) -> Tensor:
    """Returns this rank's part of a saved tensor, also if it was saved with another sharding."""
    if isinstance(tensor, dtensor_type()):
        alike = (tensor.device_mesh, tensor.placements) == (
            getattr(parameter, "device_mesh", None),
            getattr(parameter, "placements", None),
        )
        if alike:
            return local(tensor)
        tensor = tensor.full_tensor()
    return tensor if shards is None else shards.part(i, tensor.to(parameter.device))
