"""Module state: saves and restores the tensors that forward passes change besides the trainable weights.

A step runs a model several times, and the model must end as after one pass. The state of a module is each tensor that
it holds and that is not trainable: buffers, frozen parameters and plain attributes. It may be changed in place,
assigned (`module.x = ...`), given other memory (`x.data = ...`), created or deleted. The contract:

    a pass that tracks        begins in the present state; the state that it leaves stays
    any other pass            begins where the last tracking pass of this part of the batch began, or in the present
                              state if there was none; the present state is restored after it
    a pass that fails         restores the state from before the step
    an initialisation         what a layer does in the first pass of training only happens once, at the weights; all
                              later passes see it

A forward pass usually changes few tensors. The first pass of the steps 1, 2, 4, 8, ... finds them by contents, all
other passes by identity and version; only those, and small buffers, are copied. Frozen parameters and attributes that
are together larger than the trainable weights are not copied even in these steps, so that a large frozen model is never
doubled.

Lists, counters, metrics and other objects are not restored: see `bisam.displaced`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Iterator, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from bisam.distributed.layout import dtensor_type
from bisam.vector import Tensors, clone

Kind = Literal["buffer", "frozen", "attribute"]

Key = tuple[int, str, str]
"""A tensor of a module: the identity of the module, the kind, and the name."""

_ABSENT = object()

_RUNNING = frozenset(
    {
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
    }
)
"""Classes that do not read their running statistics in the passes that update them: they need not be rewound."""


class Place(NamedTuple):
    """A part of a module that holds tensors.

    Attributes:
        module: the module.
        kind: what the tensors are.
        entries: the dictionary of the module that holds them.
    """

    module: nn.Module
    kind: Kind
    entries: MutableMapping[str, Any]

    def held(self) -> Iterator[tuple[str, Tensor | None]]:
        """Yields the names and tensors that belong to the state; a buffer may be None."""
        if self.kind == "buffer":
            yield from list(self.entries.items())
        elif self.kind == "frozen":
            kind = dtensor_type()  # FSDP2 replaces its parameters during a pass
            for name, p in list(self.entries.items()):
                if p is not None and not p.requires_grad and not isinstance(p, kind):
                    yield name, p
        else:
            yield from [(name, value) for name, value in self.entries.items() if isinstance(value, Tensor)]

    def get(self, name: str) -> Any:
        """Returns the value of a name, or a marker if there is none."""
        return self.entries.get(name, _ABSENT)

    def put(self, name: str, value: Any) -> None:
        """Sets the value of a name, or removes it."""
        if value is _ABSENT:
            self.entries.pop(name, None)
        else:
            self.entries[name] = value


class ScriptEntries(MutableMapping[str, Any]):
    """Buffers or parameters of a module of TorchScript, whose own mapping has not all operations of a dictionary."""

    def __init__(self, module: torch.jit.ScriptModule, entries: Any) -> None:
        self._module, self._entries = module, entries

    def __getitem__(self, name: str) -> Any:
        return dict(self._entries.items())[name]

    def __setitem__(self, name: str, value: Any) -> None:
        setattr(self._module, name, value)

    def __delitem__(self, name: str) -> None:
        raise NotImplementedError("TorchScript has no operation to remove an attribute")

    def __iter__(self) -> Iterator[str]:
        return iter([name for name, _ in self._entries.items()])

    def __len__(self) -> int:
        return len(self._entries)


class Saved(NamedTuple):
    """A state: for each tensor the object, and copies of contents, in groups of one type."""

    values: dict[Key, Any]
    copies: list[tuple[list[Key], list[Tensor], Tensors]]

    def only(self, keys: Collection[Key]) -> Saved:
        """Returns the part of the state that belongs to these keys."""
        copies: list[tuple[list[Key], list[Tensor], Tensors]] = []
        for names, tensors, contents in self.copies:
            chosen = [i for i, name in enumerate(names) if name in keys]
            copies.append(([names[i] for i in chosen], [tensors[i] for i in chosen], [contents[i] for i in chosen]))
        return Saved({k: v for k, v in self.values.items() if k in keys}, [group for group in copies if group[0]])


_NOTHING = Saved({}, [])


@dataclass
class Mover:
    """A tensor that forward passes change.

    Attributes:
        module: the module that holds it.
        in_place: whether its contents change; if not, passes only assign another tensor.
    """

    module: nn.Module
    in_place: bool


@dataclass
class Known:
    """Facts about a model that earlier steps have found out; one object for each loss.

    Attributes:
        moving: the tensors that forward passes change.
        steps: number of steps so far.
        budget: bytes of frozen parameters and attributes that may be copied to find out what moves: those of the
            trainable weights.
    """

    moving: dict[Key, Mover] = field(default_factory=dict[Key, Mover])
    steps: int = 0
    budget: int = 0

    @property
    def thorough(self) -> bool:
        """Whether the next step compares contents."""
        return (self.steps + 1) & self.steps == 0

    @property
    def with_attributes(self) -> set[int]:
        """The identities of the modules with attributes that forward passes change."""
        return {key[0] for key in self.moving if key[1] == "attribute"}


class _Unmoved(NamedTuple):
    """A tensor that no pass was seen to change, as it was when the step began."""

    key: Key
    entries: MutableMapping[str, Any]
    name: str
    value: Tensor | None
    version: int


class ModuleState:
    """The state of a model and its loss during one step.

    Args:
        places: the places of the state.
        known: facts that earlier steps have found out.
        weight: a trainable parameter.
    """

    def __init__(self, places: Iterable[Place], known: Known | None = None, weight: nn.Parameter | None = None) -> None:
        self._places = {(id(place.module), place.kind): place for place in places}
        self._known, self._weight = known or Known(), weight
        self._before: Saved | None = None
        self._unmoved: list[_Unmoved] = []
        self._assigned: list[tuple[Key, Any, int]] = []  # tensors that passes assign and were not seen to change
        self._sizes: list[tuple[Place, int, dict[str, Any]]] = []
        self._thorough = False  # whether the next comparison is one of contents
        self._looked = False
        self._start: Saved | None = None  # where the present pass has begun
        self._saw: Saved | None = None  # where the last tracking pass has begun
        self._kept = frozenset[Key]()  # initialised by the present pass

    @property
    def buffers(self) -> list[Tensor]:
        """The present buffers."""
        buffers = [b for place in self._places.values() if place.kind == "buffer" for _, b in place.held()]
        return [b for b in buffers if b is not None]

    def write_buffers(self, contents: Sequence[Tensor]) -> None:
        """Copies contents into the present buffers, in their order."""
        if present := self.buffers:
            _write(present, list(contents))

    @property
    def moved_parameters(self) -> list[str]:
        """The frozen parameters that passes change, by class and name."""
        found = [(key, mover) for key, mover in self._known.moving.items() if key[1] == "frozen"]
        return sorted(f"{type(mover.module).__name__}.{key[2]}" for key, mover in found)

    @property
    def read(self) -> set[Key]:
        """The tensors that move, without running statistics that no pass reads."""
        return {key for key in self._known.moving if self._is_read(key)}

    @property
    def changed(self) -> bool:
        """Whether a tensor that passes read is another one, or has other contents, than before the step.

        Not whether it was written: DistributedDataParallel writes the buffers of the first rank into those of others.
        """
        if self._before is None:
            return False
        read, before = self.read, self._before.only(self.read)
        compared = {key for keys, _, _ in before.copies for key in keys}
        if any(self._places[k[:2]].get(k[2]) is not v for k, v in before.values.items()) or read - compared:
            return True
        return any(not _equal(t, c) for _, ts, cs in before.copies for t, c in zip(ts, cs, strict=True))

    def begin(self) -> None:
        """Saves the state before the step, once; call it before anything changes the state."""
        if self._before is not None:
            return
        if not self._places:
            self._before = _NOTHING
            return
        moving, thorough = self._known.moving, self._known.thorough
        values: dict[Key, Any] = {}
        unmoved: list[_Unmoved] = []
        for where, place in self._places.items():
            for name, value in place.held():
                values[key := (*where, name)] = value
                if key not in moving:
                    unmoved.append(_Unmoved(key, place.entries, name, value, _version(value)))
            self._sizes.append((place, len(place.entries), dict(place.entries) if place.kind == "attribute" else {}))
        values |= {key: value for key, value in self._moving() if key not in values}
        copied = self._affordable(values) if thorough else [*self._copied(values), *_small(unmoved, self._known.budget)]
        self._watch(values)
        self._unmoved, self._thorough = unmoved, thorough
        self._before = Saved(values, _copies(values, copied))

    def next_part(self) -> None:
        """Declares that the next passes are on another part of the batch: they begin in the present state."""
        self._saw = None

    def enter(self, track: bool) -> None:
        """Prepares a pass."""
        first = self._before is None
        self.begin()
        if not self._places:
            return
        if first:
            self._start = self._before
        elif self._thorough:  # the state has changed since by other means than a pass, and nothing is known of passes
            values = {(*where, name): value for where, place in self._places.items() for name, value in place.held()}
            self._start = Saved(values, _copies(values, self._affordable(values)))
        else:
            self._start = self.present()
        if not track and self._saw is not None:
            self.restore(self._saw)

    def leave(self, track: bool, *, evaluates: bool = False) -> None:
        """Ends a pass: keeps its state if it tracks, else restores the present one.

        A pass in eval mode (`evaluates`) changes less than the others: it does not decide what moves.
        """
        if not self._places:
            return
        changed = self.look(compare=not evaluates)
        start, self._start = self._start, None
        if start is None:
            return
        kept, self._kept = self._kept, frozenset()
        if track:
            self._seal()
            read = self.read - kept
            self._saw = start.only(read) if read else None
        else:
            all_moving = start is not self._before and not kept
            self.restore(start if all_moving else start.only(self._known.moving.keys() - kept))
            if changed:
                self._warn(changed, start)

    def again(self) -> None:
        """Returns to the beginning of the present pass."""
        self.look()
        for saved in (self._start, self._saw):
            if saved is not None:
                self.restore(saved.only(self._known.moving.keys()))

    def rollback(self) -> None:
        """Restores the state from before the step; also after an interruption at any moment, and more than once."""
        if self._before is not None:
            self.look()
            self.restore(self._before.only(self._known.moving.keys()))

    def look(self, *, compare: bool = True) -> set[Key]:
        """Finds the tensors that have moved since the step began, which are restored from now on, and returns them.

        Args:
            compare: whether to compare contents, if this is a step that does.
        """
        before = self._before
        if before is None or not self._places:
            return set()
        if not self._looked:
            self._looked = True
            self._known.steps += 1
        new = {key: _version(value) != version for key, value, version in self._assigned if _version(value) != version}
        for u in self._unmoved:
            changed = _version(u.value) != u.version
            if changed or u.name not in u.entries or u.entries[u.name] is not u.value:
                new[u.key] = changed
        for place, size, entries in self._sizes:
            if place.kind == "attribute" or len(place.entries) != size:
                for name, _ in place.held():
                    key = (id(place.module), place.kind, name)
                    if key not in before.values:
                        before.values[key] = entries.get(name, _ABSENT)
                        new[key] = False
        if self._thorough and compare:
            self._thorough = False
            for keys, tensors, contents in before.copies:
                new |= {k: True for k, t, c in zip(keys, tensors, contents, strict=True) if not _equal(t, c)}
        for key, in_place in new.items():
            mover = self._known.moving.setdefault(key, Mover(self._places[key[:2]].module, key[1] == "buffer"))
            mover.in_place |= in_place
        if new:
            self._unmoved = [u for u in self._unmoved if u.key not in new]
            self._assigned = [a for a in self._assigned if a[0] not in new]
            if self._start is not None and self._start is not before:
                self._start.values.update({key: before.values[key] for key in new if key not in self._start.values})
            before.copies[:] = before.only(self._copied(before.values)).copies
        return {key for key, in_place in new.items() if in_place}

    def once(self, keys: Collection[Key], again: Saved) -> set[Key]:
        """Returns those of `keys` that have not moved since `again` was saved."""
        kept = again.only(keys)
        same = {key for key, value in kept.values.items() if self._places[key[:2]].get(key[2]) is value}
        for names, tensors, contents in kept.copies:
            same -= {k for k, t, c in zip(names, tensors, contents, strict=True) if not _equal(t, c)}
        return same

    def present(self) -> Saved:
        """Returns a copy of the moving part of the present state."""
        values = dict(self._moving())
        self._watch(values)
        return Saved(values, _copies(values, self._copied(values)))

    def restore(self, saved: Saved) -> None:
        """Restores a saved state."""
        for key, value in saved.values.items():
            place = self._places[key[:2]]
            if place.get(key[2]) is not value:
                place.put(key[2], value)
        for _, tensors, contents in saved.copies:
            _write(tensors, contents)

    def modules(self, keys: Iterable[Key]) -> set[nn.Module]:
        """Returns the modules that these tensors belong to."""
        return {self._places[key[:2]].module for key in keys}

    def keep(self, modules: Collection[nn.Module]) -> None:
        """Declares that the present pass has initialised these modules, and that every pass sees what it leaves."""
        owners = {id(module) for module in modules}
        self._kept |= {key for key in self._known.moving if key[0] in owners}

    def _is_read(self, key: Key) -> bool:
        return key[1] != "buffer" or type(self._known.moving[key].module) not in _RUNNING

    def _moving(self) -> Iterator[tuple[Key, Any]]:
        for key in self._known.moving:
            if place := self._places.get(key[:2]):
                value = place.get(key[2])
                if key[1] != "frozen" or not getattr(value, "requires_grad", False):  # it may be trained since
                    yield key, value

    def _watch(self, values: dict[Key, Any]) -> None:
        self._assigned = [
            (key, values[key], _version(values[key]))
            for key, mover in self._known.moving.items()
            if not mover.in_place and isinstance(values.get(key), Tensor)
        ]

    def _copied(self, values: dict[Key, Any]) -> list[Key]:
        """Returns the keys of the tensors that must be copied: an assigned tensor need not be."""
        return [key for key, mover in self._known.moving.items() if mover.in_place and key in values]

    def _warn(self, changed: set[Key], start: Saved) -> None:
        """Warns of tensors that a pass whose state is not kept has changed in place before they were copied."""
        copied = {key for keys, _, _ in start.copies for key in keys}
        if lost := sorted(key[2] for key in changed - copied if self._is_read(key)):
            warnings.warn(
                f"a forward pass changed {', '.join(lost[:3])} in place for the first time, in a pass that is to be "
                "undone, when no copy existed: the new value stays in this step, and is restored from now on",
                stacklevel=2,
            )

    def _seal(self) -> None:
        """Cuts the graphs of tensors that the pass has assigned: their memory is freed, and using them is an error."""
        for key, value in list(self._moving()):
            if isinstance(value, Tensor) and value.grad_fn is not None and self._weight is not None:
                place = self._places[key[:2]]
                where = f"the attribute {key[2]} of {type(place.module).__name__}"
                with torch.enable_grad():
                    place.put(key[2], _Sealed.apply(value.detach(), where, self._weight))

    def _affordable(self, values: dict[Key, Any]) -> list[Key]:
        """Returns what is copied to find out what moves: all buffers, and what the budget allows of other tensors."""
        copied = dict.fromkeys([*self._copied(values), *(key for key in values if key[1] == "buffer")])
        others = [key for key, t in values.items() if key not in copied and type(t) in (Tensor, nn.Parameter)]
        left, counted = self._known.budget, set[int]()
        for key in sorted(others, key=lambda key: values[key].nbytes):
            tensor = values[key]
            left -= 0 if tensor.is_meta or id(tensor) in counted else tensor.nbytes
            if left < 0:
                break
            counted.add(id(tensor))
            copied[key] = None
        return list(copied)


def _small(unmoved: Sequence[_Unmoved], budget: int) -> list[Key]:
    """Returns the buffers among tensors that do not move, if a copy of them costs little beside that of the weights."""
    buffers = [u for u in unmoved if u.key[1] == "buffer" and u.value is not None]
    return [u.key for u in buffers] if 16 * sum([cast(Tensor, u.value).nbytes for u in buffers]) <= budget else []


class _Sealed(torch.autograd.Function):
    """A value whose graph is gone. Its backward pass, on each way to a weight, explains why there is no gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, where: str, weight: Tensor) -> Tensor:
        ctx.where = where
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise RuntimeError(
            f"{ctx.where} was computed in a query at the weights, whose graph is gone: a method runs several queries "
            "per step, and the gradient is that of the query at displaced weights. Let `forward` return the tensor "
            "with the outputs and add it in `loss`, so that each pass has its own; detach a state that is carried from "
            "batch to batch"
        )


