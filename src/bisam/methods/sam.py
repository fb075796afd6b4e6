"""SAM, and its variants that differ in the perturbation or in the objective of the adversary.

`SAM` takes any perturbation and any objective; the functions below it return named combinations:

    >>> from bisam import SAM, L2, Adaptive, MultiStepSAM, NegLog, Tanh
    >>> from bisam.perturbations import Friendly
    >>> SAM(0.1)                                          # a number is a radius: L2(0.1)
    SAM(0.1)
    >>> bisam_tanh = SAM(0.1, ascent=Tanh())              # the adversary climbs BiSAM's bound of the 0-1 loss
    >>> abisam = SAM(Adaptive(0.5, eta=0.01), ascent=NegLog())
    >>> unnamed = SAM(Friendly(Adaptive(2.0)), ascent=NegLog())    # any combination
    >>> three_steps = MultiStepSAM(L2(0.1), steps=3)
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

import torch

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.masks import DropGrow, FisherMask
from bisam.methods.method import follows_flips
from bisam.methods.written import Written
from bisam.objectives import Bound, NegLog, Objective
from bisam.oracle import Oracle, Query
from bisam.perturbations import (
    L2,
    Adaptive,
    Centralised,
    Friendly,
    LossEquated,
    NormLayers,
    Part,
    Perturbation,
    Smoothed,
    ZScore,
    geometry,
    learn,
    needed,
)
from bisam.schedules import Radius
from bisam.validation import MOST_QUERIES, finite, instance, non_negative, positive, whole
from bisam.vector import TINY, Vector, widened


@dataclass(frozen=True)
class ERM:
    """Empirical risk minimisation: the plain gradient at the weights.

    Training with `ERM()` is training with the base optimizer alone.
    """

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes one query, at the weights."""
        return oracle.query(batch, last=True)


@dataclass(frozen=True, repr=False)
class SAM(Written):
    """Sharpness-aware minimisation: the gradient at the worst point near the weights (Foret et al., 2021).

    Source: https://arxiv.org/abs/2010.01412. A step makes two queries. The first computes the ascent gradient g at the
    weights w, the second the descent gradient at w + e, where `perturb` computes the displacement e from g; nothing is
    differentiated through e. The first computes no more of g than `perturb` needs: a part, if that displaces a part of
    the weights (`NormLayers`, `Only`, `RandomMask`).

    Args:
        perturb: a perturbation `(gradient, oracle) -> displacement`, or a radius `rho` >= 0 (a number or a schedule),
            which means `L2(rho)`. Default: `L2(0.05)`.
        ascent: objective that the adversary climbs, `(outputs, targets) -> losses`. Default: the training loss. A
            bound such as `NegLog()` or `Tanh()` gives BiSAM.
        descent: objective that is minimised at w + e. Default: the training loss.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the radius is negative or not finite.

    Example:
        >>> import torch
        >>> from bisam import SAM, SharpnessAware, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> x, y = torch.randn(8, 4), torch.randint(3, (8,))
        >>> sharp = SharpnessAware(model, SAM(0.05), cross_entropy)
        >>> loss = sharp(x, y)
        >>> loss.backward()
        >>> optimizer.step()
        >>> bool(loss > sharp.clean.value)    # the loss at w + e is larger than the loss at w
        True
    """

    perturb: Perturbation | Radius = field(default=L2(0.05))
    ascent: Objective | None = None
    descent: Objective | None = None
    counts_flips: ClassVar[bool] = True
    _follows_flips: ClassVar[bool] = False  # of most instances, and of pickles of earlier versions

    def __post_init__(self) -> None:
        object.__setattr__(self, "perturb", geometry(self.perturb))
        if follows_flips(self.perturb):
            object.__setattr__(self, "_follows_flips", True)
        for name, objective in (("ascent", self.ascent), ("descent", self.descent)):
            if objective is not None:
                instance(name, objective, "an objective such as NegLog()")

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries: at w and at w + e."""
        if self._follows_flips:
            return _with_flips(self, oracle, batch)
        return oracle.query(batch, self.descent, at=self.climb(oracle, batch), last=True)

    def climb(self, oracle: Oracle, batch: Batch) -> Vector:
        """Returns the displacement e. A separate method, so that the ascent gradient is freed when it returns."""
        return self.displacement(oracle.query(batch, self.ascent, wrt=self.part(oracle)).gradient, oracle)

    def part(self, oracle: Oracle) -> Part:
        """Returns the tensors whose gradient the next `displacement` needs; None for all."""
        return needed(cast(Perturbation, self.perturb), oracle.within("perturb"))

    def displacement(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the displacement for an ascent gradient."""
        return cast(Perturbation, self.perturb)(gradient, oracle.within("perturb"))

    def both(self, oracle: Oracle, batch: Batch) -> tuple[Vector, Evaluation]:
        """Returns the gradient of the descent objective at the weights, and the answer at w + e.

        For methods that combine the two gradients. If `ascent` is another objective than `descent`, this costs one more
        query.
        """
        g = oracle.query(batch, self.descent, track=None if self.ascent == self.descent else False).gradient
        if self.ascent == self.descent:
            return g, oracle.query(batch, self.descent, at=self.displacement(g, oracle))
        return g, oracle.query(batch, self.descent, at=self.climb(oracle, batch))


