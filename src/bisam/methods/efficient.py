"""Methods that save gradient computations: fewer examples, fewer steps, reused gradients, or queries in parallel."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from bisam.batches import Batch, examples, largest, size, take
from bisam.evaluation import Evaluation
from bisam.masks import RandomMask, top
from bisam.methods.sam import SAM, looks
from bisam.methods.written import Called
from bisam.objectives import Bound, NegLog, Objective, at_step
from bisam.oracle import Oracle, Query
from bisam.perturbations import L2, Perturbation, geometry, is_radius
from bisam.schedules import Radius
from bisam.validation import MOST_QUERIES, finite, instance, non_negative, share, whole
from bisam.vector import TINY, Vector, power_of_two, widened


@dataclass(frozen=True, repr=False)
class ESAM(SAM):
    """Efficient SAM: perturbs a part of the weights and descends on a part of the examples (Du et al., 2022).

    Source: https://arxiv.org/abs/2110.03141. `RandomMask` selects the weights, and the first gradient is that of these
    weights only. The selected examples are those whose loss increases most under the perturbation, which takes a
    forward pass of the batch at w + e. As in the authors' code, the threshold is the k-th largest increase with k =
    gamma n, rounded down, and the k - 1 examples above it are selected. Here it is always at least one. Of several
    examples whose increase equals the threshold exactly, their code selects none; here the number of examples does not
    depend on their losses, so that no step waits for the device.

    Args:
        perturb: see `SAM`; a radius means `RandomMask(L2(rho), beta=0.6)`. The authors use rho 0.05 and beta 0.6 for
            ResNet-18, and 0.1 and 0.5 for WideResNets.
        ascent: see `SAM`; a bound such as `NegLog()` gives E-BiSAM.
        descent: see `SAM`.
        gamma: share of the examples that are selected, in (0, 1]; from 0.99 on all examples are used, as in the
            authors' code.
        select: objective whose increase selects the examples, one loss per example. Default: the training loss.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `gamma` is outside its range.

    Raises when called:
        TypeError: the selecting objective returns a scalar.
        ValueError: the number of its losses is not the number of examples.
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
        """Makes a query at w, then a forward pass and a query on the selected examples at w + e."""
        selects = self.gamma < _ALL
        if selects:
            examples(batch)  # refuses what it cannot choose from before anything is computed
        g = oracle.query(batch, self.ascent, wrt=self.part(oracle))
        e, before = self.displacement(g.gradient, oracle), replace(g, grad=None)
        del g  # frees its gradient
        if selects:
            select = at_step(self.select or oracle.loss, oracle.step)
            before = before.under(select).per_example
            rise = oracle.query(batch, select, at=e, grad=False).per_example - before
            batch = largest(rise, max(1, int(len(rise) * self.gamma) - 1), batch)
        return oracle.query(batch, self.descent, at=e, last=True)


_ALL = 0.99
"""The share from which on the authors of ESAM use all examples."""


def EBiSAM(
    rho: Perturbation | Radius = 0.05,
    bound: Bound = NegLog(),  # noqa: B008
    beta: float = 0.6,
    gamma: float = 0.5,
    select: Objective | None = None,
) -> ESAM:
    """Efficient BiSAM: ESAM whose adversary climbs the bound of BiSAM (Xie et al., 2024).

    Source: https://arxiv.org/abs/2407.12993. The pseudocode, and the loss that selects the examples, were not found in
    a public source; the default is the training loss, as in ESAM.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation of the part that `RandomMask` draws.
        bound: the bound, see `BiSAM`: `NegLog()` or `Tanh()`, or `Binary()` for one logit per label.
        beta: probability that a tensor is perturbed, in (0, 1].
        gamma: see `ESAM`.
        select: see `ESAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho`, `beta` or `gamma` is outside its range.
    """
    return ESAM(RandomMask(rho, beta), ascent=bound, gamma=gamma, select=select)


