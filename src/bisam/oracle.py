"""Oracle: the interface through which a method queries losses and gradients at displaced weights.

A method never accesses the model:

    >>> import torch
    >>> from bisam import ModelOracle, NegLog, cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
    >>> batch = torch.randn(8, 4), torch.randint(3, (8,))
    >>> g = oracle.query(batch, NegLog())                 # Evaluation at the weights w: losses, value, grad, outputs
    >>> h = oracle.query(batch, at=g.grad * 0.1)          # the training loss at w + e

A view of an oracle changes one of its properties:

    >>> noise = oracle.weights.random(torch.randn_like) * 0.01
    >>> smoothed = oracle.shifted(noise)                  # centred at w + noise
    >>> frozen = oracle.without_tracking()                # no query updates running statistics
    >>> part = oracle.within("perturb")                   # with its own state

`bisam.model.oracle` implements the oracle of a torch module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.objectives import Count, Objective, at_step
from bisam.seeded import Seeded
from bisam.vector import Vector


class Kept(NamedTuple):
    """A value that `Oracle.keep` stored in this process; a loaded checkpoint has a plain tuple in its place."""

    value: Any

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        # A copy may be sent to another process: it is checked there, as a loaded value is.
        return tuple, ((self.value,),)


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A query to an oracle: a loss and optionally its gradient, on a batch, at displaced weights.

    A query is a value that passes through all wrappers of an oracle. It is constant except for `at`, which the oracle
    removes with `take`, so that the memory of a displacement is free during the forward pass.

    Args:
        batch: a batch or a part of one.
        objective: objective to evaluate. Default: the training loss.
        at: displacement of the weights. Default: none, the query is at the weights. The query takes ownership: keep no
            other reference to it. For noise that is drawn from a seed (`bisam.seeded.Seeded`) no copy of the weights is
            kept: the noise is drawn again and subtracted, which restores them to a rounding.
        grad: whether to compute the gradient.
        track: whether to update running statistics. Default: only if `at` is None.
        wrt: for each tensor of the weights, whether the gradient with respect to it is computed; the gradient has
            structural zeros (`Vector.holes`) at the other tensors. No more is computed than that: layers below the
            lowest of these tensors are not back-propagated through. Exceptions: FSDP2 may gather more weights
            (`bisam.distributed.fsdp`), and each graph of `torch.compile` has one backward pass, for all of its weights.
            All ranks that share the batch ask for the same tensors. Default: all.
        buffers: values for `Oracle.buffers`, with which the model is run in eval mode: without dropout, and reading
            running statistics instead of updating them. Such a query never tracks. Default: the model runs in its
            present mode, with its own buffers.
        last: whether the method returns the answer as it is: no query follows in this step, and the gradient is that
            of the step. `SharpnessAware(..., overlap=True)` averages it over the replicas while it is computed.

    Example:
        >>> import torch
        >>> from bisam import ModelOracle, Query, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> oracle = ModelOracle(torch.nn.Linear(4, 3), cross_entropy)
        >>> batch = torch.randn(8, 4), torch.randint(3, (8,))
        >>> e = oracle.query(batch).gradient * 0.1
        >>> ahead, behind = oracle.ask([Query(batch, at=e), Query(batch, at=-e)])
        >>> bool(ahead.value > behind.value)
        True
        >>> oracle.query(batch, wrt=[False, True]).gradient.holes    # of the bias only
        frozenset({0})
    """

    batch: Batch
    objective: Objective | None = None
    at: Vector | Seeded | None = None
    grad: bool = True
    track: bool | None = None
    wrt: Sequence[bool] | None = None
    buffers: Sequence[Tensor] | None = None
    last: bool = False
    displaced: bool = field(init=False, repr=False)
    """Whether the query is at displaced weights; still valid after `take`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "displaced", self.at is not None)
        if self.wrt is not None:
            object.__setattr__(self, "wrt", tuple(map(bool, self.wrt)))

    @property
    def tracks(self) -> bool:
        """Whether the query updates running statistics."""
        if self.buffers is not None:
            return False
        return not self.displaced if self.track is None else self.track

    @property
    def differentiates(self) -> bool:
        """Whether the query needs the gradient with respect to any of the weights."""
        return self.grad and (self.wrt is None or any(self.wrt))

    def take(self) -> Vector | Seeded | None:
        """Returns the displacement and removes it from the query.

        Raises:
            RuntimeError: it was removed before.
        """
        at = self.at
        if at is None and self.displaced:
            raise RuntimeError("the displacement of this query was taken already: ask with a new Query")
        object.__setattr__(self, "at", None)
        return at


class Oracle(ABC):
    """A first-order oracle of a loss near fixed weights: all that a method can access.

    Attributes:
        weights: the point w that displacements are added to. Read-only.
        names: names of the parameters, in the order of `weights`.
        layers: class names of the modules that the parameters belong to, in the same order.
        parameters: the tensors that an optimizer holds, in the same order.
        buffers: running statistics and other buffers of the model, with their present values.
        loss: the training loss, which is the default objective of a query.
        step: number of losses that were computed before this one.
        draws: numbers that tell this call of a method from others in the same step, as those for the samples of
            `Tilted`. Noise that is drawn from a seed is a function of them too.
        is_local: whether an answer is computed on this rank's batch only. If parameters are sharded, or if the scope is
            "global", answers are means over the batches of all ranks.
        position: number of this rank among those that share a batch, as "0 of 2"; "0 of 1" if `is_local`.
        state: state of the method between steps (numbers, tensors, Vectors, in dicts, lists and tuples). It is saved
            and restored by `SharpnessAware.state_dict`. Replace its values, do not modify them in place: a step that
            fails restores the previous values, and so does a step whose gradient, or a new Vector, 0-dimensional tensor
            or float of the state, is not finite. Store numbers that change in each step as 0-dimensional tensors: a
            changed Python number, or a tensor of another shape, makes the step wait for the device. If not
            `is_local`, all ranks must have the same values; use `keep` and `kept` for a value that differs between
            ranks, such as a batch.

    Example:
        A method is a function of an oracle and a batch. This one is SAM with an L2 ball:

        >>> import torch
        >>> from bisam import SAM, Evaluation, Oracle, SharpnessAware, cross_entropy
        >>> def my_sam(oracle: Oracle, batch: tuple) -> Evaluation:
        ...     g = oracle.query(batch).gradient
        ...     return oracle.query(batch, at=g * (0.05 / g.norm()))
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> mine = SharpnessAware(model, my_sam, cross_entropy)(x, y)
        >>> torch.testing.assert_close(mine, SharpnessAware(model, SAM(0.05), cross_entropy)(x, y))
    """

    weights: Vector
    names: Sequence[str]
    layers: Sequence[str]
    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor] = ()
    loss: Objective
    step: int = 0
    draws: tuple[int, ...] = ()
    is_local: bool = True
    position: str = "0 of 1"
    state: dict[str, Any]

    @abstractmethod
    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """Returns the answers to queries that do not depend on each other, in their order.

        The only method that a subclass must implement. `ModelOracle` answers in series, the oracle of a pair of ranks
        in parallel.
        """

    def query(
        self,
        batch: Batch,
        objective: Objective | None = None,
        *,
        at: Vector | Seeded | None = None,
        grad: bool = True,
        track: bool | None = None,
        wrt: Sequence[bool] | None = None,
        last: bool = False,
    ) -> Evaluation:
        """Evaluates `objective` (default: the training loss) on `batch` at `weights + at`; arguments as `Query`."""
        queries = (Query(batch, objective, at, grad, track, wrt, last=last),)
        at = None  # this frame must not keep the displacement
        return self.ask(queries)[0]

    def averaged(self, value: Tensor, count: Count) -> tuple[Tensor, Count]:
        """Returns the value and count of this rank's answer, averaged over the ranks if the scope is global."""
        return value, count

    def gathered(self, values: Tensor) -> Tensor:
        """Returns values (n, ...) of the examples of all ranks that share a batch, one rank after the other.

        If `is_local` these are the values of this rank. Otherwise all ranks make the call together, and it waits for
        the device.
        """
        return values

    def over_ranks(self, values: Tensor) -> Tensor | None:
        """Returns the mean of values over all ranks that train the same weights, whatever the scope.

        For a state that must be the same on all of them. They make the call together. It is None if they do not wait
        for each other in this step, as in the contexts `no_sync()` and `join()` of DistributedDataParallel; replicas
        without such a wrapper are not known, and the values are those of this rank.
        """
        return values

    def agree(self, what: str, number: int) -> None:  # noqa: B027 - one rank agrees with itself
        """Checks that all ranks that share a batch have the same `number` of `what`.

        Raises:
            ValueError: the numbers differ, which would make the ranks wait for each other forever.
        """

    def next_part(self) -> None:  # noqa: B027 - an oracle without module state has nothing to do
        """Declares that the next queries are on another part of the batch, as those of the next micro-batch are.

        Queries on one part begin in the same state of the model (hidden states, averages); see
        `bisam.model.module_state`.
        """

    def check_inputs(self) -> None:  # noqa: B027 - an oracle without a forward pass has nothing to do
        """Checks that no query so far has changed its batch, before further queries on all parts of it.

        Without it, only the queries on one part are compared with each other.

        Raises:
            ValueError: a forward pass has changed a tensor of a batch in place.
        """

    def next_sample(self) -> None:  # noqa: B027 - only statistics have something to do
        """Declares that the next displacements are made of none of the gradients computed so far."""

    def keep(self, name: str, value: Any) -> None:
        """Stores a value of this rank alone in the state, such as its batch; see `kept`.

        Args:
            name: the key in `state`.
            value: numbers and tensors, in dicts, lists and tuples.
        """
        self.state[name] = {self.position: Kept(value)}

    def kept(self, name: str) -> Any:
        """Returns the value that `keep` stored on this rank, or None on all ranks if it is missing on any.

        It is missing before the first `keep`, and after loading a checkpoint that other ranks have saved. All ranks
        that share a batch call this method together; the call synchronises them unless this process stored the value.
        """
        entries = self.state.get(name)
        if isinstance(entries, tuple):  # the batch of SAMPa as bisam 0.1 saved it: that of the rank which saved
            entries = {"0 of 1": (entries,)}
        saved = None if entries is None else entries.get(self.position)
        if self.is_local or isinstance(saved, Kept):
            return None if saved is None else saved[0]
        missing = torch.tensor(float(saved is None), device=self.weights.tensors[0].device)
        anywhere = bool(self.averaged(missing, 1)[0] != 0)  # ranks must not differ in the queries that follow
        return None if anywhere or saved is None else saved[0]

    def shifted(self, by: Vector, *, track: bool = False) -> Oracle:
        """Returns the same oracle, centred at `weights + by` (random smoothing, loss landscapes).

        Args:
            by: the displacement.
            track: whether a query at the new centre updates running statistics, as one at the weights does.
        """
        return View(self, by=by, track=track)

    def without_tracking(self) -> Oracle:
        """Returns the same oracle, whose queries do not update running statistics: an earlier query has done so."""
        return View(self, never_track=True)

    def within(self, part: str, step: int | None = None, draw: int | None = None) -> Oracle:
        """Returns the same oracle for a part of a method, with its own state: two parts never share state.

        Args:
            part: name of the part, the key of its state.
            step: number of earlier calls of the part. Default: that of the whole method.
            draw: number that is added to `draws`, where parts are samples. Default: the same draws.
        """
        self.state[part] = own = dict(self.state.get(part, {}))  # a copy: see `state`
        return View(self, state=own, step=step, draws=None if draw is None else (*self.draws, draw))


