"""Statistics: norms, rise of the loss and cosine of a training step, from the queries that its method makes anyway.

    sharp = SharpnessAware(model, SAM(0.05), cross_entropy, stats=True)
    sharp(x, y).backward()
    sharp.stats.cosine          # on the device of the model; nothing waits for it
    sharp.stats.to_dict()       # numbers, for a log; waits for the device

An `Observed` oracle passes all queries of the method on, and a `Recorder` computes the statistics from them.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import reduce
from typing import cast

import torch
from torch import Tensor

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.oracle import Oracle, Query, View
from bisam.seeded import Seeded
from bisam.vector import Vector, power_of_two, widened


@dataclass(frozen=True, eq=False)
class StepStats:
    """Statistics of a training step: 0-dimensional tensors on the device of the model, detached.

    They describe the last point that the step displaced the weights to and computed a gradient at (of several that it
    asked for at once, the first): the displacement e and the descent gradient h, which is the gradient there. The
    ascent gradient g is the last gradient that the step computed before, from which e was made. A statistic is None if
    the step did not compute what it consists of. A value that is not finite is reported as it is, also in a step whose
    scaled gradients overflow.

    Attributes:
        ascent_norm: norm of g, of the part that the method computes (`SAMON`, `RandomMask`). g may be the gradient of
            another objective (`BiSAM`) or of another batch (`SAMDB`). None if the step used no gradient of its own for
            e, as where e is made of the gradient of an earlier step (`SAMPa`, `AsyncSAM` and `OptSAM` after their first
            step) or of a momentum (`MomentumSAM`).
        descent_norm: norm of h, before a method combines it with other gradients (`GSAM`, `WSAM`, `SAMPa`). If no
            gradient was computed at displaced weights (`ERM`, or the steps of `LookSAM` in between), norm of the
            gradient that the step returns.
        displacement_norm: norm of e, of all that was added to the weights, as the noise of `RSAM` is. None if no
            gradient was computed at displaced weights.
        rise: value of the training loss at w + e minus its value at w, on the same batch, each as the step has
            evaluated it, with its own dropout masks. It is known if the step also makes a query at w, whatever its
            objective: the training loss is computed again from the outputs. For `ESAM`, whose h is of a part of the
            batch, it is that of the whole batch.
        cosine: cosine of the angle between g and h, in [-1, 1], over the part of g that was computed; NaN if one of
            them is 0.

    In the catalogue, with more exact statements where the above leaves a choice:

    * `SAM` with any perturbation, `GSAM`, `WSAM`, `StableSAM`, `SAMSPS`, `LookSAM` and `AESAM` at SAM steps, `XSAM`,
      `FunctionalSAM`, `SSAMF`: all five. `FunctionalSAM`'s h is J(w + e)^T c. `SAGM`: all five, at w + e - alpha g.
    * `CRSAM`, `BilateralSAM`: all five, at w + e, not at w - e.
    * `EigenSAM`: all five; at steps that estimate the eigenvector g is a gradient of the last difference.
    * `ImbSAM`, `FocalSAM`: all five, with the gradients of the part whose sharpness counts.
    * `MultiStepSAM`, `Lookbehind`, `GAM`: all five; g is the gradient of the last ascent step.
    * `SAMDB`: no rise, because its batches differ.
    * `SAMPa`: the first step has all five, of the term at w + e; later ones have no g and no rise. `AsyncSAM` has no g
      after its first step. `OptSAM` and `MomentumSAM` have displacement and h.
    * `RSAM` and `BSAM`: no rise, because they make no query at w. g is the gradient at the random point, and e contains
      the noise in RSAM.
    * `ZerothOrder`, `FilterNoise`: displacement and h.
    * `RAPP`, `ExtraGradient`, `CEGPlus`: g is the operator that the last step from w was made along.
    * `Tilted`, `TSAM`: those of the last sample. `MSAM`: those of the last micro-batch.
    * `Accumulated`: those of the wrapped method, for the whole batch.
    * `KSAM`: those of the selected examples.
    * `SAF`, `MESA`: those of the wrapped method; the rise is that of the loss without the term.
    * `Every`, `During`: those of the method whose turn it is.
    """

    ascent_norm: Tensor | None = None
    descent_norm: Tensor | None = None
    displacement_norm: Tensor | None = None
    rise: Tensor | None = None
    cosine: Tensor | None = None

    def to_dict(self) -> dict[str, float]:
        """Returns the statistics that are not None, as numbers; this waits for the device, once."""
        return numbers(self.known())

    def known(self) -> dict[str, Tensor]:
        """Returns the statistics that are not None; nothing waits for the device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


NAMES = tuple(field.name for field in fields(StepStats))
"""The names of the statistics."""


