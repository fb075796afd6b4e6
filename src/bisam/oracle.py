"""Oracle: what a sharpness-aware method may ask, and the same oracle seen from elsewhere.

A method queries losses and their gradient at displaced weights, and never meets the model:

    g = oracle.query(batch, NegLog())                 # Evaluation at the weights w: losses, value, grad, outputs
    h = oracle.query(batch, at=g.grad * 0.1)          # the training loss at w + e

    oracle.shifted(noise)                             # centred at w + noise
    oracle.still()                                    # where no query moves running statistics
    oracle.within("perturb")                          # with a state of its own

`model_oracle.py` has the one that answers for a torch module.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from bisam.evaluation import Batch, Evaluation
from bisam.objectives import Count, Objective
from bisam.vector import Vector


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
        alone: whether a query is answered for its batch alone. Where parameters are sharded, or the perturbation was
            asked to be global, answers are means over the batches of all ranks.
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
    alone: bool = True
    state: dict[str, Any]

    @abstractmethod
    def query(
        self,
        batch: Batch,
        objective: Objective | None = None,
        *,
        at: Vector | None = None,
        grad: bool = True,
        track: bool | None = None,
    ) -> Evaluation:
        """Evaluate `objective` (default: the training loss) on `batch` at `weights + at`.

        Args:
            batch: a batch, whole or a part of it.
            objective: what to evaluate; None is the training loss.
            at: displacement, given away: pass it without keeping it and its memory is free during the forward pass.
            grad: whether the gradient is wanted.
            track: whether running statistics move; None: exactly when `at` is None.
        """

    def together(self, *queries: Mapping[str, Any]) -> list[Evaluation]:
        """Answers to queries that do not depend on each other, each given as the keyword arguments of `query`.

        In series here; a subclass may answer them in parallel.
        """
        return [self.query(**query) for query in queries]

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

    def still(self) -> Oracle:
        """The same oracle, where no query moves running statistics: they moved already."""
        return View(self, still=True)

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

    To watch an oracle, override `query` and `together` in a subclass.

    Args:
        oracle: the one below.
        by: displacement of the centre.
        track: whether queries at a displaced centre move running statistics.
        still: whether no query does.
        state: what the method remembers, by default that of the oracle below.
        step: by default that of the oracle below.
    """

    def __init__(
        self,
        oracle: Oracle,
        *,
        by: Vector | None = None,
        track: bool = False,
        still: bool = False,
        state: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        self._oracle, self._by, self._track, self._still = oracle, by, track, still
        self.state = oracle.state if state is None else state
        self.step = oracle.step if step is None else step

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
    def alone(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """See `Oracle`."""
        return self._oracle.alone

    def averaged(self, value: Tensor, count: Count) -> tuple[Tensor, Count]:
        """See `Oracle.averaged`."""
        return self._oracle.averaged(value, count)

    def agree(self, what: str, number: int) -> None:
        """See `Oracle.agree`."""
        self._oracle.agree(what, number)

    def query(
        self,
        batch: Batch,
        objective: Objective | None = None,
        *,
        at: Vector | None = None,
        grad: bool = True,
        track: bool | None = None,
    ) -> Evaluation:
        """See `Oracle.query`."""
        track, given = self._tracks(at, track), [self._seen_from(at)]
        at = None  # given away: this frame must not keep it through the forward pass
        return self._oracle.query(batch, objective, at=given.pop(), grad=grad, track=track)

    def together(self, *queries: Mapping[str, Any]) -> list[Evaluation]:
        """See `Oracle.together`."""
        moved = [
            {**q, "at": self._seen_from(q.get("at")), "track": self._tracks(q.get("at"), q.get("track"))}
            for q in queries
        ]
        return self._oracle.together(*moved)

    def _seen_from(self, at: Vector | None) -> Vector | None:
        return at if self._by is None else self._by if at is None else self._by + at

    def _tracks(self, at: Vector | None, track: bool | None) -> bool | None:
        if self._still:
            return False
        # To the oracle below, a query at this centre is one somewhere else: what that means is decided here.
        return self._track and at is None if track is None and self._by is not None else track
