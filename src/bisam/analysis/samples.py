"""Samples: the mean loss over fixed batches, as a function of a displacement of the weights.

Every measure of `bisam.analysis` compares losses on the same examples, so the batches are read once and kept. Random
numbers of the forward passes (dropout) are those of the seed in every pass, and no pass changes the model.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from math import isfinite, nan
from typing import Any, Literal, Self, cast, get_type_hints

import torch
from torch import Tensor

from bisam.batches import Batch, examples, mapped, size, split
from bisam.distributed.ddp import synchronising_as_before
from bisam.evaluation import Evaluation
from bisam.loss import SharpnessAware
from bisam.model.eval_mode import in_mode
from bisam.model.oracle import ModelOracle
from bisam.objectives import Objective
from bisam.oracle import Oracle
from bisam.validation import whole
from bisam.vector import Vector

Mode = Literal["eval", "train"]
"""The mode of the model: "eval" uses running statistics and no dropout, "train" the statistics of each batch."""

Progress = Callable[[int, int], None]
"""A function `(done, total)` that is called after each forward pass of a batch, with numbers of examples."""

Source = Oracle | SharpnessAware
"""An oracle, or the loss of a training loop, whose model is analysed."""


class NonFiniteLossError(ValueError):
    """A loss at the weights is not finite."""


@dataclass(frozen=True)
class Result:
    """The base of results.

    Attributes:
        mode: the mode of the model; None: as it was.
        seed: the seed of random vectors and of forward passes.
        examples: number of losses that count.
    """

    mode: str | None
    seed: int
    examples: float

    def to_dict(self) -> dict[str, Any]:
        """Returns all attributes, for JSON; a number that is not finite is None."""
        return _lists(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Returns the result whose `to_dict` gave these values; a number that was not finite is nan.

        Raises:
            ValueError: they are not the attributes of this kind of result.
        """
        hints = get_type_hints(cls)
        if values.keys() != hints.keys():
            raise ValueError(f"{cls.__name__} has {', '.join(hints)}, got {', '.join(values)}")
        arguments: dict[str, Any] = {
            name: nan if value is None and hints[name] is float else _tuples(value) for name, value in values.items()
        }
        return cls(**arguments)


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(part) for key, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, tuple | list):
        return [_lists(part) for part in cast("Sequence[Any]", value)]
    return None if isinstance(value, float) and not isfinite(value) else value


def _tuples(value: Any) -> Any:
    """Restores what `_lists` changed; inside of containers None was a number."""
    if isinstance(value, dict):
        return {key: _tuples(nan if part is None else part) for key, part in cast("dict[str, Any]", value).items()}
    if isinstance(value, list):
        return tuple(_tuples(nan if part is None else part) for part in cast("list[Any]", value))
    return value


@dataclass
class Passes:
    """Counts passes over the examples of a sample, and reports them.

    Attributes:
        examples: number of examples of the sample.
        expected: expected number of forward passes over all of them.
        progress: is called after each forward pass of a batch.
        forward: number of forward passes so far.
        backward: number of backward passes so far.
    """

    examples: int
    progress: Progress | None = None
    expected: float = 0.0
    forward: float = 0.0
    backward: float = 0.0

    def add(self, batch: Batch, grad: bool) -> None:
        """Counts a pass of a batch."""
        share = (size(batch) or 1) / self.examples
        self.forward += share
        self.backward += share * grad
        if self.progress is not None:
            done = round(self.forward * self.examples)
            self.progress(done, max(done, round(self.expected * self.examples)))


@dataclass(frozen=True)
class Sample:
    """The mean loss over batches.

    Args:
        oracle: the oracle of the model.
        batches: the batches, as tuples of arguments.
        seed: seeds the random numbers of the forward passes.
        passes: counts the passes.
        first: number of the first batch, which its random numbers depend on.
        model: the oracle of a torch module below `oracle`, if there is one; its forward passes draw random numbers.
    """

    oracle: Oracle
    batches: Sequence[Batch]
    seed: int
    passes: Passes
    first: int = 0
    model: ModelOracle | None = None

    @property
    def ranks(self) -> int:
        """Number of ranks that share a batch; the count of an answer is their mean. All of them call it together."""
        return len(self.oracle.gathered(self.oracle.weights.tensors[0].new_zeros(1)))

    def parts(self, m: int | None) -> list[Sample]:
        """Returns the groups of batches that have a ball of their own: all batches, or parts of `m` examples.

        Raises:
            ValueError: `m` is larger than the batches.
        """
        if m is None:
            return [self]
        whole("m", m)
        if m > (most := max(examples(batch, "split") for batch in self.batches)):
            raise ValueError(f"m={m} is more than the {most} examples of a batch: pass larger batches")
        parts = [part for batch in self.batches for part in split(batch, m)]
        return [replace(self, batches=[part], first=i) for i, part in enumerate(parts)]

    def each(
        self, at: Vector | None = None, objective: Objective | None = None, *, grad: bool, wrt: Any = None
    ) -> Generator[Evaluation]:
        """Yields the evaluation of each batch at a displacement.

        Raises:
            NonFiniteLossError: a loss is not finite at the weights themselves.
        """
        for i, batch in enumerate(self.batches, self.first):
            with self._forked(i):
                answer = self.oracle.query(batch, objective, at=at, grad=grad, track=False, wrt=wrt)
            self.passes.add(batch, grad)
            if at is None and not bool(answer.value.isfinite()):
                raise NonFiniteLossError(
                    f"the loss of batch {i} is {float(answer.value)} at the weights: the model has diverged, or the "
                    "batch has entries that are not finite"
                )
            yield answer

    def gradient(self, at: Vector | None, objective: Objective | None, wrt: Any = None) -> tuple[Vector, Answers]:
        """Returns the gradient of the mean loss at a displacement, and the answers without gradients."""
        total: Vector | None = None
        answers = Answers([], self.oracle)
        for answer in self.each(at, objective, grad=True, wrt=wrt):
            weighted = answer.gradient * float(answer.count)
            total = weighted if total is None else total + weighted
            answers.parts.append(replace(answer, grad=None))
        assert total is not None
        return total * (1 / max(answers.count, 1)), answers

    def answers(self, at: Vector | None = None, objective: Objective | None = None) -> Answers:
        """Returns the answers at a displacement, without gradients."""
        return Answers(list(self.each(at, objective, grad=False)), self.oracle)

    @contextmanager
    def _forked(self, number: int) -> Generator[None]:
        with nullcontext() if self.model is None else self.model.fork(self.seed, number):
            yield


