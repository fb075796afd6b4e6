"""Methods that combine the gradient at the weights with the gradient at the displaced weights.

If the adversary climbs another objective than the training loss (`ascent=NegLog()`), these methods still combine
gradients of the training loss, at the cost of one more query.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from bisam import schedules
from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.methods.sam import SAM, looks
from bisam.objectives import Bound, NegLog, Objective, at_step, count, mean
from bisam.oracle import Oracle, Query
from bisam.perturbations import L2, Perturbation, geometry
from bisam.schedules import Radius
from bisam.validation import MOST_QUERIES, flag, non_negative, positive, share, whole
from bisam.vector import TINY, Vector


def _start(method: SAM, oracle: Oracle, batch: Batch) -> tuple[Vector, Vector]:
    """Returns the gradient of the descent objective at the weights, and the displacement."""
    plain = None if method.ascent == method.descent else oracle.query(batch, method.descent, track=False)
    a = oracle.query(batch, method.ascent, wrt=None if plain is None else method.part(oracle))
    return (plain or a).gradient, method.displacement(a.gradient, oracle)


@dataclass(frozen=True, repr=False)
class GSAM(SAM):
    """GSAM: SAM that also reduces the gap between the perturbed and the plain loss (Zhuang et al., 2022).

    Source: https://arxiv.org/abs/2203.08065. The gradient is h - alpha u, where u is the component of the plain
    gradient that is orthogonal to the perturbed gradient h. In the paper rho follows the learning rate:
    `GSAM(L2(Follow(optimizer, ...)))`.

    Args:
        perturb: see `SAM`; the paper uses rho from 0.04 to 0.02 for ResNets and from 0.6 to 0.1 for vision
            transformers.
        ascent: see `SAM`.
        descent: see `SAM`.
        alpha: weight of the gap, >= 0; 0 is SAM. The paper uses 0.01 for ResNets and 0.4 to 1 for vision transformers.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `alpha` is negative or not finite.
    """

    alpha: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("alpha", self.alpha)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries; three if `ascent` and `descent` differ."""
        g, answer = self.both(oracle, batch)
        h = answer.gradient
        return replace(answer, grad=h - (g - g.onto(h)) * self.alpha)


def GBiSAM(rho: Perturbation | Radius = 0.05, bound: Bound = NegLog(), alpha: float = 0.4) -> GSAM:  # noqa: B008
    """GSAM whose adversary climbs the bound of BiSAM; the gap is that of the training loss.

    Args:
        rho: a radius >= 0 (a number or a schedule), or a perturbation such as `Adaptive(2.0)`.
        bound: the bound, see `BiSAM`: `NegLog()` or `Tanh()`, or `Binary()` for one logit per label.
        alpha: weight of the gap, >= 0; 0 is BiSAM.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho` or `alpha` is negative or not finite.
    """
    return GSAM(rho, ascent=bound, alpha=alpha)