def _version(value: Tensor | None) -> int:
    if value is None or value.is_inference():
        return 0
    return value._version


def _equal(tensor: Tensor, content: Tensor) -> bool:
    # Tensors of other types, for example quantised ones, may not be comparable.
    if tensor.shape != content.shape or tensor.dtype != content.dtype:
        return False
    try:
        return torch.equal(tensor, content)
    except (RuntimeError, NotImplementedError):
        return True


def _copies(values: dict[Key, Any], keys: Collection[Key]) -> list[tuple[list[Key], list[Tensor], Tensors]]:
    groups: dict[torch.dtype, tuple[list[Key], list[Tensor]]] = {}
    for key in keys:
        if isinstance(tensor := values[key], Tensor):
            names, tensors = groups.setdefault(tensor.dtype, ([], []))
            names.append(key)
            tensors.append(tensor)
    # .data: the graph of another loss may hold the tensors, and would detect an in-place change.
    return [(names, tensors, clone([t.data for t in tensors])) for names, tensors in groups.values()]


def _write(tensors: Tensors, contents: Tensors) -> None:
    targets = [t.data for t in tensors]  # now, not when they were saved: a layer may have assigned `tensor.data`
    alike = all(t.shape == c.shape and t.dtype == c.dtype for t, c in zip(targets, contents, strict=True))
    if alike and not any(0 in t.stride() for t in targets if t.layout is torch.strided):
        torch._foreach_copy_(targets, contents)
        return
    for tensor, target, content in zip(tensors, targets, contents, strict=True):
        if target.shape != content.shape or target.dtype != content.dtype:
            tensor.data = content.clone()
            continue
        for d, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
            if size > 1 and stride == 0:  # all entries along this dimension are one
                target, content = target.narrow(d, 0, 1), content.narrow(d, 0, 1)
        target.copy_(content)
