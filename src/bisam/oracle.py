"""Oracle: what a sharpness-aware method may ask, and the same oracle seen from elsewhere.

A method queries losses and their gradient at displaced weights, and never meets the model:

    g = oracle.query(batch, NegLog())                 # Evaluation at the weights w: losses, value, grad, outputs
    h = oracle.query(batch, at=g.grad * 0.1)          # the training loss at w + e

    oracle.shifted(noise)                             # centred at w + noise
    oracle.without_tracking()                         # where no query moves running statistics
    oracle.within("perturb")                          # with a state of its own

`bisam.model.oracle` has the oracle of a torch module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from bisam.evaluation import Batch, Evaluation
from bisam.objectives import Count, Objective
from bisam.vector import Vector


@dataclass(frozen=True, slots=True, eq=False)
class Query:
    """A question to an oracle: a loss and, if wanted, its gradient, on a batch at displaced weights.

    A value that passes through every wrapper. It is constant but for `at`, which the oracle takes out (`take`), so that
    a displacement's memory is free during the forward pass.

    Args:
        batch: a batch, whole or a part of it.
        objective: what to evaluate; None is the training loss.
        at: displacement of the weights; None is the weights themselves. It is given away: do not keep it.
        grad: whether the gradient is wanted.
        track: whether running statistics move; None: exactly when `at` is None.
    """

    batch: Batch
    objective: Objective | None = None
    at: Vector | None = None
    grad: bool = True
    track: bool | None = None
    displaced: bool = field(init=False, repr=False)
    """Whether the query is at displaced weights; known also after `take`."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "displaced", self.at is not None)

    @property
    def tracks(self) -> bool:
        """Whether running statistics move."""
        return not self.displaced if self.track is None else self.track

    def take(self) -> Vector | None:
        """The displacement, which the query lets go of.

        Raises:
            RuntimeError: it was taken before.
        """
        at = self.at
        if at is None and self.displaced:
            raise RuntimeError("the displacement of this query was taken already: ask with a new Query")
        object.__setattr__(self, "at", None)
        return at


class Oracle(ABC):
    """A first-order oracle of a loss around fixed weights: the whole world of a method.

    Attributes:
        weights: the point w that displacements are added to. Read-only.
        names: the parameters' names, in the order of `weights`.
        layers: the class names of the modules they belong to, in that order.
        parameters: the tensors that an optimizer holds, in that order.
        buffers: running statistics and what else a model keeps beside its parameters, as they are now.
        loss: the training loss, which is what a query evaluates unless told otherwise.
        step: number of losses computed before this one.
        is_local: whether a query is answered for its batch alone. Where parameters are sharded, or the scope is
            "global", answers are means over the batches of all ranks.
        state: what the method remembers between steps (numbers, tensors, Vectors, in dicts, lists and tuples); saved
            and restored by `SharpnessAware.state_dict`. Replace values, do not change them in place: a step that fails
            leaves what was there.
    """

    weights: Vector
    names: Sequence[str]
    layers: Sequence[str]
    parameters: Sequence[Tensor]
    buffers: Sequence[Tensor] = ()
    loss: Objective
    step: int = 0
    is_local: bool = True
    state: dict[str, Any]

    @abstractmethod
    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """Answers to queries that do not depend on each other, in their order.

        This is the one method that a subclass overrides: in series here, in parallel in the oracle of a pair of ranks.
        """

    def query(
        self,
        batch: Batch,
        objective: Objective | None = None,
        *,
        at: Vector | None = None,
        grad: bool = True,
        track: bool | None = None,
    ) -> Evaluation:
        """Evaluate `objective` (default: the training loss) on `batch` at `weights + at`; arguments as `Query`."""
        queries, at = (Query(batch, objective, at, grad, track),), None  # this frame must not hold the displacement
        return self.ask(queries)[0]

    def averaged(self, value: Tensor, count: Count) -> tuple[Tensor, Count]:
        """The value and count of answers for this rank's batch as those of the batches that it is a part of."""
        return value, count

    def agree(self, what: str, number: int) -> None:  # noqa: B027 - one rank agrees with itself
        """Make sure that all ranks whose batches are the parts of one have the same `number` of `what`.

        Raises:
            ValueError: they do not, and would wait for each other for ever.
        """

    def shifted(self, by: Vector, *, track: bool = False) -> Oracle:
        """The same oracle, centred at `weights + by` (random smoothing, landscapes).

        Args:
            by: the displacement.
            track: whether a query at the new centre moves running statistics, as one at the weights does.
        """
        return View(self, by=by, track=track)

    def without_tracking(self) -> Oracle:
        """The same oracle, where no query moves running statistics, because they have moved already."""
        return View(self, never_track=True)

    def within(self, part: str, step: int | None = None) -> Oracle:
        """The same oracle for a part of a method, with a state of its own: two parts never share what they remember.

        Args:
            part: the name of the part, under which its state is kept.
            step: how often the part was called before; by default as often as the whole.
        """
        self.state[part] = own = dict(self.state.get(part, {}))  # a copy: see `state`
        return View(self, state=own, step=step)


class View(Oracle):
    """Another oracle with another centre, other statistics or another state.

    To watch an oracle, override `ask` in a subclass.

    Args:
        oracle: the one below.
        by: displacement of the centre.
        track: whether queries at a displaced centre move running statistics.
        never_track: whether no query moves running statistics.
        state: what the method remembers, by default that of the oracle below.
        step: by default that of the oracle below.
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
    ) -> None:
        self._oracle, self._by, self._track, self._never_track = oracle, by, track, never_track
        self.state = oracle.state if state is None else state
        self.step = oracle.step if step is None else step

    @property
    def below(self) -> Oracle:
        """The oracle that this is a view of."""
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

    def averaged(self, value: Tensor, count: Count) -> tuple[Tensor, Count]:
        """See `Oracle.averaged`."""
        return self._oracle.averaged(value, count)

    def agree(self, what: str, number: int) -> None:
        """See `Oracle.agree`."""
        self._oracle.agree(what, number)

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """See `Oracle.ask`."""
        return self._oracle.ask([self._seen_below(query) for query in queries])

    def _seen_below(self, query: Query) -> Query:
        """The query as the oracle below understands it; takes the displacement out of `query`."""
        if self._by is None and not self._never_track:
            return query
        track = query.track
        if self._never_track:
            track = False
        elif track is None and self._by is not None:
            # To the oracle below, a query at this centre is one somewhere else: what that means is decided here.
            track = self._track and not query.displaced
        at = query.take()
        if self._by is not None:
            at = self._by if at is None else self._by + at
        return Query(query.batch, query.objective, at, query.grad, track)
