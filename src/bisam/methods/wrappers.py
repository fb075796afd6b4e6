"""Wrappers: methods that contain another method.

They nest in any order:

    >>> from bisam import MSAM, KSAM, RSAM, SAM, Accumulated, BiSAM, During, EBiSAM, Every, L2, Tilted
    >>> m_sharpness = MSAM(32, BiSAM())                   # each micro-batch of 32 has its own perturbation
    >>> one_ball = Accumulated(32, BiSAM())               # micro-batches of 32 that share one perturbation
    >>> hardest = KSAM(16, RSAM(0.01, EBiSAM()))          # on the 16 hardest examples, around a random point
    >>> sparse = Every(5, SAM(L2(0.1)))                   # at every fifth step, with the plain gradient in between
    >>> late = During(SAM(), start=8_000)                 # in the last epochs only
    >>> tilted = Tilted(3, RSAM(0.01, BiSAM()))           # three random points, the worst of which counts most
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, cast

import torch
from torch import Tensor

from bisam import schedules
from bisam.batches import Batch, examples, largest, split
from bisam.evaluation import Evaluation, divisor, join
from bisam.methods.method import Method, decouples, follows_flips, stateful
from bisam.methods.sam import ERM, SAM
from bisam.objectives import Objective
from bisam.oracle import Oracle, Query, View
from bisam.perturbations import Perturbation
from bisam.schedules import Radius
from bisam.statistics import observed_as_asked
from bisam.validation import MOST_QUERIES, instance, non_negative, positive, whole
from bisam.vector import TINY, Vector, widened

_METHOD = "SAM(), BiSAM() or another (oracle, batch) -> Evaluation"


@dataclass(frozen=True)
class MSAM:
    """m-sharpness: applies a method to micro-batches of `m` examples and averages the gradients (Foret et al., 2021).

    See also Behdin et al., 2023, https://arxiv.org/abs/2302.09693. Data-parallel training does the same, with `m` the
    batch size of a replica. Running statistics are updated once per micro-batch. Replicas of data-parallel training may
    have different numbers of micro-batches; ranks that wait for each other in each pass (`scope="global"`, FSDP2,
    SyncBatchNorm) may not.

    Args:
        m: examples in a micro-batch, >= 1; the last one may be smaller. A micro-batch is weighted by its number of
            examples that count (those whose target is not the `ignore_index`).
        method: method that is applied to each micro-batch.
        separate: keep one state for each position in the batch, as replicas do. For LookSAM and similar methods each of
            these states has the size of the weights.

    Raises:
        TypeError: `m` is not an int, or `method` is not a method.
        ValueError: `m` is less than 1, or the method is stateful and `separate` is False, or its radius is a
            `FlipRate`.

    Raises when called:
        ValueError: ranks that wait for each other in each pass have different numbers of micro-batches.
    """

    m: int
    method: Method = field(default=SAM())
    separate: bool = False

    def __post_init__(self) -> None:
        whole("m, the number of examples in a micro-batch,", self.m)
        instance("method", self.method, _METHOD)
        if follows_flips(self.method):
            raise ValueError(
                "a FlipRate inside of MSAM would have a radius for each micro-batch, and ranks may differ in their "
                f"number: use a number or another schedule as the radius, got {self.method!r}"
            )
        if not self.separate and (name := stateful(self.method)):
            raise ValueError(
                f"all micro-batches would share what {name} remembers: use MSAM(m, method, separate=True), which keeps "
                f"one state for each micro-batch as replicas do, or a method that is not stateful"
            )

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes the queries of the method for each micro-batch in turn."""
        parts = split(batch, self.m)
        oracle.agree("micro-batches", len(parts))
        if len(parts) == 1:
            return self.method(oracle.within("part 0"), batch)
        return _joined(oracle, parts, lambda i, part: self.method(oracle.within(f"part {i}"), part))