def _with_flips(sam: SAM, oracle: Oracle, batch: Batch) -> Evaluation:
    """The step of SAM, after which a radius learns which predictions it has flipped."""
    g = oracle.query(batch, sam.ascent, wrt=sam.part(oracle))
    correct, e = g.correct, [sam.displacement(g.gradient, oracle)]
    del g  # frees its gradient
    answer = oracle.query(batch, sam.descent, at=e.pop(), last=True)
    learn(cast(Perturbation, sam.perturb), correct, answer, oracle.within("perturb"))
    return answer


def looks(method: SAM, batch: Batch, at: Vector | None, track: bool) -> list[Query]:
    """Returns queries for the gradients of both objectives of a method at a point: one query if they are the same."""
    look = Query(batch, method.descent, at, track=track)
    return [look] if method.ascent == method.descent else [look, Query(batch, method.ascent, at, track=False)]


def BiSAM(rho: Perturbation | Radius = 0.05, bound: Bound = NegLog(), descent: Objective | None = None) -> SAM:  # noqa: B008
    """BiSAM: SAM whose adversary climbs Q, a lower bound of the 0-1 loss up to log(K)/mu (Xie et al., 2024).

    Source: https://arxiv.org/abs/2407.12993. `LowerBound` states which properties hold for Q and which only for its
    parts. Where labels are smoothed, SAM climbs the smoothed loss and BiSAM does not:
    `SAM(rho, ascent=cross_entropy)` is the control that separates the bound from this difference.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation such as `Adaptive(2.0)`.
        bound: the bound: `NegLog()` for BiSAM (-log), which the paper recommends, or `Tanh()` for BiSAM (tanh);
            for a binary head or several labels per example, `Binary()` around one of them.
        descent: objective that is minimised at the displaced weights. Default: the training loss.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho` is negative or not finite.

    Example:
        >>> import torch
        >>> from bisam import BiSAM, SharpnessAware, Tanh, cross_entropy
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(4, 3)
        >>> sharp = SharpnessAware(model, BiSAM(rho=0.1, bound=Tanh()), cross_entropy)
        >>> sharp(torch.randn(8, 4), torch.randint(3, (8,))).backward()
        >>> model.weight.grad.shape
        torch.Size([3, 4])
    """
    return SAM(rho, ascent=bound, descent=descent)


def ASAM(rho: Radius, eta: float = 0.0, ascent: Objective | None = None) -> SAM:
    """Adaptive SAM: SAM in a neighbourhood that scales with the weights (Kwon et al., 2021).

    Source: https://arxiv.org/abs/2102.11600. All parameters are scaled, as in most ports;
    `SAM(Adaptive(rho, eta, where=...))` scales the parameters that the authors' code scales (see `Adaptive`).

    Args:
        rho: radius, >= 0, a number or a schedule.
        eta: added to the magnitude of each weight, >= 0.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho` or `eta` is negative or not finite.
    """
    return SAM(Adaptive(rho, eta), ascent=ascent)