@dataclass(frozen=True, repr=False)
class WSAM(SAM):
    """WSAM: sharpness as a weighted term, L + gamma/(1 - gamma) (L(w + e) - L) (Yue et al., 2023).

    Source: https://arxiv.org/abs/2305.15817. The method returns the gradient of that sum. With `decouple`, the default
    of the authors' code, the optimizer gets the gradient at the weights, and applies the sharpness term with the
    learning rate alone, outside of its momentum and preconditioner. Such an optimizer is
    `Decoupled(optimizer, sharp)`; with SGD without momentum both are the same.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`.
        descent: see `SAM`.
        gamma: weight of the sharpness, in [0, 1): 0 is ERM, 0.5 is SAM; the paper uses 0.8 to 0.95.
        decouple: whether the sharpness term is left to the optimizer, see `Decoupled`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `gamma` is outside its range.
    """

    gamma: float = 0.9
    decouple: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        share("gamma", self.gamma, zero=True, one=False)
        flag("decouple", self.decouple)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries; three if `ascent` and `descent` differ."""
        weight = self.gamma / (1 - self.gamma)
        g, answer = self.both(oracle, batch)
        if self.decouple:
            return replace(answer, grad=g, decoupled=(answer.gradient - g) * weight)
        return replace(answer, grad=answer.gradient * weight + g * (1 - weight))


def GNP(rho: Perturbation | Radius = 0.05, alpha: float = 0.8, ascent: Objective | None = None) -> WSAM:
    """GNP: the gradient (1 - alpha) g + alpha h, which penalises the norm of the gradient (Zhao et al., 2022).

    Source: https://arxiv.org/abs/2202.03599. To first order in rho it is the gradient of L + lambda ||grad L|| with
    lambda = alpha rho. The same as `WSAM(rho, ascent, gamma=alpha / (1 + alpha))`: both papers have one formula with
    different letters. Here g is the gradient itself, as in the paper; the authors' code has a setting, on by default,
    with which it is g/||g||. The default of alpha is this library's.

    Args:
        rho: a radius >= 0 (a number or a schedule), the r of the paper, or a perturbation.
        alpha: lambda/rho, >= 0; 0 is ERM, 1 is SAM.
        ascent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `rho` or `alpha` is negative or not finite.
    """
    non_negative("alpha", alpha)
    return WSAM(rho, ascent=ascent, gamma=alpha / (1 + alpha))


@dataclass(frozen=True, repr=False)
class StableSAM(SAM):
    """Stable SAM: the gradient of SAM, rescaled to the length of the plain gradient (Tan et al., 2024).

    Source: https://arxiv.org/abs/2401.07250. The returned gradient is h ||g||/||h||, with g the gradient at the weights
    and h that at w + e. SAM may need a smaller learning rate than SGD; with this rescaling it keeps SGD's.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`.
        descent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.
    """

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries; three if `ascent` and `descent` differ."""
        g, answer = self.both(oracle, batch)
        length, g, h = g.norm(), None, answer.gradient
        return replace(answer, grad=h * (length / (h.norm() + TINY)))