class StatsMean:
    """Means of the statistics of several steps, summed on the device.

    The mean of a statistic is over the steps in which it is known and finite, so that one step whose float16 gradients
    overflow does not hide all others. It is NaN if it is finite in none of those that know it.

    Attributes:
        steps: for each statistic that a step knew, the number of these steps.
        finite: the number of steps in which it was finite too, 0-dimensional.
        sums: the sum of its finite values, 0-dimensional.

    Example:
        >>> import torch
        >>> mean = StatsMean()
        >>> for norm in (1.0, 2.0):
        ...     mean.add(StepStats(descent_norm=torch.tensor(norm)))
        >>> mean.to_dict()
        {'descent_norm': 1.5}
    """

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        self.finite: dict[str, Tensor] = {}
        self.sums: dict[str, Tensor] = {}

    def add(self, stats: StepStats) -> None:
        """Adds those of a step; nothing waits for the device."""
        for name, value in stats.known().items():
            value, finite = widened(value), value.isfinite()
            value, finite = torch.where(finite, value, 0.0), finite.to(value.dtype)
            if name in self.steps:
                value, finite = self.sums[name] + value, self.finite[name] + finite
            self.sums[name], self.finite[name] = value, finite
            self.steps[name] = self.steps.get(name, 0) + 1

    def to_dict(self) -> dict[str, float]:
        """Returns the means as numbers, in the order of `NAMES`; this waits for the device, once."""
        return numbers({name: self.sums[name] / self.finite[name] for name in NAMES if name in self.steps})


def numbers(values: dict[str, Tensor]) -> dict[str, float]:
    """Returns 0-dimensional tensors as numbers, which are copied from the device at once."""
    if not values:
        return {}
    tensors = list(values.values())
    dtype, device = reduce(torch.promote_types, [t.dtype for t in tensors]), tensors[0].device
    return dict(zip(values, torch.stack([t.to(device, dtype) for t in tensors]).tolist(), strict=True))


class Recorder:
    """Computes the statistics of a step from its queries and their answers.

    The ascent gradient is kept for the cosine: one more tensor of the size of each weight during the query of the
    descent gradient.

    Args:
        training_value: returns the value of the training loss from the outputs of an answer for another objective.
    """

    def __init__(self, training_value: Callable[[Evaluation], Tensor]) -> None:
        self._training_value = training_value
        self._stats: StepStats | None = None
        self._gradient: Vector | None = None  # the last one
        self._part: Sequence[bool] | None = None  # of the weights, whose gradient it is
        self._batch: Batch | None = None  # of the last query at the weights
        self._plain: Evaluation | Tensor | None = None  # its answer, or the value of the training loss there
        self._rise: Tensor | None = None  # at the last displaced point that had a forward pass alone

    def before(self, queries: Sequence[Query], oracle: Oracle) -> Tensor | None:
        """Returns the norm of the displacement of the query that the statistics describe, if there is one."""
        described = _described(queries)
        if described is not None:
            # The norm first: during the pass nothing but the query may refer to the displacement.
            at = queries[described].at
            return None if at is None else (at.lengths(oracle.weights) if isinstance(at, Seeded) else at).norm()
        if any(query.grad for query in queries):
            self._gradient = self._rise = None  # frees a gradient that the next one replaces
        return None

    def after(
        self, queries: Sequence[Query], answers: Sequence[Evaluation], length: Tensor | None, loss: object
    ) -> None:
        """Records the answers to queries.

        Args:
            queries: the queries, without their displacements.
            answers: their answers.
            length: what `before` returned.
            loss: the training loss.
        """
        for query, answer in zip(queries, answers, strict=True):
            if not query.displaced and query.buffers is None:
                self._see(query.batch, answer, loss)
        described = _described(queries)
        if described is not None:
            answer = answers[described]
            rise = self._rise_at(queries[described], answer, loss)
            self._stats = replace(
                _gradients(self._gradient, self._part, answer.gradient),
                displacement_norm=length,
                rise=self._rise if rise is None else rise,
            )
            self._rise = None
        else:
            for query, answer in zip(queries, answers, strict=True):
                if query.displaced and not query.grad:
                    self._rise = self._rise_at(query, answer, loss)
        for query, answer in zip(queries, answers, strict=True):
            if answer.grad is not None:
                self._gradient, self._part = answer.grad, query.wrt

    def forget(self) -> None:
        """Forgets the last gradient: the displacements of the next part of the batch or sample are not made of it."""
        self._gradient = self._rise = None

    def finish(self, answer: Evaluation) -> StepStats:
        """Returns the statistics of the step whose method returned `answer`."""
        return self._stats or StepStats(descent_norm=answer.gradient.norm())

    def _see(self, batch: Batch, answer: Evaluation, loss: object) -> None:
        """Remembers the value of the training loss at the weights, or an answer that it can be computed from."""
        if answer.objective is loss:
            self._batch, self._plain = batch, answer.value
        elif self._batch is not batch or not isinstance(self._plain, Tensor):
            self._batch, self._plain = batch, replace(answer, grad=None)

    def _rise_at(self, query: Query, answer: Evaluation, loss: object) -> Tensor | None:
        if self._plain is None or query.batch is not self._batch or query.buffers is not None:
            return None
        here, plain = (self._value(a, loss) for a in (answer, self._plain))
        self._plain = self._plain if plain is None else plain
        return None if here is None or plain is None else _wide(here) - _wide(plain)

    def _value(self, answer: Evaluation | Tensor, loss: object) -> Tensor | None:
        if isinstance(answer, Tensor):
            return answer
        if answer.objective is loss:
            return answer.value
        # Of a query that another rank has answered there are no outputs.
        return None if answer.outputs is None else self._training_value(answer)