def ABiSAM(rho: Radius, bound: Bound = NegLog(), eta: float = 0.0) -> SAM:  # noqa: B008
    """Adaptive BiSAM: the neighbourhood of ASAM and the adversary of BiSAM (Xie et al., 2024).

    Source: https://arxiv.org/abs/2407.12993. This follows the authors' code; the paper's pseudocode was not found in a
    public source.

    Args:
        rho: radius, >= 0, a number or a schedule.
        bound: see `BiSAM`.
        eta: added to the magnitude of each weight, >= 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho` or `eta` is negative or not finite.
    """
    return SAM(Adaptive(rho, eta), ascent=bound)


def FSAM(
    rho: Perturbation | Radius = 0.05, sigma: float = 1.0, lam: float = 0.9, ascent: Objective | None = None
) -> SAM:
    """Friendly SAM: climbs the part of the gradient that is specific to the batch (Li et al., 2024).

    Source: https://arxiv.org/abs/2403.12350. The same as `SAM(Friendly(rho, sigma, lam), ascent)`.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation that is applied to the filtered gradient.
        sigma: factor of the average gradient that is subtracted, >= 0; 0 is SAM.
        lam: decay of the average, in [0, 1]; the authors use 0.6 to 0.95.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho`, `sigma` or `lam` is outside its range.
    """
    return SAM(Friendly(rho, sigma, lam), ascent=ascent)


def VaSSO(rho: Perturbation | Radius = 0.05, theta: float = 0.9, ascent: Objective | None = None) -> SAM:
    """VaSSO: SAM along a running average of the gradient (Li and Giannakis, 2023).

    Source: https://arxiv.org/abs/2309.15639. The same as `SAM(Smoothed(rho, theta), ascent)`.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation that is applied to the averaged gradient.
        theta: weight of the new gradient in the average, in (0, 1]; 1 is SAM.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho` or `theta` is outside its range.
    """
    return SAM(Smoothed(rho, theta), ascent=ascent)


def ZSharp(rho: Perturbation | Radius = 0.05, keep: float = 0.05, ascent: Objective | None = None) -> SAM:
    """ZSharp: SAM along the entries of the gradient with the largest z-scores (Yun, 2025).

    Source: https://arxiv.org/abs/2505.02369. The same as `SAM(ZScore(rho, keep), ascent)`. As in the paper all tensors
    share one radius; `ZSharp(PerTensor(rho))` gives each its own, as the authors' code does.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation that is applied to the filtered gradient.
        keep: share of the entries of each tensor that are kept, rounded up, in (0, 1]; 1 is SAM.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho` or `keep` is outside its range.
    """
    return SAM(ZScore(rho, keep), ascent=ascent)


def GCSAM(rho: Perturbation | Radius = 0.05, ascent: Objective | None = None) -> SAM:
    """GCSAM: SAM along the centralised gradient (Hassan et al., 2025).

    Source: https://arxiv.org/abs/2501.11584. The same as `SAM(Centralised(rho), ascent)`.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation that is applied to the centralised gradient.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho` is negative or not finite.
    """
    return SAM(Centralised(rho), ascent=ascent)


def SAMON(rho: Perturbation | Radius = 0.05, ascent: Objective | None = None) -> SAM:
    """SAM-ON: SAM that perturbs the normalisation layers only (Mueller et al., 2023).

    Source: https://arxiv.org/abs/2306.04226. The same as `SAM(NormLayers(rho), ascent)`; `SAMON(Adaptive(rho))` is the
    authors' adaptive form.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation that is applied to the gradient of these layers.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho` is negative or not finite.

    Raises when called:
        ValueError: the model has no trainable normalisation layer.
    """
    return SAM(NormLayers(rho), ascent=ascent)


