"""Methods for min-max problems, where following the gradient goes round in circles.

A game is a loss whose gradient is the game's operator: for min over x, max over y of f(x, y) it is
`f(x, y.detach()) - f(x.detach(), y)`, and both players are parameters of one module. Then

    SharpnessAware(game, RAPP(gamma), loss) with SGD(lr=lam * gamma)          # relaxed approximate proximal point
    SharpnessAware(game, ExtraGradient(gamma), loss) with Lookahead(SGD(lr))  # LA-EG
    SharpnessAware(game, ERM(), loss) with Lookahead(SGD(lr))                 # LA-GDA
"""

from __future__ import annotations

from dataclasses import dataclass

from bisam.evaluation import Batch, Evaluation
from bisam.oracle import Oracle
from bisam.validation import positive, whole


@dataclass(frozen=True)
class RAPP:
    """The operator at an approximate proximal point (Pethick, Xie and Cevher, 2023).

    https://arxiv.org/abs/2310.13459. The resolvent is approximated by `inner` steps that all start from the weights:
    d <- -gamma F(w + d), from d = 0. The last F is returned, so that SGD with learning rate lam gamma does the paper's
    relaxed step, w <- (1 - lam) w + lam (w + d). All steps are taken on the same batch, where the authors' code draws
    new ones.

    Args:
        gamma: step size of the inner steps, > 0; they converge if it is below 1/L.
        inner: how many, >= 1; 1 is gradient descent-ascent, 2 is EG+, the authors use 3 for their GANs.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    gamma: float
    inner: int = 3

    def __post_init__(self) -> None:
        positive("gamma", self.gamma)
        whole("inner", self.inner)

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """`inner` queries."""
        answer = oracle.query(batch)
        for _ in range(1, self.inner):
            answer = oracle.query(batch, at=answer.gradient * -self.gamma)
        return answer


def ExtraGradient(gamma: float) -> RAPP:
    """The operator at w - gamma F(w) (Korpelevich, 1976); with another step size of the optimizer it is EG+."""
    return RAPP(gamma, inner=2)
