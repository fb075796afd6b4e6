"""Methods for min-max problems, where gradient descent-ascent may cycle instead of converging.

A game is a loss whose gradient is the operator of the game. For min over x, max over y of f(x, y) the loss is
`f(x, y.detach()) - f(x.detach(), y)`, and both players are parameters of one module:

    >>> import torch
    >>> from bisam import RAPP, SharpnessAware
    >>> class Game(torch.nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.x, self.y = (torch.nn.Parameter(torch.ones(())) for _ in range(2))
    ...     def forward(self):
    ...         return self.x * self.y.detach() - self.x.detach() * self.y
    >>> game, gamma, lam = Game(), 0.5, 0.5
    >>> forward = lambda game: (game(), None)
    >>> sharp = SharpnessAware(game, RAPP(gamma), lambda value, _: value, forward)
    >>> optimizer = torch.optim.SGD(game.parameters(), lr=lam * gamma)
    >>> for _ in range(100):
    ...     optimizer.zero_grad()
    ...     sharp().backward()
    ...     optimizer.step()
    >>> bool(abs(game.x) < 1e-3 and abs(game.y) < 1e-3)    # the solution is (0, 0)
    True

The algorithms of Pethick, Xie and Cevher (2023) are combinations of a method and an optimizer:

    SharpnessAware(game, RAPP(gamma), loss), SGD(params, lr=lam * gamma)              # the paper's RAPP
    SharpnessAware(game, ExtraGradient(gamma), loss), SGD(params, lr=gamma)           # EG
    SharpnessAware(game, ExtraGradient(gamma), loss), SGD(params, lr=gamma / 2)       # EG+
    SharpnessAware(game, ERM(), loss), Lookahead(SGD(params, lr=lr))                  # LA-GDA
    SharpnessAware(game, ExtraGradient(gamma), loss), Lookahead(SGD(params, lr=gamma))               # LA-EG
    SharpnessAware(game, CEGPlus(gamma, prox), loss), Lookahead(SGD(params, lr=alpha * gamma))       # LA-CEG+

`ProximalPoint(optimizer)` makes the same steps in an optimizer, for Adam and for players that take turns.

With a constraint or a regulariser g (`bisam.proximal`), a method returns F(z) + xi, where xi = (p - z')/gamma is a
subgradient of g at z' = prox(p) and p = w - gamma F(z). Then w - gamma (F + xi) is z', and SGD with learning rate
lam gamma makes the relaxed step w <- (1 - lam) w + lam z'. Where the constraint is not active, xi is 0 and the gradient
is that without a constraint, bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.oracle import Oracle, Query
from bisam.proximal import Prox, Separable, proximal
from bisam.validation import MOST_QUERIES, flag, positive, whole
from bisam.vector import Vector


@dataclass(frozen=True)
class RAPP:
    """Relaxed approximate proximal point: evaluates the operator near a proximal point (Pethick, Xie and Cevher, 2023).

    Source: https://arxiv.org/abs/2310.13459. The resolvent is approximated by `inner` steps that all start from the
    weights: z <- prox(w - gamma F(z)), from z = w. The last F is returned (with `prox`, plus a subgradient of the
    regulariser), so that SGD with learning rate lam gamma makes the relaxed step w <- (1 - lam) w + lam z of the paper.
    If w satisfies a convex constraint and lam is in (0, 1], the next w does too. With `inner=1` and a learning rate of
    gamma it is projected gradient descent-ascent.

    Args:
        gamma: step size of the inner steps, > 0; they converge if it is less than 1/L. Players with step sizes of their
            own multiply their losses by the ratio of the step sizes.
        inner: number of inner steps, from 1 to 1,000; 1 is gradient descent-ascent, 2 is EG+, the authors use 3 for
            their GANs.
        prox: proximal operator of the constraints or the regulariser: `Box(-1.0, 1.0)`, `L1(weight)`, `Simplex()` (all
            of `bisam.proximal`), a mapping from names of parameters or modules to such operators, or a function
            `(point, oracle, gamma) -> Vector`. Default: none.
        fresh: if True, each inner step has a batch of its own, as in the authors' code: the loss is called with `inner`
            batches, `sharp(*batches)`, and each is a tuple of what a call with one batch takes. Default: all inner
            steps use the same batch.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.

    Raises when called:
        ValueError: `fresh` is True and the number of batches is not `inner`; or `prox` names a parameter that the model
            does not have.

    Example:
        >>> import torch
        >>> from bisam import RAPP, SharpnessAware
        >>> from bisam.proximal import Box
        >>> w = torch.nn.ParameterList([torch.tensor([3.0, 0.5])])
        >>> method, forward = RAPP(0.1, prox=Box(-1.0, 1.0)), lambda w: (w[0].square().sum(), None)
        >>> sharp = SharpnessAware(w, method, lambda value, _: value, forward)
        >>> optimizer = torch.optim.SGD(w.parameters(), lr=1.0 * 0.1)    # lam = 1
        >>> sharp().backward()
        >>> optimizer.step()
        >>> w[0].data    # 3 is projected to 1; 0.5 moves against its gradient
        tensor([1.0000, 0.4160])
    """

    gamma: float
    inner: int = 3
    prox: Prox | Mapping[str, Separable] | None = None
    fresh: bool = False

    def __post_init__(self) -> None:
        positive("gamma", self.gamma)
        whole("inner", self.inner, most=MOST_QUERIES)
        object.__setattr__(self, "prox", proximal(self.prox))
        flag("fresh", self.fresh)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes `inner` queries."""
        first, *others = _batches(batch, self.inner) if self.fresh else [batch] * self.inner
        answer = oracle.query(first)
        for other in others:
            if self.fresh:
                oracle.next_part()
            answer = oracle.query(other, at=self._operator(answer, oracle) * -self.gamma)
        return answer if self.prox is None else replace(answer, grad=self._operator(answer, oracle))

    def _operator(self, answer: Evaluation, oracle: Oracle) -> Vector:
        xi = _subgradient(self.prox, answer.gradient, oracle, self.gamma)
        return answer.gradient if xi is None else answer.gradient + xi


