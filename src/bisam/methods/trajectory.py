"""Methods that compare the outputs with those of earlier weights: SAF and MESA (Du et al., 2022).

Both minimise L + lam T^2 KL(past || present). `past` are outputs of earlier weights on the same examples, and KL is the
divergence of the class probabilities at temperature T. The term penalises fast changes of the loss along the trajectory
of the weights, in place of sharpness, and needs no second gradient (https://arxiv.org/abs/2205.14083).

The term is a part of the training loss, so any method can be applied to it:

    >>> from bisam import MESA, SAF, SAM, BiSAM
    >>> plain = SAF(epoch=352, examples=45_000)           # the authors' method: plain training with the term
    >>> sam = MESA(SAM(0.05), start=6 * 352)              # SAM climbs and descends the loss with the term
    >>> bisam = MESA(BiSAM(0.05), start=6 * 352)          # the adversary climbs the bound alone, which has no such term
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from bisam.batches import Batch, Keywords, examples
from bisam.evaluation import Evaluation
from bisam.methods.method import Method
from bisam.methods.sam import ERM
from bisam.objectives import Objective
from bisam.oracle import Oracle, Query, View
from bisam.validation import describe, instance, non_negative, positive, share, whole
from bisam.vector import Vector


@dataclass(frozen=True)
class SAF:
    """SAF: the loss compares the outputs with those of the same examples some epochs earlier (Du et al., 2022).

    Source: https://arxiv.org/abs/2205.14083. The settings are those of the authors' code. A step makes the queries of
    the wrapped method and no others. As in the authors' code, the method keeps `ago` + 1 outputs of each example:
    (ago + 1) N K numbers for N examples and K classes, and up to 2 N K numbers more during a step. They are saved in
    checkpoints. An example without outputs from exactly `ago` epochs earlier gets no term.

    The method needs the numbers of the examples of a batch, from 0 to `examples` - 1: `sharp(x, y, indices=i)`. If
    `scope` is "global", and under FSDP2, all ranks keep the outputs of all ranks, and each step waits for the device.
    Otherwise each rank keeps the outputs that it has computed; give it the same examples in every epoch, because those
    of another rank get no term.

    Args:
        method: method that is applied to the loss with the term. Default: plain training, as in the paper.
        epoch: steps in an epoch, >= 1.
        examples: number of training examples N.
        indices: function from a batch to the numbers of its examples (n,). Default: the keyword argument `indices` of
            the call, which is not passed to the model.
        lam: weight of the term, >= 0; the authors use 0.3. With 0 it is the method alone.
        temperature: T, > 0; the authors use 5.
        ago: number of epochs, >= 1; the authors use 2 or 3.
        start: first step with the term, >= 0. Default: 6 epochs, as in the authors' code.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.

    Raises when called:
        TypeError: there are no indices, or the outputs of the model are not a tensor of logits (N, K, ...).
        ValueError: the indices do not match the batch, or one is outside of the range (checked on the CPU).

    Example:
        >>> import torch
        >>> from bisam import SAF, SharpnessAware, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(100, 4), torch.randint(3, (100,))
        >>> sharp = SharpnessAware(model, SAF(epoch=10, examples=100, ago=2, start=20), cross_entropy)
        >>> for epoch in range(3):
        ...     for i in torch.randperm(100).split(10):
        ...         sharp(x[i], y[i], indices=i).backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
    """

    method: Method = field(default=ERM())
    epoch: int = field(kw_only=True)
    examples: int = field(kw_only=True)
    indices: Callable[[Batch], Tensor] | None = field(default=None, kw_only=True)
    lam: float = field(default=0.3, kw_only=True)
    temperature: float = field(default=5.0, kw_only=True)
    ago: int = field(default=3, kw_only=True)
    start: int | None = field(default=None, kw_only=True)
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)
        whole("epoch", self.epoch)
        whole("examples", self.examples)
        whole("ago", self.ago, most=1000)
        if self.indices is not None:
            instance("indices", self.indices, "a function from a batch to the numbers of its examples")
        if self.start is not None:
            whole("start", self.start, least=0)

    @property
    def indexed(self) -> bool:
        """Whether the method takes the keyword argument `indices` of a call."""
        return self.indices is None

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes the queries of the method."""
        start = 6 * self.epoch if self.start is None else self.start
        batch, index = _indexed(batch, self.indices)
        state, number, ago = oracle.state, oracle.step // self.epoch, self.ago
        past = _recalled(state, index, number, ago) if oracle.step >= start else _Past(None, None, index)
        inside = _Trajectory(oracle.within("method"), self.lam, self.temperature)
        answer = self.method(inside, (batch, past))
        if inside.seen:
            index, outputs = (oracle.gathered(torch.cat(part)) for part in zip(*inside.seen, strict=True))
            _recorded(state, index, outputs, number, ago + 1, self.examples)
        return answer