class View(Oracle):
    """A view of another oracle, with another centre, other tracking of running statistics, or another state.

    To observe the queries of an oracle, override `ask` in a subclass.

    Args:
        oracle: the underlying oracle.
        by: displacement of the centre.
        track: whether queries at a displaced centre update running statistics.
        never_track: if True, no query updates running statistics.
        state: state of the method. Default: that of the underlying oracle.
        step: step counter. Default: that of the underlying oracle.
        draws: see `Oracle`. Default: those of the underlying oracle.
    """

    def __init__(
        self,
        oracle: Oracle,
        *,
        by: Vector | None = None,
        track: bool = False,
        never_track: bool = False,
        state: dict[str, Any] | None = None,
        step: int | None = None,
        draws: tuple[int, ...] | None = None,
    ) -> None:
        self._oracle, self._by, self._track, self._never_track = oracle, by, track, never_track
        self.state = oracle.state if state is None else state
        self.step = oracle.step if step is None else step
        self.draws = oracle.draws if draws is None else draws

    @property
    def below(self) -> Oracle:
        """The underlying oracle."""
        return self._oracle

    @property
    def weights(self) -> Vector:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Oracle`."""
        return self._oracle.weights if self._by is None else self._oracle.weights + self._by

    @property
    def names(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Oracle`."""
        return self._oracle.names

    @property
    def layers(self) -> Sequence[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Oracle`."""
        return self._oracle.layers

    @property
    def parameters(self) -> Sequence[Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Oracle`."""
        return self._oracle.parameters

    @property
    def buffers(self) -> Sequence[Tensor]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Oracle`."""
        return self._oracle.buffers

    @property
    def loss(self) -> Objective:  # pyright: ignore[reportIncompatibleMethodOverride]
        """See `Oracle`."""
        return self._oracle.loss

    @property
    def is_local(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Oracle`."""
        return self._oracle.is_local

    @property
    def position(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Oracle`."""
        return self._oracle.position

    def averaged(self, value: Tensor, count: Count) -> tuple[Tensor, Count]:
        """See `Oracle.averaged`."""
        return self._oracle.averaged(value, count)

    def gathered(self, values: Tensor) -> Tensor:
        """See `Oracle.gathered`."""
        return self._oracle.gathered(values)

    def over_ranks(self, values: Tensor) -> Tensor | None:
        """See `Oracle.over_ranks`."""
        return self._oracle.over_ranks(values)

    def agree(self, what: str, number: int) -> None:
        """See `Oracle.agree`."""
        self._oracle.agree(what, number)

    def next_part(self) -> None:
        """See `Oracle.next_part`."""
        self._oracle.next_part()

    def check_inputs(self) -> None:
        """See `Oracle.check_inputs`."""
        self._oracle.check_inputs()

    def next_sample(self) -> None:
        """See `Oracle.next_sample`."""
        self._oracle.next_sample()

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """See `Oracle.ask`."""
        return self._oracle.ask([self._seen_below(query) for query in queries])

    def _seen_below(self, query: Query) -> Query:
        """Translates a query for the underlying oracle; takes the displacement out of `query`."""
        if query.objective is not None and (objective := at_step(query.objective, self.step)) is not query.objective:
            query = replace(query, objective=objective, at=query.take())  # of the step of this part of the method
        if self._by is None and not self._never_track:
            return query
        track = False if self._never_track else query.track
        if track is None:
            # For the underlying oracle a query at this centre is displaced, so its default would be wrong.
            track = self._track and not query.displaced
        at = query.take()
        if self._by is not None:
            at = at.vector(self._by) if isinstance(at, Seeded) else at
            at = self._by if at is None else self._by + at
        return replace(query, at=at, track=track)
