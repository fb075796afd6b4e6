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
    SharpnessAware(game, ExtraGradient(gamma), loss), Lookahead(SGD(params, lr=lr))   # LA-EG
    SharpnessAware(game, ERM(), loss), Lookahead(SGD(params, lr=lr))                  # LA-GDA
"""

from __future__ import annotations

from dataclasses import dataclass

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.oracle import Oracle
from bisam.validation import MOST_QUERIES, positive, whole


@dataclass(frozen=True)
class RAPP:
    """Relaxed approximate proximal point: evaluates the operator near a proximal point (Pethick, Xie and Cevher, 2023).

    Source: https://arxiv.org/abs/2310.13459. The resolvent is approximated by `inner` steps that all start from the
    weights: d <- -gamma F(w + d), from d = 0. The last F is returned, so that SGD with learning rate lam gamma makes
    the relaxed step of the paper, w <- (1 - lam) w + lam (w + d). All inner steps use the same batch; the authors' code
    draws new ones.

    Args:
        gamma: step size of the inner steps, > 0; they converge if it is less than 1/L.
        inner: number of inner steps, from 1 to 1,000; 1 is gradient descent-ascent, 2 is EG+, the authors use 3 for
            their GANs.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    gamma: float
    inner: int = 3

    def __post_init__(self) -> None:
        positive("gamma", self.gamma)
        whole("inner", self.inner, most=MOST_QUERIES)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes `inner` queries."""
        answer = oracle.query(batch)
        for _ in range(1, self.inner):
            answer = oracle.query(batch, at=answer.gradient * -self.gamma)
        return answer


def ExtraGradient(gamma: float) -> RAPP:
    """The extragradient method: the operator at w - gamma F(w) (Korpelevich, 1976).

    With a learning rate of the optimizer that differs from `gamma` it is EG+.

    Args:
        gamma: step size of the extrapolation, > 0.

    Raises:
        TypeError: `gamma` is not a number.
        ValueError: `gamma` is not positive and finite.
    """
    return RAPP(gamma, inner=2)
