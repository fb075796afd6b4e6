"""Methods that save gradients: on some examples, at some steps, from the step before, or side by side."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from bisam.evaluation import Batch, Evaluation, largest, size, take
from bisam.masks import RandomMask, top
from bisam.methods.sam import SAM
from bisam.objectives import LowerBound, NegLog, Objective
from bisam.oracle import Oracle, Query
from bisam.perturbations import L2, Perturbation, geometry, is_radius
from bisam.schedules import Radius
from bisam.validation import finite, instance, non_negative, portion, share, whole
from bisam.vector import TINY, Vector


@dataclass(frozen=True)
class ESAM(SAM):
    """Efficient SAM: a part of the weights is perturbed, a part of the examples descended on (Du et al., 2022).

    https://arxiv.org/abs/2110.03141. The part of the weights is `RandomMask`. The examples are those whose loss the
    perturbation raises most, which takes a forward pass of the batch at w + e.

    Args:
        perturb: see `SAM`; a radius stands for `RandomMask(L2(rho), beta=0.6)`. The authors: rho 0.05 and beta 0.6 for
            ResNet-18, 0.1 and 0.5 for WideResNets.
        ascent: see `SAM`; a `LowerBound` makes it E-BiSAM.
        descent: see `SAM`.
        gamma: share of the examples, rounded up, in (0, 1]; 1 is SAM.
        select: the loss whose rise chooses them, one per example; None is the training loss.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `gamma` is outside its range.

    Called, it raises:
        TypeError: the selecting loss is a scalar.
        ValueError: its losses are not one for each example.
    """

    perturb: Perturbation | Radius = field(default=RandomMask(L2(0.05), beta=0.6))
    gamma: float = 0.5
    select: Objective | None = None

    def __post_init__(self) -> None:
        if is_radius(self.perturb):
            object.__setattr__(self, "perturb", RandomMask(self.perturb, beta=0.6))
        super().__post_init__()
        share("gamma", self.gamma)
        if self.select is not None:
            instance("select", self.select, "an objective such as bisam.cross_entropy")

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """A query at w, a forward pass and a query on the chosen examples at w + e."""
        g = oracle.query(batch, self.ascent)
        e, before = self.displacement(g.gradient, oracle), replace(g, grad=None)
        del g  # and its gradient
        if self.gamma < 1:
            select = self.select or oracle.loss
            before = before.under(select).per_example
            rise = oracle.query(batch, select, at=e, grad=False).per_example - before
            batch = largest(rise, portion(self.gamma, len(rise)), batch)
        return oracle.query(batch, self.descent, at=e)


def EBiSAM(
    rho: Perturbation | Radius = 0.05,
    bound: LowerBound = NegLog(),  # noqa: B008
    beta: float = 0.6,
    gamma: float = 0.5,
    select: Objective | None = None,
) -> ESAM:
    """ESAM whose adversary climbs a lower bound of the 0-1 loss (Xie et al., 2024, https://arxiv.org/abs/2407.12993).

    Its pseudocode, and which loss chooses the examples, were not found in a public source: by default it is the
    training loss, as in ESAM.
    """
    return ESAM(RandomMask(rho, beta), ascent=bound, gamma=gamma, select=select)


@dataclass(frozen=True)
class LookSAM(SAM):
    """SAM at every `k`-th step, and what it added to the gradient is used again between (Liu et al., 2022).

    https://arxiv.org/abs/2203.02714. At a SAM step v = h - (its part along g) is kept; at the others the gradient is
    g + alpha (||g||/||v||) v. The projection is that of the whole vector, as in the paper; the public ports project
    each tensor by itself.

    Args:
        perturb: see `SAM`; the ports' rho is 0.1.
        ascent: see `SAM`.
        descent: see `SAM`.
        k: interval in steps, >= 1; 1 is SAM.
        alpha: weight of what is used again, >= 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `k` or `alpha` is outside its range.
    """

    perturb: Perturbation | Radius = field(default=L2(0.1))
    k: int = 5
    alpha: float = 0.7
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("k", self.k)
        non_negative("alpha", self.alpha)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Two queries (three with another ascent) at every k-th step, one at the others."""
        if oracle.step % self.k and "v" in oracle.state:
            answer, v = oracle.query(batch, self.descent), oracle.state["v"]
            g = answer.gradient
            return replace(answer, grad=g + v * (self.alpha * g.norm() / (v.norm() + TINY)))
        g, answer = self.both(oracle, batch)
        oracle.state["v"] = answer.gradient - answer.gradient.onto(g)
        return answer


@dataclass(frozen=True)
class AESAM(SAM):
    """SAM where the gradient is large for its time, else the plain gradient (Jiang et al., 2023).

    https://arxiv.org/abs/2304.14647. With running mean mu and variance var of ||g||^2, a step is one of SAM if
    ||g||^2 >= mu + c sqrt(var), where c goes from `first` to `last` on a straight line over `steps`; mu begins at the
    first ||g||^2 and var at 0, so the first step is one of SAM. The decision waits for the device, once a step. In
    data-parallel training each replica decides for itself: wrap as `DistributedDataParallel(SharpnessAware(...))`,
    where the number of forward passes may differ, and use no SyncBatchNorm; or ask for `scope="global"`. The
    defaults of `first`, `last` and `delta` are from memory, not from a source.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`.
        descent: see `SAM`.
        steps: steps of the training run, >= 1.
        first: c at the first step (lambda_2 of the paper).
        last: c after `steps` (lambda_1); the smaller, the more steps are SAM's.
        delta: memory of mu and var, in [0, 1].

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    steps: int = field(kw_only=True)
    first: float = 1.0
    last: float = -1.0
    delta: float = 0.9
    stateful: ClassVar[bool] = True
    data_dependent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("steps", self.steps)
        finite("first", self.first)
        finite("last", self.last)
        share("delta", self.delta, zero=True)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """One query at the weights, and a second one (a third with another ascent) where it is worth it."""
        answer = oracle.query(batch, self.descent)
        if not self._is_large(answer.gradient.norm() ** 2, oracle):
            return answer
        answer = answer if self.ascent == self.descent else oracle.query(batch, self.ascent, track=False)
        e = self.displacement(answer.gradient, oracle)
        del answer  # and its gradient
        return oracle.query(batch, self.descent, at=e)

    def _is_large(self, squared: Tensor, oracle: Oracle) -> bool:
        state, time = oracle.state, min(1.0, oracle.step / self.steps)
        mu = squared if "mu" not in state else state["mu"] * self.delta + squared * (1 - self.delta)
        var = (squared - mu) ** 2 * (1 - self.delta)
        state["mu"], state["var"] = mu, var if "var" not in state else state["var"] * self.delta + var
        c = time * self.last + (1 - time) * self.first
        return bool(squared >= mu + c * state["var"].sqrt())


@dataclass(frozen=True)
class SSAMF(SAM):
    """Sparse SAM: only the weights of the largest Fisher information are perturbed, SSAM-F (Mi et al., 2022).

    https://arxiv.org/abs/2210.05177. The diagonal Fisher information is the mean square of the descent loss's gradients
    of single examples, here of the first ones of the batch; the authors draw 1,024 from the data set, every 5 epochs.
    Their mask is empty until it is first renewed; this one is made at the first step.

    Args:
        perturb: the displacement that a part is taken of; its norm is over all weights.
        ascent: see `SAM`.
        descent: see `SAM`.
        keep: share of the entries that are moved, rounded up, in (0, 1]; 1 is SAM; the authors' sparsity is 1 - keep.
        every: steps between two masks, >= 1.
        samples: single examples of the Fisher information, >= 1; at most the batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.

    Called, it raises:
        ValueError: by torch, the model cannot train on a single example, as with BatchNorm1d, or gradients are means
            over ranks (FSDP2): use `FisherSAM`.
    """

    keep: float = 0.8
    every: int = 1000
    samples: int = 16
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        share("keep", self.keep)
        whole("every", self.every)
        whole("samples", self.samples)

    def climb(self, oracle: Oracle, batch: Batch) -> Vector:
        """The displacement where the mask is."""
        if oracle.step % self.every == 0 or "mask" not in oracle.state:
            oracle.state["mask"] = self._mask(oracle, batch)
        return super().climb(oracle, batch) * oracle.state["mask"]

    def _mask(self, oracle: Oracle, batch: Batch) -> Vector:
        _check_alone(oracle)
        fisher = self._squared(oracle, take(batch, torch.tensor([0])))
        for i in range(1, min(self.samples, size(batch) or 1)):
            fisher = fisher + self._squared(oracle, take(batch, torch.tensor([i])))
        return top(fisher, self.keep)

    def _squared(self, oracle: Oracle, example: Batch) -> Vector:
        g = oracle.query(example, self.descent, track=False).gradient.abs()
        return g * g


def _check_alone(oracle: Oracle) -> None:
    if not oracle.is_local:
        raise ValueError(
            "SSAMF needs the gradients of single examples, and here a gradient is the mean over all ranks (sharded "
            "parameters, or a global perturbation): use FisherSAM, which takes the batch's"
        )


@dataclass(frozen=True)
class MomentumSAM:
    """The gradient at a point ahead along the momentum, in place of an ascent (Becker et al., 2024): one a step.

    https://arxiv.org/abs/2401.12033. v <- momentum v + h, and h is taken at w - rho v/||v||, with v from the steps
    before; at the first step at w. v is that of SGD with this momentum and no weight decay, where each loss is a step:
    under accumulation it goes by micro-batches, and in data-parallel training each replica has its own. Between steps
    the weights are where they are; running statistics move at the displaced point, the only one there is.

    Args:
        perturb: from -v to the displacement; the authors' rho is 0.3 to 3.
        descent: see `SAM`.
        momentum: in [0, 1), as the optimizer's.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `momentum` is outside its range.
    """

    perturb: Perturbation | Radius = field(default=L2(0.3))
    descent: Objective | None = None
    momentum: float = 0.9
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "perturb", geometry(self.perturb))
        if self.descent is not None:
            instance("descent", self.descent, "an objective such as bisam.cross_entropy")
        share("momentum", self.momentum, zero=True, one=False)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """One query."""
        v: Vector | None = oracle.state.get("v")
        inside, perturb = oracle.within("perturb"), cast(Perturbation, self.perturb)
        answer = oracle.query(batch, self.descent, at=None if v is None else perturb(-v, inside), track=True)
        oracle.state["v"] = answer.gradient if v is None else v * self.momentum + answer.gradient
        return answer


@dataclass(frozen=True)
class SAMPa(SAM):
    """SAM whose two gradients do not depend on each other: two devices can take them at once (Xie et al., 2024).

    https://arxiv.org/abs/2410.10683. With y the point where the optimizer would go along the gradient of the step
    before, the gradient is (1 - lam) grad L(w + e) + lam grad L(y), and e climbs along the gradient at the y before. As
    in the authors' code the first is taken on the batch of the step before, which is therefore remembered, not copied:
    a loader must not fill the same tensors again. The loss that is reported, and running statistics, are those at y. On
    one device it costs what SAM costs.

    Args:
        perturb: see `SAM`; the authors' rho is 0.1.
        ascent: see `SAM`.
        descent: see `SAM`.
        ahead: `next_step(optimizer)`, with the optimizer that takes the steps.
        lam: weight of the gradient at y, in [0, 1]; SAMPa-0 is 0, the authors use 0.2 in vision and 0.1 in language.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `lam` is outside its range.
    """

    perturb: Perturbation | Radius = field(default=L2(0.1))
    ahead: Callable[[Vector, Oracle], Vector] = field(kw_only=True)
    lam: float = 0.2
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        instance("ahead", self.ahead, "next_step(optimizer)")
        share("lam", self.lam, zero=True)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Two independent queries (three with another ascent); at the first step those at the weights come before."""
        state = oracle.state
        if "batch" not in state:
            state.update(self._memory(batch, oracle.ask(self._looks(batch, None, track=False))))
        g, a = state["gradients"][0], state["gradients"][-1]
        e = self.displacement(a, oracle)
        late = Query(state["batch"], self.descent, e, track=False)
        h, *seen = oracle.ask([late, *self._looks(batch, self.ahead(g, oracle), track=True)])
        state.update(self._memory(batch, seen))
        return replace(seen[0], grad=h.gradient * (1 - self.lam) + seen[0].gradient * self.lam)

    def _looks(self, batch: Batch, at: Vector | None, track: bool) -> list[Query]:
        look = Query(batch, self.descent, at, track=track)
        return [look] if self.ascent == self.descent else [look, Query(batch, self.ascent, at, track=False)]

    def _memory(self, batch: Batch, seen: list[Evaluation]) -> dict[str, Any]:
        return {"batch": batch, "gradients": [s.gradient for s in seen]}