def _joined(oracle: Oracle, parts: Sequence[Batch], ask: Callable[[int, Batch], Evaluation]) -> Evaluation:
    """Returns the answer for a batch from the answers for its parts, which are asked in turn."""
    sums, answers = dict[str, Vector](), list[Evaluation]()
    for i, part in enumerate(parts):
        oracle.next_part()
        answer = ask(i, part)
        for name, vector in (("grad", answer.grad), ("decoupled", answer.decoupled)):
            if vector is not None:
                share = vector * answer.count
                sums[name] = sums[name] + share if name in sums else share
                del share, vector
        answers.append(replace(answer, grad=None, decoupled=None))
        del answer  # free their memory before the passes of the next part
    joined = join(answers)
    means = {name: total / divisor(joined.count) for name, total in sums.items()}
    return replace(joined, **cast("dict[str, Any]", means))


@dataclass(frozen=True)
class Accumulated:
    """Applies a method to the whole batch, and computes each of its queries in micro-batches of `m` examples.

    This is gradient accumulation with one perturbation for all micro-batches: the displacement is made of the gradient
    of the whole batch, and the memory of a pass is that of a micro-batch. The loop calls the loss once for each step of
    the optimizer, with all examples of the step. In a loop that calls it for each micro-batch, each has a perturbation
    of its own, as in `MSAM`.

    Running statistics are updated once per micro-batch. Losses that are no means over examples (contrastive losses,
    batch normalisation in the loss, torch's mean with class weights), and class weights that are made of the batch
    (`FocalSAM` without counts, `ClassWeighted("balanced")`), are those of micro-batches. The displacement is kept
    during the micro-batches of a query: one more tensor of the size of each weight. Hidden states of the model go on
    from query to query.

    Args:
        m: examples in a micro-batch, >= 1; the last one may be smaller. A micro-batch is weighted by its number of
            examples that count.
        method: the method.

    Raises:
        TypeError: `m` is not an int, or `method` is not a method.
        ValueError: `m` is less than 1.

    Raises when called:
        ValueError: ranks that wait for each other in each pass have different numbers of micro-batches.

    Example:
        >>> import torch
        >>> from bisam import SAM, Accumulated, SharpnessAware, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3).double()
        >>> x, y = torch.randn(64, 4).double(), torch.randint(3, (64,))
        >>> whole = SharpnessAware(model, SAM(0.1), cross_entropy)(x, y)
        >>> parts = SharpnessAware(model, Accumulated(16, SAM(0.1)), cross_entropy)(x, y)    # a quarter of the memory
        >>> torch.testing.assert_close(parts, whole)
    """

    m: int
    method: Method = field(default=SAM())

    def __post_init__(self) -> None:
        whole("m, the number of examples in a micro-batch,", self.m)
        instance("method", self.method, _METHOD)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes the queries of the method, each of them for every micro-batch in turn."""
        with observed_as_asked(_InParts(oracle, self.m)) as divided:
            return self.method(divided, batch)


class _InParts(View):
    """An oracle that answers each query in micro-batches of `m` examples, the same ones in all queries on a batch."""

    def __init__(self, oracle: Oracle, m: int) -> None:
        super().__init__(oracle)
        self._parts = _Parts(m)

    def next_part(self) -> None:
        """See `Oracle.next_part`."""
        super().next_part()
        self._parts.asked = False

    def ask(self, queries: Sequence[Query]) -> list[Evaluation]:
        """See `Oracle.ask`."""
        return [self._answer(query) for query in queries]

    def _answer(self, query: Query) -> Evaluation:
        parts = self._parts.of(query.batch, self)
        if len(parts) == 1:
            return super().ask([query])[0]
        queries = _divided(query, parts)
        return _joined(self.below, parts, lambda i, part: View.ask(self, [next(queries)])[0])


class _Parts:
    """The parts of `m` examples of each batch of a step, and whether one was asked for."""

    def __init__(self, m: int) -> None:
        self._m, self.asked = m, False
        self._known: dict[int, tuple[Batch, list[Batch]]] = {}  # by the identity of the batch, which stays alive

    def of(self, batch: Batch, oracle: Oracle) -> list[Batch]:
        if id(batch) not in self._known:
            self._known[id(batch)] = batch, split(batch, self._m)
        _, parts = self._known[id(batch)]
        oracle.agree("micro-batches", len(parts))
        if self.asked:
            oracle.check_inputs()
        self.asked = True
        return parts


def _divided(query: Query, parts: Sequence[Batch]) -> Iterator[Query]:
    """Yields the query for each part of its batch; all have its displacement."""
    track, at = query.tracks, query.take()
    for i, part in enumerate(parts):
        yield replace(query, batch=part, at=at, track=track, objective=_of_part(query.objective, parts, i))


def _of_part(objective: Objective | None, parts: Sequence[Batch], i: int) -> Objective | None:
    """Returns the objective of part `i` of a batch: its own part of one that knows the examples of the batch.

    Such an objective has a method `of_part(start, stop, n)` for examples `start` to `stop` - 1 of `n`. The mean of its
    parts, each with the weight of its number of examples, is the whole.
    """
    divided = getattr(objective, "of_part", None)
    if divided is None:
        return objective
    ends = [0, *accumulate(examples(part) for part in parts)]
    return divided(ends[i], ends[i + 1], ends[-1])


@dataclass(frozen=True)
class KSAM:
    """K-SAM: applies a method to the `k` examples of the batch with the largest losses (Ni et al., 2022).

    Source: https://arxiv.org/abs/2210.12864. A forward pass of the whole batch selects the examples and updates running
    statistics. The authors' values of k were not found in a public source.

    Args:
        k: number of examples that are kept, >= 1; with the batch size, the wrapper has no effect on the gradient.
        method: method that is applied to these examples.

    Raises:
        TypeError: `k` is not an int, or `method` is not a method.
        ValueError: `k` is less than 1, or the radius of the method is a `FlipRate`.

    Raises when called:
        TypeError: the loss is a scalar.
        ValueError: the batch has fewer than `k` examples, or the number of losses is not the number of examples.
    """

    k: int
    method: Method = field(default=SAM())

    def __post_init__(self) -> None:
        whole("k", self.k)
        instance("method", self.method, _METHOD)
        if follows_flips(self.method):
            raise ValueError(
                "a FlipRate inside of KSAM would follow the flips of the hardest examples, which are mostly wrong "
                f"already: use a number or another schedule as the radius, got {self.method!r}"
            )

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes a forward pass, and then the queries of the method on the selected examples."""
        examples(batch)  # refuses what it cannot choose from before anything is computed
        losses = oracle.query(batch, grad=False).per_example
        if self.k > len(losses):
            raise ValueError(
                f"k is {self.k}, and the batch has only {len(losses)} examples: choose a smaller k, or leave out the "
                "smaller batch at the end of an epoch with drop_last=True in the DataLoader"
            )
        return self.method(oracle.within("method").without_tracking(), largest(losses, self.k, batch))