def LESAM(sigma: Radius = 0.05, rho_max: float = 0.5, ascent: Objective | None = None) -> SAM:
    """LE-SAM: SAM with a given increase of the loss in place of a radius (Wang et al., 2026).

    Source: https://arxiv.org/abs/2605.10183. The same as `SAM(LossEquated(sigma, rho_max), ascent)`. The authors'
    values of `sigma` and `rho_max` were not found in a public source; the defaults are this library's. A third party's
    summary says that sigma is annealed to 0 over the final epochs: `Cosine(sigma, 0.0, steps=..., begin=...)`.

    Args:
        sigma: increase of the loss to first order, >= 0, a number or a schedule.
        rho_max: largest radius, > 0.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `sigma` or `rho_max` is outside its range.
    """
    return SAM(LossEquated(sigma, rho_max), ascent=ascent)


def FisherSAM(
    rho: Perturbation | Radius = 0.05, keep: float = 0.1, every: int = 100, ascent: Objective | None = None
) -> SAM:
    """FisherSAM: SAM on the weights with the largest Fisher information (Zhong et al., 2022).

    Source: https://arxiv.org/abs/2210.05497. The same as `SAM(FisherMask(rho, keep, every), ascent)`.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation whose displacement is masked.
        keep: share of the maskable entries that are perturbed, rounded up, in (0, 1]; 1 is SAM.
        every: interval between two computations of the mask in steps, >= 1.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho`, `keep` or `every` is outside its range.
    """
    return SAM(FisherMask(rho, keep, every), ascent=ascent)


def SSAMD(
    rho: Perturbation | Radius = 0.05,
    keep: float = 0.5,
    drop: float = 0.5,
    every: int = 1000,
    steps: int | None = None,
    ascent: Objective | None = None,
) -> SAM:
    """SSAM-D: sparse SAM whose mask changes by dropping and growing weights (Mi et al., 2022).

    Source: https://arxiv.org/abs/2210.05177. The same as `SAM(DropGrow(rho, keep, drop, every, steps), ascent)`.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation whose displacement is masked.
        keep: share of the entries that are perturbed, rounded up, in (0, 1]; 1 is SAM.
        drop: share of the mask that is replaced at each update, in [0, 1].
        every: interval between two updates of the mask in steps, >= 1.
        steps: length of the training run in steps, over which `drop` decays to 0 along a cosine. Default: no decay.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """
    return SAM(DropGrow(rho, keep, drop, every, steps), ascent=ascent)


@dataclass(frozen=True, repr=False)
class MultiStepSAM(SAM):
    """SAM with several ascent steps, each with an equal share of the radius (Foret et al., 2021).

    Source: https://arxiv.org/abs/2010.01412. The displacement is the sum of the steps, so it is not longer than that of
    one step of SAM. A training step makes `steps` + 1 queries.

    Args:
        perturb: see `SAM`; the displacement of one ascent step, which is multiplied by 1 / `steps`. A stateful
            perturbation is updated at each ascent step.
        ascent: see `SAM`.
        descent: see `SAM`.
        steps: number of ascent steps, from 1 to 1,000; 1 is SAM.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `steps` is outside its range.
    """

    steps: int = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("steps", self.steps, most=MOST_QUERIES)

    def climb(self, oracle: Oracle, batch: Batch) -> Vector:
        """Returns the displacement; makes `steps` queries."""
        e = super().climb(oracle, batch) * (1 / self.steps)
        for _ in range(1, self.steps):
            wrt = self.part(oracle)
            further = self.displacement(oracle.query(batch, self.ascent, at=e, wrt=wrt).gradient, oracle)
            e = e + further * (1 / self.steps)
        return e