@dataclass(frozen=True, repr=False)
class SAGM(SAM):
    """SAGM: aligns the gradients of the plain and the perturbed loss (Wang et al., 2023).

    Source: https://arxiv.org/abs/2303.10353. The objective L(w) + L(w + e - alpha grad L(w)) has the sum of the plain
    and the perturbed loss and, to first order, alpha times the inner product of their gradients. As in the authors'
    code the returned gradient is the mean of the gradients g at w and h at w + e - alpha g, half of that of the sum.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`.
        descent: see `SAM`.
        alpha: weight of the alignment, >= 0; the authors use 0.001. With 0 it is the mean of SAM and ERM.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `alpha` is negative or not finite.
    """

    alpha: float = 0.001

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("alpha", self.alpha)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries; three if `ascent` and `descent` differ."""
        g, e = _start(self, oracle, batch)
        queries, e = [Query(batch, self.descent, e - g * self.alpha)], None  # the query owns the displacement
        answer = oracle.ask(queries)[0]
        return replace(answer, grad=(g + answer.gradient) * 0.5)


@dataclass(frozen=True, repr=False)
class BilateralSAM(SAM):
    """Bilateral SAM: flattens the loss on both sides, at w + e and at w - e (Deng et al., 2024).

    Source: https://arxiv.org/abs/2409.13173, where it is called BSAM; `bisam.BSAM` is the Bayesian one. With p the
    gradient at w + e, m that at w - behind e and g that at w, the returned gradient is p + g - (||p||/||m||) m, as in
    the authors' code. The first term is that of the max-sharpness, the others are that of the min-sharpness. Their code
    also leaves the weights at w - behind e before the step of the optimizer, by writing to the saved weights; here they
    are restored.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`.
        descent: see `SAM`.
        behind: length of the displacement behind, in units of the one ahead, a number >= 0 or a schedule. The authors
            anneal it with the learning rate, from 1 to 0: `Follow(optimizer, high=1.0)`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `behind` is negative or not finite.
    """

    behind: Radius = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        schedules.check("behind", self.behind)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes three queries, two of which are independent of each other; four if `ascent` and `descent` differ."""
        g, e = _start(self, oracle, batch)
        ratio = schedules.at(self.behind, oracle.step)
        ahead, behind = oracle.ask([Query(batch, self.descent, at) for at in (e, e * -ratio)])
        p, m = ahead.gradient, behind.gradient
        return replace(ahead, grad=p + g - m * (p.norm() / (m.norm() + TINY)))


@dataclass(frozen=True, repr=False)
class Lookbehind(SAM):
    """Lookbehind-SAM: several ascent steps, and a descent along the gradients at all their ends (Mordido et al., 2024).

    Source: https://arxiv.org/abs/2307.16704. Each ascent step has the whole radius and starts where the last one ended;
    h_i is the gradient at the end of step i. The authors let the optimizer take a step of the fast weights for each h_i
    and then move the slow weights by a share alpha of the way. The returned gradient is alpha (h_1 + ... + h_k): with
    SGD without momentum and weight decay this is the same, and with other optimizers it is one step instead of k.

    The authors compute the gradient at the end of a step twice, once for its descent and once for the next ascent. Here
    it is computed once, unless `ascent` and `descent` differ.

    Args:
        perturb: see `SAM`; the displacement of one ascent step. A stateful perturbation is updated at each.
        ascent: see `SAM`.
        descent: see `SAM`.
        steps: number of ascent steps k, from 1 to 1,000; 1 with `alpha` 1 is SAM. The authors use 2 to 10.
        alpha: step size of the slow weights, in (0, 1]; the authors use 0.2 to 0.8. None: adaptive, for each tensor (1
            + cos)/2 with the angle between h_1 and the sum.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `steps` or `alpha` is outside its range.
    """

    steps: int = 2
    alpha: float | None = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        whole("steps", self.steps, most=MOST_QUERIES)
        if self.alpha is not None:
            share("alpha", self.alpha)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes `steps` + 1 queries; 2 `steps` if `ascent` and `descent` differ."""
        ends = self._ends(oracle, batch)
        answer = next(ends)
        total = answer.gradient
        first = total if self.alpha is None else None
        for answer in ends:
            total = total + answer.gradient
        return replace(answer, grad=total * self.alpha if self.alpha is not None else _adaptive(first or total, total))

    def _ends(self, oracle: Oracle, batch: Batch) -> Iterator[Evaluation]:
        """Yields the answer at the end of each ascent step."""
        e = self.climb(oracle, batch)
        for left in reversed(range(self.steps)):
            answers = oracle.ask(looks(self, batch, e, track=False)[: 2 if left else 1])
            yield answers[0]
            if left:
                e = e + self.displacement(answers[-1].gradient, oracle)


def _adaptive(first: Vector, total: Vector) -> Vector:
    """Returns `total`, with each tensor times (1 + cos)/2 of its angle with that of `first`."""
    a, b = (v.whole() for v in (first, total))
    a, b = (v.like([t / (Vector([t]).norm() + TINY) for t in v], v.holes) for v in (a, b))
    factors = [(1 + cosine) / 2 for cosine in a.dots(b).unbind()]
    return total.like([t * f for t, f in zip(total, factors, strict=True)], total.holes)


@dataclass(frozen=True, repr=False)
class GAM(SAM):
    """GAM: flat to first order, where the largest norm of the gradient nearby is small (Zhang et al., 2023).

    Source: https://arxiv.org/abs/2303.03108, as in the authors' code. g0 is the gradient at w and g1 that at w + e, as
    in SAM. The norm of the gradient is climbed along g1 - g0, a difference quotient of it, to w + d; g2 is the gradient
    there, and g3 that after a step of SAM from there. With m = g0 + (1 - beta0) g2 and n = beta1 g1 + (1 - beta1) g3
    the returned gradient is n - gamma (m - m onto n).

    Args:
        perturb: see `SAM`; the displacement of both steps of SAM. A stateful perturbation is updated at each.
        ascent: see `SAM`; the norm that is climbed is that of its gradient.
        descent: see `SAM`.
        climb_norm: the same for the ascent of the norm.
        beta0: share of g0 against g2, in [0, 1].
        beta1: share of g1 against g3, in [0, 1].
        gamma: weight of the orthogonal component, >= 0. Defaults are those of the authors for ResNets on CIFAR-100; on
            CIFAR-10 they use rho 0.03, beta0 and beta1 0.1 and gamma 0.05.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    perturb: Perturbation | Radius = field(default=L2(0.02))
    climb_norm: Perturbation | Radius = field(default=L2(0.2))
    beta0: float = 0.5
    beta1: float = 0.6
    gamma: float = 0.03

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "climb_norm", geometry(self.climb_norm))
        share("beta0", self.beta0, zero=True)
        share("beta1", self.beta1, zero=True)
        non_negative("gamma", self.gamma)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes four queries; seven if `ascent` and `descent` differ."""
        m, a0 = self._look(oracle, batch, None, track=True)
        n, a1 = self._look(oracle, batch, self.displacement(a0, oracle))
        d = cast(Perturbation, self.climb_norm)(a1 - a0, oracle.within("climb_norm"))
        del a0, a1
        g2, a2 = self._look(oracle, batch, d)
        m = m + g2 * (1 - self.beta0)
        del g2
        queries, d, a2 = [Query(batch, self.descent, d + self.displacement(a2, oracle))], None, None
        answer = oracle.ask(queries)[0]
        n = n * self.beta1 + answer.gradient * (1 - self.beta1)
        return replace(answer, grad=n - (m - m.onto(n)) * self.gamma)

    def _look(self, oracle: Oracle, batch: Batch, at: Vector | None, track: bool = False) -> tuple[Vector, Vector]:
        """Returns the gradients of the descent and of the ascent objective at a point."""
        answers = oracle.ask(looks(self, batch, at, track))
        return answers[0].gradient, answers[-1].gradient


@dataclass(frozen=True, repr=False)
class CRSAM(SAM):
    """CR-SAM: SAM with a penalty on the curvature along the ascent direction, by finite differences (Wu et al., 2024).

    Source: https://arxiv.org/abs/2312.13555. With p and m the gradients at w + e and w - e and g the gradient at w, the
    returned gradient is p + gamma (p + m - 2 g) + beta (p - m).

    Args:
        perturb: see `SAM`; the authors use rho 0.1.
        ascent: see `SAM`.
        descent: see `SAM`.
        gamma: weight of the second difference, >= 0.
        beta: weight of the first difference, >= 0. With `gamma` and `beta` 0 it is SAM.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `gamma` or `beta` is negative or not finite.
    """

    perturb: Perturbation | Radius = field(default=L2(0.1))
    gamma: float = 0.1
    beta: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        non_negative("gamma", self.gamma)
        non_negative("beta", self.beta)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes three queries, two of which are independent of each other; four if `ascent` and `descent` differ."""
        g, e = _start(self, oracle, batch)
        ahead, behind = oracle.ask([Query(batch, self.descent, at) for at in (e, -e)])
        p, m = ahead.gradient, behind.gradient
        return replace(ahead, grad=p + (p + m - g * 2) * self.gamma + (p - m) * self.beta)


@dataclass(frozen=True, repr=False)
class XSAM(SAM):
    """XSAM: interpolates or extrapolates between the displacement and the gradient at its end (Chen and Zhou, 2026).

    Source: https://arxiv.org/abs/2603.10048. The gradient has the length of h = grad L(w + e), and the direction of the
    spherical interpolation from e/||e|| to h/||h|| at alpha. At every `every`-th step alpha is chosen from 0, 0.1, ...,
    2 as the value with the largest loss at distance `rho_max` in that direction, which takes 21 forward passes.

    Args:
        perturb: see `SAM`; the authors use rho 0.15.
        ascent: see `SAM`.
        descent: see `SAM`.
        rho_max: distance of the search, > 0.
        every: interval between two searches in steps, >= 1; the authors search once per epoch.
        alpha: fixed value, >= 0, which replaces the search; 1 is SAM. Default: search.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    perturb: Perturbation | Radius = field(default=L2(0.15))
    rho_max: float = 0.3
    every: int = 400
    alpha: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        positive("rho_max", self.rho_max)
        whole("every", self.every)
        if self.alpha is not None:
            non_negative("alpha", self.alpha)

    @property
    def stateful(self) -> bool:
        """Whether the method searches for alpha, which it then keeps between steps."""
        return self.alpha is None

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries, and 21 forward passes at each search."""
        e = self.climb(oracle, batch)
        answer = oracle.query(batch, self.descent, at=e)
        length = answer.gradient.norm()
        if self.alpha == 1:
            return answer
        between = partial(_slerp, e / (e.norm() + TINY), answer.gradient / (length + TINY))
        if self.alpha is None and (oracle.step % self.every == 0 or "alpha" not in oracle.state):
            grid = [i / 10 for i in range(21)]
            far = [oracle.query(batch, self.descent, at=between(a) * self.rho_max, grad=False).value for a in grid]
            oracle.state["alpha"] = torch.stack(far).argmax().to(length.dtype) / 10  # an integer / 10 would be float32
        return replace(answer, grad=between(oracle.state["alpha"] if self.alpha is None else self.alpha) * length)


def _slerp(a: Vector, b: Vector, alpha: float | Tensor) -> Vector:
    """Interpolates on the great circle from unit vector `a` (alpha 0) to `b` (alpha 1); returns their mean if equal."""
    angle = torch.acos(a.dot(b).clamp(-1, 1))
    sine = angle.sin()
    same = sine < 1e-8
    return a * torch.where(same, 0.5, torch.sin((1 - alpha) * angle) / sine) + b * torch.where(
        same, 0.5, torch.sin(alpha * angle) / sine
    )


@dataclass(frozen=True, repr=False)
class FunctionalSAM(SAM):
    """Functional SAM: perturbs the Jacobian but not the loss gradient at the outputs (Singh et al., 2025).

    Source: https://arxiv.org/abs/2502.02407. The gradient is J(w + e)^T c, where J is the Jacobian of the outputs, and
    c is the gradient of the loss with respect to the outputs at w. The preconditioned perturbation of the paper is not
    implemented.

    Args:
        perturb: see `SAM`.
        ascent: see `SAM`.
        descent: see `SAM`.

    Raises:
        TypeError: an argument has the wrong type.

    Raises when called:
        TypeError: the outputs of the model are not one tensor.
        ValueError: the loss has trainable parameters, which its linearisation would not train.
    """

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries; reports the loss at the weights."""
        g = oracle.query(batch, self.ascent, wrt=self.part(oracle))
        loss = at_step(self.descent or oracle.loss, oracle.step)
        e, plain = self.displacement(g.gradient, oracle), g.under(loss)
        del g  # frees its gradient
        answer = oracle.query(batch, _Tangent.of(plain), at=e)
        value, counted = oracle.averaged(plain.value, plain.count)
        return replace(answer, losses=plain.losses, value=value, count=counted, objective=loss)


@dataclass(frozen=True, eq=False)
class _Tangent:
    """The mean loss as a linear function of the outputs, up to a constant."""

    slope: Tensor

    @classmethod
    @torch.enable_grad()
    def of(cls, plain: Evaluation) -> _Tangent:
        _check_tangent(plain)
        assert plain.objective is not None
        half = (outputs := plain.outputs_of_model).dtype in (torch.float16, torch.bfloat16)
        outputs = (outputs.float() if half else outputs).detach().requires_grad_()
        losses = plain.objective(outputs, plain.targets)
        counted = count(losses, plain.targets, plain.objective) if losses.dim() else plain.count  # on this rank
        value = mean(losses, counted)
        return cls(torch.autograd.grad(value, outputs)[0])

    def __call__(self, outputs: Tensor, targets: object) -> Tensor:
        return (outputs * self.slope.conj()).real.sum()  # of complex outputs the real inner product

    def of_part(self, start: int, stop: int, n: int) -> _Tangent:
        """Returns the function of a part of the batch, see `Accumulated`."""
        return _Tangent(self.slope[start:stop] * (n / (stop - start)))


def _check_tangent(plain: Evaluation) -> None:
    if not isinstance(plain.outputs, Tensor):
        raise TypeError(
            f"FunctionalSAM needs outputs that are one tensor, got {type(plain.outputs).__name__}: give SharpnessAware "
            "a `forward` that returns (logits, targets)"
        )
    loss = getattr(plain.objective, "loss", plain.objective)  # that inside a loss with the term of SAF or MESA
    if isinstance(loss, nn.Module) and any(p.requires_grad for p in loss.parameters()):
        raise ValueError(
            f"FunctionalSAM cannot train the parameters of the loss {type(loss).__name__}: put them into "
            "the model, or use another method"
        )