@dataclass(frozen=True)
class RSAM:
    """R-SAM: applies a method at a random point near the weights (random smoothing; Liu et al., 2022).

    This is the algorithm of R-SAM (Liu et al., NeurIPS 2022, "Random Sharpness-Aware Minimization") as its abstract
    describes it; its exact formula and values were not found in a public source. For the inner method the random point
    replaces the weights: running statistics are updated there, and `SharpnessAware.clean` holds the evaluation there.

    Args:
        sigma: standard deviation of the noise of each entry, >= 0, in units of the norm of its filter: the noise of a
            filter of d entries is about sqrt(d) sigma times as long as the filter. A complex number is one entry. With
            0 the wrapper has no effect.
        method: method that is applied at the random point.
        filters: if True, scale the noise by the norm of each filter (a slice along the first dimension of a tensor of
            two or more dimensions), and of each tensor of fewer dimensions. If False, all entries have the same noise.
        radius: largest length of the noise, > 0; longer noise is scaled to it. Default: no limit.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `sigma` is negative or not finite, or `radius` is not positive and finite.
    """

    sigma: float
    method: Method = field(default=SAM())
    filters: bool = True
    radius: float | None = None

    def __post_init__(self) -> None:
        non_negative("sigma", self.sigma)
        instance("method", self.method, _METHOD)
        if self.radius is not None:
            positive("radius", self.radius)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes the queries of the method, all displaced by the same noise."""
        inside = oracle.within("method")
        if self.sigma == 0:
            return self.method(inside, batch)
        w = oracle.weights
        noise = w.random(torch.randn_like) * w.each(lambda t: (self.sigma * self._scale(t)).expand_as(t))
        if self.radius is not None:
            noise = noise * (self.radius / (noise.norm() + TINY)).clamp_max(1.0)
        return self.method(inside.shifted(noise, track=True), batch)

    def _scale(self, w: Tensor) -> Tensor:
        if not self.filters:
            return w.new_ones(())
        return torch.linalg.vector_norm(w, dim=tuple(range(1, w.dim())) if w.dim() > 1 else None, keepdim=True)


@dataclass(frozen=True)
class Tilted:
    """Tilted sharpness: applies a method several times and weights the answers by exp(tilt loss) (Li et al., 2024).

    Source: https://arxiv.org/abs/2410.22656. With loss l_i and gradient h_i of answer i the gradient is the mean of h_i
    with the weights exp(tilt l_i). It is that of log(mean exp(tilt l))/tilt, which is the mean of the losses for tilt 0
    and their maximum in the limit. `TSAM` is the method of the paper, where a sample is SAM at a random point. A method
    that draws nothing gives equal answers, and is what the wrapper is then. Running statistics are updated by the first
    sample; the authors' code updates them in each.

    Args:
        samples: number of answers, from 1 to 1,000; 1 is the method.
        method: method that is applied; each sample has a state of its own. The reported loss is the mean with the same
            weights.
        tilt: tilt, >= 0, a number or a schedule; the authors' default is 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `samples` or `tilt` is outside its range.
    """

    samples: int = 3
    method: Method = field(default=RSAM(0.01))
    tilt: Radius = 1.0

    def __post_init__(self) -> None:
        whole("samples", self.samples, most=MOST_QUERIES)
        instance("method", self.method, _METHOD)
        schedules.check("tilt", self.tilt)
        if name := decouples(self.method):
            raise ValueError(
                f"the sharpness term of a decoupled {name} is no part of the gradients that are weighted here: use "
                f"{name}(..., decouple=False)"
            )

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes the queries of the method for each sample in turn."""
        tilt, sums, last = schedules.at(self.tilt, oracle.step), None, list[Evaluation]()
        for i in range(self.samples):
            oracle.next_sample()
            inside = oracle.within(f"sample {i}", draw=i if self.samples > 1 else None)
            answer = self.method(inside if i == 0 else inside.without_tracking(), batch)
            if self.samples == 1:
                return answer
            value = widened(answer.value)
            sums = _weighted(sums, answer.gradient, value, value * tilt)
            last = [replace(answer, grad=None)]
            del answer  # frees its memory before the passes of the next sample
        g, value, total, _ = cast(_Sums, sums)
        return replace(last[0], grad=g / total, value=(value / total).to(last[0].value.dtype))