@dataclass(frozen=True, repr=False)
class LookSAM(SAM):
    """LookSAM: SAM at every `k`-th step; the steps in between reuse its change of the gradient (Liu et al., 2022).

    Source: https://arxiv.org/abs/2203.02714. A SAM step stores v, the component of h that is orthogonal to g; the other
    steps use g + alpha (||g||/||v||) v. The projection is that of the whole vector, as in the paper; the public ports
    project each tensor separately.

    Args:
        perturb: see `SAM`; the ports use rho 0.1.
        ascent: see `SAM`.
        descent: see `SAM`.
        k: interval in steps, >= 1; 1 is SAM.
        alpha: weight of the reused component, >= 0.

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
        """Makes two queries (three if `ascent` and `descent` differ) at every k-th step, and one at the others."""
        if oracle.step % self.k and "v" in oracle.state:
            answer, v = oracle.query(batch, self.descent), oracle.state["v"]
            g = answer.gradient
            return replace(answer, grad=g + v * (self.alpha * g.norm() / (v.norm() + TINY)))
        g, answer = self.both(oracle, batch)
        oracle.state["v"] = answer.gradient - answer.gradient.onto(g)
        return answer


@dataclass(frozen=True, repr=False)
class AESAM(SAM):
    """AE-SAM: SAM at steps whose gradient is unusually large, else the plain gradient (Jiang et al., 2023).

    Source: https://arxiv.org/abs/2304.14647. With running mean mu and variance var of ||g||^2, a step is a SAM step if
    ||g||^2 >= mu + c sqrt(var), where c changes linearly from `first` to `last` over `steps`. mu starts at the first
    ||g||^2 and var at 0, so the first step is a SAM step. The decision synchronises with the device once per step. In
    data-parallel training each replica decides independently, unless `scope="global"`. The number of forward passes
    then differs between replicas, and SyncBatchNorm, which waits in each pass, is refused. The defaults of `first`,
    `last` and `delta` are not confirmed by a source.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`.
        descent: see `SAM`.
        steps: length of the training run in steps, >= 1.
        first: c at the first step (lambda_2 of the paper).
        last: c after `steps` (lambda_1 of the paper); a smaller value makes more steps SAM steps.
        delta: decay of mu and var, in [0, 1].

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
        """Makes one query at the weights; at SAM steps one more, or two if `ascent` and `descent` differ."""
        answer = oracle.query(batch, self.descent)
        if not self._is_large(widened(answer.gradient.norm()) ** 2, oracle):
            return answer
        if self.ascent != self.descent:
            answer = oracle.query(batch, self.ascent, track=False, wrt=self.part(oracle))
        e, answer = self.displacement(answer.gradient, oracle), None  # frees its gradient
        return oracle.query(batch, self.descent, at=e)

    def _is_large(self, squared: Tensor, oracle: Oracle) -> bool:
        state, time = oracle.state, min(1.0, oracle.step / self.steps)
        mu = squared if "mu" not in state else state["mu"] * self.delta + squared * (1 - self.delta)
        var = (squared - mu) ** 2 * (1 - self.delta)
        state["mu"], state["var"] = mu, var if "var" not in state else state["var"] * self.delta + var
        c = time * self.last + (1 - time) * self.first
        return bool(squared >= mu + c * state["var"].sqrt())


@dataclass(frozen=True, repr=False)
class SSAMF(SAM):
    """SSAM-F: sparse SAM that perturbs the weights with the largest Fisher information only (Mi et al., 2022).

    Source: https://arxiv.org/abs/2210.05177. The diagonal Fisher information is the mean square of the gradients of the
    descent objective on single examples. They are the first ones of the batch; the authors draw 1,024 from the data
    set, every 5 epochs. The authors' mask is empty until its first update; this one is computed at the first step.

    Args:
        perturb: see `SAM`; its displacement is masked, and its norm is that over all weights.
        ascent: see `SAM`.
        descent: see `SAM`.
        keep: share of the entries that are perturbed, rounded up, in (0, 1]; 1 is SAM; the authors' sparsity is 1 -
            keep.
        every: interval between two computations of the mask in steps, >= 1.
        samples: number of single examples for the Fisher information, from 1 to 10,000; at most the batch size is used.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.

    Raises when called:
        ValueError: the model cannot train on a single example (raised by torch, for example by BatchNorm1d), or
            gradients are means over ranks (FSDP2): use `FisherSAM`.
    """

    keep: float = 0.8
    every: int = 1000
    samples: int = 16
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        share("keep", self.keep)
        whole("every", self.every)
        whole("samples", self.samples, most=10 * MOST_QUERIES)  # of single examples, which the authors draw 1,024 of

    def climb(self, oracle: Oracle, batch: Batch) -> Vector:
        """Returns the masked displacement."""
        if oracle.step % self.every == 0 or "mask" not in oracle.state:
            oracle.state["mask"] = self._mask(oracle, batch)
        return super().climb(oracle, batch) * oracle.state["mask"]

    def _mask(self, oracle: Oracle, batch: Batch) -> Vector:
        samples = min(self.samples, size(batch) or 1)
        _check_alone(oracle, samples)
        examples = (Query(take(batch, torch.tensor([i])), self.descent, track=False) for i in range(samples))
        return top(_sum_of_squares(oracle.ask([query])[0].gradient for query in examples), self.keep)


def _check_alone(oracle: Oracle, samples: int) -> None:
    if not oracle.is_local:
        raise ValueError(
            "SSAMF needs the gradients of single examples, and here a gradient is the mean over all ranks (sharded "
            "parameters, or a global perturbation): use FisherSAM, which takes the batch's"
        )
    oracle.agree("single examples", samples)


def _sum_of_squares(gradients: Iterable[Vector]) -> Vector:
    """Returns the sum of |g|^2 up to a factor; squares in units of the first gradient do not overflow."""
    unit, total = None, None
    for g in gradients:
        unit = power_of_two(g.norm()) if unit is None else unit
        a = g.abs() / unit
        total = a * a if total is None else total + a * a
        del g, a  # free their memory before the next query
    return cast(Vector, total)


@dataclass(frozen=True)
class MomentumSAM(Called):
    """Momentum-SAM: the gradient at a point ahead along the momentum, with one query per step (Becker et al., 2024).

    Source: https://arxiv.org/abs/2401.12033. v <- momentum v + h, and h is computed at w - rho v/||v||, with the v of
    the previous step; at the first step h is computed at w. v is the momentum buffer of SGD with this momentum and
    without weight decay, if each loss is one step. Under gradient accumulation it is updated at each micro-batch, and
    in data-parallel training each replica has its own. With `buffer` v is the optimizer's own momentum, as in the
    authors' code: it takes no memory, counts steps of the optimizer, and is that of all replicas. Between steps the
    model has its unperturbed weights. Running statistics are updated at the displaced point, because there is no query
    at the weights.

    Args:
        perturb: see `SAM`; it is applied to -v. The authors use rho 0.3 to 3.
        descent: see `SAM`.
        momentum: decay of v, in [0, 1); use the value of the optimizer. Without effect if there is a `buffer`.
        buffer: `momentum_of(optimizer)`, with the optimizer of the training loop. Default: the method keeps v.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `momentum` is outside its range.
    """

    perturb: Perturbation | Radius = field(default=L2(0.3))
    descent: Objective | None = None
    momentum: float = 0.9
    buffer: Callable[[Oracle], Vector | None] | None = None

    @property
    def stateful(self) -> bool:
        """Whether the method keeps the momentum."""
        return self.buffer is None

    def __post_init__(self) -> None:
        object.__setattr__(self, "perturb", geometry(self.perturb))
        if self.buffer is not None:
            instance("buffer", self.buffer, "momentum_of(optimizer)")
        if self.descent is not None:
            instance("descent", self.descent, "an objective such as bisam.cross_entropy")
        share("momentum", self.momentum, zero=True, one=False)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes one query."""
        v: Vector | None = oracle.state.get("v") if self.buffer is None else self.buffer(oracle)
        inside, perturb = oracle.within("perturb"), cast(Perturbation, self.perturb)
        answer = oracle.query(batch, self.descent, at=None if v is None else perturb(-v, inside), track=True)
        if self.buffer is None:
            oracle.state["v"] = answer.gradient if v is None else v * self.momentum + answer.gradient
        return answer


@dataclass(frozen=True, repr=False)
class SAMPa(SAM):
    """SAMPa: SAM whose two gradients are independent, so that two devices can compute them at once (Xie et al., 2024).

    Source: https://arxiv.org/abs/2410.10683. y is the point to which the optimizer would move along the gradient of the
    previous step. The gradient is (1 - lam) grad L(w + e) + lam grad L(y), where e climbs along the gradient at the
    previous y. As in the authors' code, the first term is computed on the batch of the previous step. As in the paper,
    the first y is w; the authors' code starts with a plain step instead. The method keeps a reference to the previous
    batch and not a copy, so a data loader must not reuse its tensors. A checkpoint of several ranks has the batch of
    each; another number of ranks begins anew with a warning, as at the first step. The reported loss and running
    statistics are those at y. On one device a step costs as much as a step of SAM.

    Args:
        perturb: see `SAM`; the authors use rho 0.1.
        ascent: see `SAM`.
        descent: see `SAM`.
        ahead: `next_step(optimizer)`, with the optimizer of the training loop.
        lam: weight of the gradient at y, in [0, 1]; 0 is SAMPa-0; the authors use 0.2 in vision and 0.1 in language.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `lam` is outside its range.
    """

    perturb: Perturbation | Radius = field(default=L2(0.1))
    ahead: Callable[[Vector, Oracle], Vector] = field(kw_only=True)
    lam: float = 0.2
    stateful: ClassVar[bool] = True
    concurrent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        instance("ahead", self.ahead, "next_step(optimizer)")
        share("lam", self.lam, zero=True)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two independent queries (three if `ascent` and `descent` differ); the first step also queries at w."""
        state, before = oracle.state, oracle.kept("batch")
        if before is None:
            _warn_of_lost_batch(state)
            state["gradients"] = [s.gradient for s in oracle.ask(looks(self, batch, None, track=False))]
        g, e = state["gradients"][0], self.displacement(state["gradients"][-1], oracle)
        late = Query(before or batch, self.descent, e, track=False)
        h, *seen = oracle.ask([late, *looks(self, batch, self.ahead(g, oracle), track=True)])
        oracle.keep("batch", batch)
        state["gradients"] = [s.gradient for s in seen]
        return replace(seen[0], grad=h.gradient * (1 - self.lam) + seen[0].gradient * self.lam)


def _warn_of_lost_batch(state: dict[str, Any]) -> None:
    if "gradients" in state:
        warnings.warn(
            "SAMPa was loaded from a checkpoint without the batch of this rank, because another number of ranks has "
            "saved it: this step begins anew, as the first step of training does",
            stacklevel=4,
        )
