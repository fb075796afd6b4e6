"""Wrappers: methods around any method.

MSAM(32, BiSAM())                            # each micro-batch of 32 perturbs for itself
KSAM(16, RSAM(0.01, EBiSAM()))               # on the 16 hardest examples, around a random point
Every(5, SAM(L2(0.1)))                       # every fifth step, else the plain gradient
During(SAM(), start=8_000)                   # in the last epochs only
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from bisam.evaluation import Batch, Evaluation, divisor, join, largest, split
from bisam.methods.method import Method, stateful
from bisam.methods.sam import ERM, SAM
from bisam.oracle import Oracle
from bisam.validation import instance, non_negative, whole


@dataclass(frozen=True)
class MSAM:
    """m-sharpness: any method on each micro-batch of `m` examples by itself, gradients averaged (Foret et al., 2021).

    See also Behdin et al., 2023, https://arxiv.org/abs/2302.09693. It is what data-parallel training does with `m` the
    batch of one replica. Running statistics move once per micro-batch. In data-parallel training itself, replicas whose
    batches differ in size must be wrapped as `DistributedDataParallel(SharpnessAware(...))`.

    Args:
        m: examples in a micro-batch, >= 1; the last one may be smaller. Each weighs the examples that count in it.
        method: what each micro-batch does.
        separate: give each position in the batch a memory of its own, as replicas have. What LookSAM and its like
            remember is of the size of the weights, once for each micro-batch.

    Raises:
        TypeError: `m` is no whole number, or `method` no method.
        ValueError: `m` is less than 1; the method keeps a memory, and `separate` was not asked for.
    """

    m: int
    method: Method = field(default=SAM())
    separate: bool = False

    def __post_init__(self) -> None:
        whole("m, the number of examples in a micro-batch,", self.m)
        instance("method", self.method, _METHOD)
        if not self.separate and (name := stateful(self.method)):
            raise ValueError(
                f"all micro-batches would share what {name} remembers, and none would find its own: use "
                f"MSAM(m, method, separate=True), where each has a memory as replicas have, or a method without one"
            )

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """The method's queries for each micro-batch in turn."""
        parts = split(batch, self.m)
        oracle.agree("micro-batches", len(parts))
        if len(parts) == 1:
            return self.method(oracle.within("part 0"), batch)
        g, answers = None, list[Evaluation]()
        for i, part in enumerate(parts):
            answer = self.method(oracle.within(f"part {i}"), part)
            share = answer.gradient * answer.count
            g = share if g is None else g + share
            answers.append(replace(answer, grad=None))
            del answer, share  # not through the next part's passes
        joined = join(answers)
        return replace(joined, grad=None if g is None else g / divisor(joined.count))


@dataclass(frozen=True)
class KSAM:
    """Any method on the `k` examples of the batch with the largest losses (Ni et al., 2022).

    https://arxiv.org/abs/2210.12864. A forward pass of the whole batch chooses them, and moves running statistics. The
    authors' values of k were not found in a public source.

    Args:
        k: examples that are kept, >= 1; the size of the batch makes it `method`.
        method: what is done with them.

    Raises:
        TypeError: `k` is no whole number, or `method` no method.
        ValueError: `k` is less than 1.

    Called, it raises:
        TypeError: the loss is a scalar.
        ValueError: the batch has fewer than `k` examples, or the losses are not one for each.
    """

    k: int
    method: Method = field(default=SAM())

    def __post_init__(self) -> None:
        whole("k", self.k)
        instance("method", self.method, _METHOD)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """A forward pass, and the method's queries on a part of the batch."""
        losses = oracle.query(batch, grad=False).per_example
        if self.k > len(losses):
            raise ValueError(
                f"k is {self.k}, and the batch has only {len(losses)} examples: choose a smaller k, or leave out the "
                "smaller batch at the end of an epoch with drop_last=True in the DataLoader"
            )
        return self.method(oracle.within("method").without_tracking(), largest(losses, self.k, batch))


@dataclass(frozen=True)
class RSAM:
    """Any method around a random point near the weights: random smoothing, then the ascent (Liu et al., 2022).

    The algorithm of R-SAM (Liu et al., NeurIPS 2022, "Random Sharpness-Aware Minimization") as its abstract describes
    it; its exact formula and values were not found in a public source. Inside, the random point takes the place of the
    weights: running statistics move there, and `SharpnessAware.clean` is what was seen there.

    Args:
        sigma: standard deviation of each entry's noise, >= 0, in units of its filter's norm, so that the noise of a
            filter of d entries is about sqrt(d) sigma times as long as the filter; 0 is `method`.
        method: what is done at the random point.
        filters: scale the noise of each filter (the first dimension of a tensor of two or more) by its norm, and that
            of other tensors by theirs; else the noise is the same everywhere.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `sigma` is negative or not finite.
    """

    sigma: float
    method: Method = field(default=SAM())
    filters: bool = True

    def __post_init__(self) -> None:
        non_negative("sigma", self.sigma)
        instance("method", self.method, _METHOD)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """The method's queries, all of them displaced by the same noise."""
        inside = oracle.within("method")
        if self.sigma == 0:
            return self.method(inside, batch)
        w = oracle.weights
        noise = w.random(torch.randn_like) * w.each(lambda t: (self.sigma * self._scale(t)).expand_as(t))
        return self.method(inside.shifted(noise, track=True), batch)

    def _scale(self, w: Tensor) -> Tensor:
        if not self.filters:
            return w.new_ones(())
        return torch.linalg.vector_norm(w, dim=tuple(range(1, w.dim())) if w.dim() > 1 else None, keepdim=True)


@dataclass(frozen=True)
class Every:
    """A method at every `k`-th step, beginning with the first, and another one between.

    Args:
        k: interval in steps, >= 1; 1 is `method`.
        method: what is done at each k-th step; it counts these steps only.
        otherwise: what is done at all other steps.

    Raises:
        TypeError: `k` is no whole number, or a method is none.
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
        """The queries of the one or the other."""
        turn, rest = divmod(oracle.step, self.k)
        if rest == 0:
            return self.method(oracle.within("method", turn), batch)
        return self.otherwise(oracle.within("otherwise", oracle.step - turn - 1), batch)


@dataclass(frozen=True)
class During:
    """A method from one step to another, and another one before and after: SAM in the last epochs only, say.

    The late phase of training is enough for most of the gain (Zhou et al., 2025, https://arxiv.org/abs/2410.10373).

    Args:
        method: what is done from step `start` to the one before `stop`; it counts these steps only.
        start: first step, >= 0.
        stop: first step after, > `start`; None for never.
        otherwise: what is done before and after.

    Raises:
        TypeError: a step is no whole number, or a method is none.
        ValueError: a step is outside its range.
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
        """The queries of the one or the other."""
        step, stop = oracle.step, self.stop
        if self.start <= step and (stop is None or step < stop):
            return self.method(oracle.within("method", step - self.start), batch)
        before = step if step < self.start else step - ((stop or 0) - self.start)
        return self.otherwise(oracle.within("otherwise", before), batch)


_METHOD = "SAM(), BiSAM() or another (oracle, batch) -> Evaluation"