_Sums = tuple[Vector, Tensor, Tensor, Tensor]
"""The sums of gradients, values and weights, which are relative to the largest exponent so far: the last entry."""


def _weighted(sums: _Sums | None, gradient: Vector, value: Tensor, exponent: Tensor) -> _Sums:
    """Adds an answer with the weight exp(exponent), which may exceed the range of its type."""
    if sums is None:
        return gradient, value, torch.ones_like(value), exponent
    g, v, total, top = sums
    new = torch.maximum(top, exponent)
    old, now = torch.exp(top - new), torch.exp(exponent - new)
    return g * old + gradient * now, v * old + value * now, total * old + now, new


def TSAM(
    rho: Perturbation | Radius = 0.05,
    samples: int = 3,
    tilt: Radius = 1.0,
    sigma: float = 1.0,
    radius: float | None = 1.0,
    ascent: Objective | None = None,
) -> Tilted:
    """TSAM: tilted SAM, the mean over SAM at random points where those with a larger loss count more (Li et al., 2024).

    Source: https://arxiv.org/abs/2410.22656, as in the authors' code: a sample is the gradient of SAM at w plus
    Gaussian noise that is scaled to a length of `radius` at most, and its loss is that at the end of the ascent. The
    same as `Tilted(samples, RSAM(sigma, SAM(rho, ascent), filters=False, radius=radius), tilt)`. Defaults are those of
    the authors' code for images; in a network of many weights the noise always has the length `radius`.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation.
        samples: number of random points, from 1 to 1,000.
        tilt: tilt, >= 0, a number or a schedule; with 0 all points count the same.
        sigma: standard deviation of the noise of each entry, >= 0.
        radius: largest length of the noise, > 0, or None for no limit.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """
    return Tilted(samples, RSAM(sigma, SAM(rho, ascent=ascent), filters=False, radius=radius), tilt)