@dataclass(frozen=True, repr=False)
class EigenSAM(SAM):
    """Eigen-SAM: turns the ascent towards the top eigenvector of the Hessian (Luo et al., 2024).

    Source: https://arxiv.org/abs/2501.12666, as in the authors' code. With the unit eigenvector v and the ascent
    gradient g the displacement is that of SAM along g/||g|| + alpha sign(<g, v>) u, where u is the component of v that
    is orthogonal to g; it is longer than that of SAM by the length of this sum, at most sqrt(1 + alpha^2).

    v is estimated by `iterations` steps of power iteration for the Hessian of the descent objective on the batch, at
    every `every`-th step, beginning with the last v. Products with the Hessian are central differences of gradients,
    in eval mode, in which dropout is off and running statistics are constants. The authors compute the products by a
    second backward pass, and have no v before step `every`; here there is one from the first step on.

    Args:
        perturb: see `SAM`; the authors use rho 0.1 on CIFAR-100.
        ascent: see `SAM`.
        descent: see `SAM`.
        alpha: weight of the eigenvector, >= 0; 0 is SAM. The authors use 0.2.
        every: interval between two estimates in steps, >= 1.
        iterations: steps of power iteration, from 1 to 1,000; each takes two gradients.
        r: distance of the differences from the weights, > 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    alpha: float = 0.2
    every: int = 100
    iterations: int = 5
    r: float = 0.01
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("alpha", self.alpha)
        whole("every", self.every)
        whole("iterations", self.iterations, most=MOST_QUERIES)
        positive("r", self.r)

    def climb(self, oracle: Oracle, batch: Batch) -> Vector:
        """Returns the displacement; makes 2 `iterations` more queries at steps that estimate the eigenvector."""
        g = oracle.query(batch, self.ascent).gradient
        if oracle.step % self.every == 0 or "v" not in oracle.state:
            oracle.state["v"] = self._eigenvector(oracle, batch, g)
        v, length = cast(Vector, oracle.state["v"]), g.norm()
        g = g + (v - v.onto(g)) * (torch.sign(g.dot(v)) * length * self.alpha)
        return self.displacement(g, oracle) * (g.norm() / (length + TINY))

    def _eigenvector(self, oracle: Oracle, batch: Batch, g: Vector) -> Vector:
        v: Vector = oracle.state.get("v") or oracle.weights.random(torch.randn_like)
        for _ in range(self.iterations):
            # Where the Hessian times the last v was 0 it would stay 0: such a v begins again with the gradient.
            v = _unit(v + g * (v.norm() == 0)) * self.r
            ends = oracle.ask([Query(batch, self.descent, at, buffers=oracle.buffers) for at in (v, -v)])
            v = ends[0].gradient - ends[1].gradient
            del ends  # frees the gradients before the next queries
        return _unit(v)


def _unit(v: Vector) -> Vector:
    """Returns v / ||v||, and 0 for 0."""
    return v / (v.norm() + TINY)


@dataclass(frozen=True, repr=False)
class SAMSPS(SAM):
    """SAM-SPS: SAM with a Polyak step in place of a learning rate (Oikonomou and Loizou, 2026).

    Source: https://arxiv.org/abs/2606.01827, as in the authors' code. With h the gradient at w + e the step size is
    gamma = min([L(w + e) - floor - <h, e>]_+ / ||h||^2, gamma_b), and the returned gradient is gamma (h + weight_decay
    w). A method sets no learning rate: use SGD with learning rate 1 and without momentum and weight decay, whose step
    is then that of the paper.

    Args:
        perturb: see `SAM`; the authors use rho 0.1.
        ascent: see `SAM`.
        descent: see `SAM`.
        floor: lower bound of the loss of a batch, a finite number; 0 for cross-entropy without label smoothing.
        gamma_b: largest step size, > 0.
        weight_decay: L2 penalty, >= 0; the authors use 5e-4.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    perturb: Perturbation | Radius = field(default=L2(0.1))
    floor: float = 0.0
    gamma_b: float = 1.0
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        finite("floor", self.floor)
        positive("gamma_b", self.gamma_b)
        non_negative("weight_decay", self.weight_decay)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries."""
        e = self.climb(oracle, batch)
        answer = oracle.query(batch, self.descent, at=e)
        h, length = answer.gradient, answer.gradient.norm() + TINY
        gain = widened(answer.value) - self.floor - h.dot(e)
        gamma = (gain.clamp_min(0) / length / length).clamp_max(self.gamma_b)
        if self.weight_decay:
            h = h.like((h + oracle.weights * self.weight_decay).tensors, h.holes)
        return replace(answer, grad=h * gamma)