def ExtraGradient(gamma: float, prox: Prox | Mapping[str, Separable] | None = None, fresh: bool = False) -> RAPP:
    """The extragradient method: the operator at prox(w - gamma F(w)) (Korpelevich, 1976).

    With a learning rate of the optimizer that differs from `gamma` it is EG+. With a constraint and a learning rate of
    gamma it is Korpelevich's projected method, which projects both half steps; see `CEGPlus` for one that projects the
    first alone.

    Args:
        gamma: step size of the extrapolation, > 0.
        prox: see `RAPP`.
        fresh: see `RAPP`; a call takes two batches.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `gamma` is not positive and finite.
    """
    return RAPP(gamma, inner=2, prox=prox, fresh=fresh)


@dataclass(frozen=True)
class CEGPlus:
    """CEG+: constrained extragradient with a smaller second step (Pethick et al., 2022).

    Source: https://arxiv.org/abs/2302.09831. With H = id - gamma F the paper's step is z = prox(H w),
    w <- w + alpha (H z - H w), which SGD with learning rate alpha gamma makes; the authors use gamma = 1/L and
    alpha = 1/2. Inside `Lookahead` it is LA-CEG+. Without a constraint it is `ExtraGradient(gamma)`, and with alpha = 1
    Tseng's forward-backward-forward method. The weights w may be outside of the constraint, z is inside:
    `prox.of(w, gamma)` projects the final weights.

    Args:
        gamma: step size of the extrapolation, > 0.
        prox: see `RAPP`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `gamma` is not positive and finite.

    Raises when called:
        ValueError: `prox` names a parameter that the model does not have.
    """

    gamma: float
    prox: Prox | Mapping[str, Separable] | None = None

    def __post_init__(self) -> None:
        positive("gamma", self.gamma)
        object.__setattr__(self, "prox", proximal(self.prox))

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries: at w and at z."""
        e = oracle.query(batch).gradient
        xi = _subgradient(self.prox, e, oracle, self.gamma)
        e = e * -self.gamma if xi is None else (e + xi) * -self.gamma
        queries, e = [Query(batch, at=e)], None
        answer = oracle.ask(queries)[0]
        return answer if xi is None else replace(answer, grad=answer.gradient + xi)


def _subgradient(prox: Any, operator: Vector, oracle: Oracle, gamma: float) -> Vector | None:
    """Returns (p - prox(p))/gamma for p = w - gamma F, a subgradient of the regulariser at prox(p), if there is one."""
    if prox is None:
        return None
    moved = oracle.weights - operator * gamma
    point = moved.like(moved.tensors, operator.holes)  # a free parameter that the loss does not use stays a hole
    return (point - cast(Prox, prox)(point, oracle, gamma)) / gamma


def _batches(batch: Batch, inner: int) -> list[Batch]:
    if len(batch) != inner:
        raise ValueError(
            f"with fresh=True each of the {inner} inner steps has a batch of its own: call the loss with {inner} "
            f"batches, as in sharp(*batches), got {len(batch)}"
        )
    return [tuple(part) if isinstance(part, tuple | list) else (part,) for part in batch]