@dataclass(frozen=True)
class Every:
    """Applies one method at every `k`-th step, beginning with the first, and another one at the other steps.

    Args:
        k: interval in steps, >= 1; with 1 it is always `method`.
        method: method at every k-th step; its step counter counts these steps only.
        otherwise: method at all other steps; its step counter counts those only. Default: `ERM()`.

    Raises:
        TypeError: `k` is not an int, or `method` or `otherwise` is not a method.
        ValueError: `k` is less than 1.
    """

    k: int
    method: Method = field(default=SAM())
    otherwise: Method = field(default=ERM())

    def __post_init__(self) -> None:
        whole("k", self.k)
        instance("method", self.method, _METHOD)
        instance("otherwise", self.otherwise, _METHOD)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes the queries of the method whose turn it is."""
        turn, rest = divmod(oracle.step, self.k)
        if rest == 0:
            return self.method(oracle.within("method", turn), batch)
        return self.otherwise(oracle.within("otherwise", oracle.step - turn - 1), batch)


@dataclass(frozen=True)
class During:
    """Applies one method in a range of steps and another one before and after, for example SAM in the last epochs only.

    SAM in the late phase of training gives most of the improvement (Zhou et al., 2025,
    https://arxiv.org/abs/2410.10373).

    Args:
        method: method from step `start` to step `stop` - 1; its step counter counts these steps only.
        start: first step, >= 0.
        stop: first step after the range, > `start`. Default: the range does not end.
        otherwise: method before and after. Default: `ERM()`.

    Raises:
        TypeError: `start` or `stop` is not an int, or `method` or `otherwise` is not a method.
        ValueError: `start` or `stop` is outside its range.
    """

    method: Method = field(default=SAM())
    start: int = 0
    stop: int | None = None
    otherwise: Method = field(default=ERM())

    def __post_init__(self) -> None:
        instance("method", self.method, _METHOD)
        instance("otherwise", self.otherwise, _METHOD)
        whole("start", self.start, least=0)
        if self.stop is not None:
            whole("stop", self.stop, least=self.start + 1)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes the queries of the method that applies at this step."""
        step, stop = oracle.step, self.stop
        if self.start <= step and (stop is None or step < stop):
            return self.method(oracle.within("method", step - self.start), batch)
        before = step if step < self.start else step - ((stop or 0) - self.start)
        return self.otherwise(oracle.within("otherwise", before), batch)