@dataclass(frozen=True)
class MESA:
    """MESA: the loss compares the outputs with those of an average of the weights (Du et al., 2022).

    Source: https://arxiv.org/abs/2205.14083. The settings are those of the authors' code. The average of the weights is
    exponential and begins at the first weights. Floating-point buffers, such as running statistics, are averaged in the
    same way, and the outputs of the average are computed in eval mode, as in the authors' code. A step makes a forward
    pass and the queries of the method. The average is updated once per loss: with k losses in a step of the optimizer
    (gradient accumulation) use the k-th root of the decay.

    Args:
        method: method that is applied to the loss with the term. Default: plain training, as in the paper.
        lam: weight of the term, >= 0; the authors use 0.3 to 0.8. With 0 it is the method alone.
        temperature: T, > 0; the authors use 5.
        decay: decay of the average, in [0, 1); the authors use 0.9998.
        start: first step with the term, >= 0; the authors' code begins after 6 epochs. The average begins at once.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.

    Raises when called:
        TypeError: the outputs of the model are not a tensor of logits (N, K, ...).

    Example:
        >>> import torch
        >>> from bisam import MESA, SharpnessAware, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> sharp = SharpnessAware(model, MESA(decay=0.99), cross_entropy)
        >>> sharp(torch.randn(8, 4), torch.randint(3, (8,))).backward()
    """

    method: Method = field(default=ERM())
    lam: float = field(default=0.8, kw_only=True)
    temperature: float = field(default=5.0, kw_only=True)
    decay: float = field(default=0.9998, kw_only=True)
    start: int = field(default=0, kw_only=True)
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        _check(self)
        share("decay", self.decay, zero=True, one=False)
        whole("start", self.start, least=0)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes a forward pass at the average, and then the queries of the method."""
        buffers, inside = _average(oracle, self.decay), oracle.within("method")
        if oracle.step < self.start:
            return self.method(inside, batch)
        at = oracle.state["weights"] - oracle.weights
        query = Query(batch, at=at, grad=False, buffers=buffers)
        del at  # the query owns it
        past = _Past(_logits(oracle.ask([query])[0].outputs_of_model), None, None)
        return self.method(_Trajectory(inside, self.lam, self.temperature), (batch, past))


def _check(method: SAF | MESA) -> None:
    instance("method", method.method, "SAM(), BiSAM() or another (oracle, batch) -> Evaluation")
    non_negative("lam", method.lam)
    positive("temperature", method.temperature)


def _average(oracle: Oracle, decay: float) -> list[Tensor]:
    """Updates the averages of weights and buffers in the state, and returns that of the buffers."""
    average: Vector | None = oracle.state.get("weights")
    oracle.state["weights"] = oracle.weights.clone() if average is None else _mixed(average, oracle.weights, decay)
    if not (now := [b.detach() for b in oracle.buffers]):
        return now
    old: list[Tensor] | None = oracle.kept("buffers")
    if old is None or [b.shape for b in old] != [b.shape for b in now]:
        old = now
    # Running statistics of a batch that was not finite are not, and would stay in the average.
    buffers = [
        torch.where(b.isfinite(), a * decay + b * (1 - decay), a) if b.is_floating_point() else b.clone()
        for a, b in zip(old, now, strict=True)
    ]
    oracle.keep("buffers", buffers)
    return buffers


def _mixed(average: Vector, weights: Vector, decay: float) -> Vector:
    return average * decay + weights * (1 - decay)


class _Past(NamedTuple):
    """Earlier outputs of the examples of a batch. It is passed as a part of the batch, so that it is divided with it.

    Attributes:
        outputs: earlier outputs (n, K, ...); None: there is no term yet.
        known: whether there are earlier outputs of an example (n,); None: of all.
        numbers: the numbers of the examples (n,), if their outputs are recorded.
    """

    outputs: Tensor | None
    known: Tensor | None
    numbers: Tensor | None


_NOTHING = _Past(None, None, None)


class _Trajectory(View):
    """An oracle whose training loss has the term, and whose batches are pairs of a batch and its `_Past`.

    Attributes:
        seen: the numbers of the examples of the queries that updated running statistics, and their outputs.
    """

    def __init__(self, oracle: Oracle, lam: float, temperature: float) -> None:
        super().__init__(oracle)
        self._loss = _TrajectoryLoss(oracle.loss, lam, temperature)
        self.seen: list[tuple[Tensor, Tensor]] = []

    @property
    def loss(self) -> Objective:
        """See `Oracle`."""
        return self._loss

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """See `Oracle.ask`."""
        pasts, tracked = [_Past(*query.batch[1]) for query in queries], [query.tracks for query in queries]
        below = [_below(query, self._loss, past) for query, past in zip(queries, pasts, strict=True)]
        answers = super().ask(below)
        for past, answer, tracks in zip(pasts, answers, tracked, strict=True):
            if past.numbers is not None and tracks:
                self.seen.append((past.numbers.to((z := _logits(answer.outputs_of_model)).device), z))
        return [_Answer.of(answer, past) for answer, past in zip(answers, pasts, strict=True)]


def _below(query: Query, loss: Objective, past: _Past) -> Query:
    """Returns the query for an oracle that knows nothing of the term."""
    objective = _bound(loss if query.objective is None else query.objective, past)
    return replace(query, batch=query.batch[0], objective=objective, at=query.take())


@dataclass(frozen=True)
class _Answer(Evaluation):
    """An answer whose losses can be computed again with the term of its own batch."""

    past: _Past = _NOTHING

    @classmethod
    def of(cls, answer: Evaluation, past: _Past) -> _Answer:
        return cls(**{f.name: getattr(answer, f.name) for f in fields(Evaluation)}, past=past)

    def under(self, objective: Objective) -> Evaluation:
        return super().under(_bound(objective, self.past))


def _bound(objective: Objective, past: _Past) -> Objective:
    if not isinstance(objective, _TrajectoryLoss):
        return objective
    return objective.loss if past.outputs is None else replace(objective, past=past)


@dataclass(frozen=True, eq=False)
class _TrajectoryLoss:
    """The training loss with the term; of the batch that `past` belongs to."""

    loss: Objective
    lam: float
    temperature: float
    past: _Past = _NOTHING

    @property
    def ignore_index(self) -> int | None:
        return getattr(self.loss, "ignore_index", None)

    def of_part(self, start: int, stop: int, n: int) -> _TrajectoryLoss:
        """Returns the loss of a part of the batch, see `Accumulated`."""
        return replace(self, past=_Past(*[None if t is None else t[start:stop] for t in self.past]))

    def __call__(self, outputs: Any, targets: Any) -> Tensor:
        # The term first: a loss may change the outputs in place.
        past = cast(Tensor, self.past.outputs)
        term = _divergence(_logits(outputs), past, self.temperature) * (self.lam * self.temperature**2)
        losses = self.loss(outputs, targets)
        if self.past.known is not None:
            term = term * self.past.known.to(term.dtype).view(-1, *[1] * (term.dim() - 1))
        ignored = _ignored(targets, term, self.ignore_index)
        return _added(losses, term if ignored is None else term.masked_fill(ignored, 0.0), ignored)


def _divergence(outputs: Tensor, past: Tensor, temperature: float) -> Tensor:
    """Returns KL(past || present) of the class probabilities: (N, K, ...) -> (N, ...)."""
    now, then = (
        F.log_softmax((t.float() if t.dtype in (torch.float16, torch.bfloat16) else t) / temperature, 1)
        for t in (outputs, past)
    )
    return F.kl_div(now, then.to(now.dtype), reduction="none", log_target=True).sum(1)


def _ignored(targets: Any, term: Tensor, ignore_index: int | None) -> Tensor | None:
    labels = isinstance(targets, Tensor) and not targets.is_floating_point() and targets.shape == term.shape
    return targets == ignore_index if labels and ignore_index is not None else None


def _added(losses: Tensor, term: Tensor, ignored: Tensor | None) -> Tensor:
    """Returns losses (), (N,) or (N, d1, ...) with a term (N, ...), so that the means are added."""
    if not losses.dim():
        return losses + (term.mean() if ignored is None else term.sum() / (~ignored).sum().clamp_min(1))
    if losses.dim() < term.dim():
        term = term.flatten(losses.dim() - 1).mean(-1)
    return losses + term.view(*term.shape, *[1] * (losses.dim() - term.dim())).to(losses.dtype)


def _logits(outputs: Any) -> Tensor:
    if isinstance(outputs, Tensor) and outputs.dim() > 1 and not outputs.is_complex():
        return outputs
    raise TypeError(
        f"SAF and MESA compare logits (N, K, ...), and the outputs of the model are {describe(outputs)}: give "
        "SharpnessAware a `forward` that returns (logits, targets)"
    )


def _indexed(batch: Batch, indices: Callable[[Batch], Tensor] | None) -> tuple[Batch, Tensor]:
    """Returns a batch without the keyword argument `indices`, and the numbers of its examples."""
    if indices is not None:
        index: Any = indices(batch)
    else:
        named = batch[-1] if batch and isinstance(batch[-1], Keywords) else Keywords()
        if "indices" not in named:
            raise TypeError(
                "SAF needs the numbers of the examples in the data set: call the loss as sharp(x, y, indices=i), or "
                "give SAF a function from the batch to them, SAF(..., indices=lambda batch: batch[0]['id'])"
            )
        index, others = named["indices"], Keywords({k: v for k, v in named.items() if k != "indices"})
        batch = (*batch[:-1], others) if others else batch[:-1]
    _check_indices(index, examples(batch, "number the examples of"))
    return batch, index.long()


def _check_indices(index: Any, n: int) -> None:
    if not isinstance(index, Tensor) or index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"indices must be a tensor of integers, got {describe(index)}")
    if index.shape != (n,):
        raise ValueError(f"there are indices of shape {tuple(index.shape)} for {n} examples: pass one for each example")


def _recalled(state: dict[str, Any], index: Tensor, number: int, ago: int) -> _Past:
    """Returns the outputs of `ago` epochs before epoch `number`.

    The state is a list of `ago` + 1 tensors (N, K, ...), one for each of the last epochs in turn, and of the epoch (N,)
    in which each entry was recorded.
    """
    then = number - ago
    if then < 0 or "outputs" not in state:
        return _Past(None, None, index)
    outputs, epochs = (state[name][then % (ago + 1)] for name in ("outputs", "epochs"))
    here = index.to(outputs.device)
    with _within(index, len(outputs)):
        return _Past(outputs[here], epochs[here] == then, index)


def _recorded(state: dict[str, Any], index: Tensor, outputs: Tensor, number: int, size: int, count: int) -> None:
    """Records outputs of epoch `number` in a state of `size` epochs and `count` examples."""
    if "outputs" not in state:
        state["outputs"] = [outputs.new_zeros((count, *outputs.shape[1:]))] * size
        state["epochs"] = [torch.full((count,), -1, dtype=torch.int32, device=outputs.device)] * size
    tables, epochs = list(state["outputs"]), list(state["epochs"])
    if tables[0].shape != (count, *outputs.shape[1:]):
        raise ValueError(
            f"SAF remembers outputs of shape {tuple(tables[0].shape)}, and now there are {count} examples with outputs "
            f"of shape {tuple(outputs.shape[1:])}: make a new SharpnessAware, which begins with an empty memory"
        )
    slot = number % size
    with _within(index, count):
        tables[slot] = tables[slot].index_copy(0, index, outputs.to(tables[slot].dtype))
        epochs[slot] = epochs[slot].index_fill(0, index, number)
    state["outputs"], state["epochs"] = tables, epochs


@contextmanager
def _within(index: Tensor, count: int) -> Generator[None]:
    """A context in which an index that is out of range is a `ValueError`; on a device it is an assert, as in torch."""
    try:
        yield
    except (IndexError, RuntimeError) as error:
        wrong = index[(index < 0) | (index >= count)] if index.is_cpu else index[:0]
        if not len(wrong):
            raise
        raise ValueError(
            f"index {int(wrong[0])} is not the number of an example, 0 to {count - 1} with SAF(examples={count})"
        ) from error