@dataclass(frozen=True)
class Answers:
    """The evaluations of all batches of a sample at one displacement.

    Args:
        parts: one for each batch.
        oracle: the oracle that gave them.
    """

    parts: list[Evaluation]
    oracle: Oracle

    @property
    def count(self) -> float:
        """Number of losses that count."""
        return sum(float(part.count) for part in self.parts)

    @property
    def value(self) -> float:
        """The mean loss."""
        return sum(float(part.value) * float(part.count) for part in self.parts) / max(self.count, 1)

    def under(self, objective: Objective | None) -> Answers:
        """Evaluates another objective on the same outputs; None: the same one.

        Ranks that share the batches call it together: values and counts are means over them.
        """
        return (
            self if objective is None else Answers([self._under(part, objective) for part in self.parts], self.oracle)
        )

    def _under(self, part: Evaluation, objective: Objective) -> Evaluation:
        own = part.under(objective)
        value, count = self.oracle.averaged(own.value, own.count)
        return replace(own, value=value, count=count)


@contextmanager
def sampled(
    source: Source,
    data: Iterable[Any],
    *,
    seed: int,
    mode: Mode | None,
    progress: Progress | None = None,
) -> Generator[Sample]:
    """A context with the sample of a model and its data, in which the model is in `mode`.

    Args:
        source: what is analysed.
        data: batches: tuples or lists of arguments of the loss, or single arguments. They are moved to the device of
            the model.
        seed: see `Sample`.
        mode: the mode of the model; None leaves it as it is.
        progress: see `Progress`.

    Raises:
        TypeError: `source` is neither an oracle nor a `SharpnessAware`.
        ValueError: `data` has no batches, or `mode` is unknown.
    """
    whole("seed", seed, least=0)
    if mode not in ("eval", "train", None):
        raise ValueError(f"mode must be 'eval', 'train' or None (as the model is), got {mode!r}")
    if not isinstance(cast(Any, source), Oracle | SharpnessAware):
        raise TypeError(
            "what is analysed must be the loss SharpnessAware(model, ...) or an oracle such as "
            f"ModelOracle(model, loss), got {type(source).__name__}"
        )
    oracle = source.oracle() if isinstance(source, SharpnessAware) else source
    inner = oracle if isinstance(oracle, ModelOracle) else None
    if inner is None and mode is not None:
        raise ValueError(f"mode={mode!r} needs a ModelOracle; for another oracle pass mode=None")
    batches = read(data, oracle)
    with ExitStack() as contexts:
        if inner is not None:
            contexts.enter_context(synchronising_as_before(inner.model))
            if mode is not None:
                contexts.enter_context(in_mode(inner.model, mode == "train"))
        passes = Passes(sum(size(batch) or 1 for batch in batches), progress)
        yield Sample(oracle.without_tracking(), batches, seed, passes, model=inner)


def read(data: Iterable[Any], oracle: Oracle) -> list[Batch]:
    """Returns the batches of `data` as tuples of arguments, on the device of the weights.

    Raises:
        ValueError: there are none.
    """
    device = oracle.weights.tensors[0].device
    batches = [_arguments(batch, device) for batch in data]
    if not batches:
        raise ValueError(
            "the data has no batches: a generator can be read once, so pass a list or a DataLoader to each measure"
        )
    return batches


def _arguments(batch: Any, device: torch.device) -> Batch:
    arguments = tuple(cast("Sequence[Any]", batch)) if isinstance(batch, tuple | list) else (batch,)
    return mapped(lambda t: t.to(device), arguments)


def unit(vector: Vector) -> Vector:
    """Returns a vector of length 1, or zero if it is zero."""
    norm = vector.norm()
    return vector * torch.where(norm > 0, 1 / norm, torch.zeros_like(norm))


def cosine(a: Vector, b: Vector) -> Tensor:
    """Returns the cosine of the angle between two vectors, 0 if one of them is zero."""
    return unit(a).dot(unit(b))