class Observed(View):
    """An oracle whose queries are recorded.

    Args:
        oracle: the underlying oracle.
        recorder: what records them.
    """

    def __init__(self, oracle: Oracle, recorder: Recorder) -> None:
        super().__init__(oracle)
        self.recorder: Recorder | None = recorder

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """See `Oracle.ask`."""
        if self.recorder is None:
            return super().ask(queries)
        length = self.recorder.before(queries, self)
        answers = super().ask(queries)
        self.recorder.after(queries, answers, length, self.loss)
        return answers

    def next_part(self) -> None:
        """See `Oracle.next_part`."""
        super().next_part()
        if self.recorder is not None:
            self.recorder.forget()

    def next_sample(self) -> None:
        """See `Oracle.next_sample`."""
        super().next_sample()
        if self.recorder is not None:
            self.recorder.forget()


def observed_above(view: View) -> Oracle:
    """Returns `view`, observed in place of the oracle below it that is: for a view that sends queries elsewhere."""
    below = _observed_below(view)
    if below is None:
        return view
    recorder, below.recorder = below.recorder, None
    return Observed(view, cast(Recorder, recorder))


@contextmanager
def observed_as_asked(view: View) -> Generator[Oracle]:
    """A context with `view`, observed in place of the oracle below it that is: for a view that divides queries."""
    below = _observed_below(view)
    recorder = None if below is None else below.recorder
    try:
        yield observed_above(view)
    finally:
        if below is not None:
            below.recorder = recorder


def _observed_below(view: View) -> Observed | None:
    below: Oracle = view
    while isinstance(below, View):
        if isinstance(below, Observed) and below.recorder is not None:
            return below
        below = below.below
    return None


def _described(queries: Sequence[Query]) -> int | None:
    """Returns the position of the query that the statistics describe: the first displaced one with a gradient."""
    return next((i for i, query in enumerate(queries) if query.displaced and query.grad), None)


def _gradients(g: Vector | None, part: Sequence[bool] | None, h: Vector) -> StepStats:
    """Returns the norms and the cosine of an ascent gradient, of a part of the weights, and a descent gradient."""
    if g is None:
        return StepStats(descent_norm=h.norm())
    ascent, descent = g.norm(), h.norm()
    return StepStats(ascent, descent, cosine=_cosine(g, ascent, h, descent, part))


def _cosine(g: Vector, ascent: Tensor, h: Vector, descent: Tensor, part: Sequence[bool] | None) -> Tensor:
    """Returns the cosine of the angle between vectors with these norms, in a part of the weights."""
    if part is not None:  # not the holes of g: ranks with different holes would wait for each other
        descent = h.confined(part).norm()
    size = power_of_two(ascent)  # products of small entries would underflow, and dividing by it is exact
    return (g.layout.total(_products(g, h, size)) / (ascent / size * descent)).clamp(-1, 1)


def _products(g: Vector, h: Vector, size: Tensor) -> Tensor:
    """Returns the inner products (n,) of the tensors of `g` / `size` and `h`.

    They are computed for a group of tensors at a time, because `Vector.dots` needs memory for each product of entries.
    """
    parts = [size.new_zeros(())] * len(g)
    kept = [i for i in range(len(g)) if i not in g.holes | h.holes]
    for group in _groups(kept, [g.tensors[i].numel() for i in kept]):
        a, b = (Vector([v.tensors[i] for i in group]) for v in (g, h))
        for i, part in zip(group, (a / size).dots(b).unbind(), strict=True):
            parts[i] = part.to(size.dtype)
    return torch.stack(parts)


def _groups(indices: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Divides tensors of these numbers of entries into at most 33 groups: one large tensor, or several small ones."""
    limit = max(_SMALL, sum(sizes) // 16)
    groups, filled = list[list[int]](), limit
    for i, size in zip(indices, sizes, strict=True):
        if filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(i)
        filled += size
    return groups


_SMALL = 2**22  # entries, 16 MiB in float32: divided no further


def _wide(tensor: Tensor) -> Tensor:
    """Returns a tensor of half precision in float32, and others unchanged."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
