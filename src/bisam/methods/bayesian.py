"""SAM as a Bayesian method: trains the mean of a Gaussian posterior over the weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch

from bisam.batches import Batch
from bisam.evaluation import Evaluation
from bisam.objectives import Objective
from bisam.oracle import Oracle
from bisam.validation import instance, non_negative, positive, share
from bisam.vector import Vector


@dataclass(frozen=True)
class BSAM:
    """bSAM: SAM as the optimal relaxation of the Bayes objective, with an Adam-like step (Moellenhoff and Khan, 2023).

    Source: https://arxiv.org/abs/2210.01620. With theta ~ N(w, 1/(examples s)): g is the gradient at theta, e = rho
    g/s, h the gradient at w + e, m <- beta1 m + (1 - beta1) (h + delta w), and the gradient that is returned is m/s;
    then s <- beta2 s + (1 - beta2) (sqrt(s) |g| + damping + delta), with delta = prior/examples. The method already
    contains momentum and weight decay, so the optimizer must be SGD without either. 1/(examples s) is the variance of
    the posterior, in which a complex weight is one entry. Running statistics are updated at theta.

    Args:
        examples: number of training examples N times the augmentation factor, > 0 (the authors use 200,000 for
            CIFAR-10).
        rho: radius, >= 0.
        ascent: objective that the adversary climbs. Default: the descent objective. Another one costs one more query.
        descent: objective that is minimised. Default: the training loss.
        prior: precision of the prior, >= 0.
        damping: lower limit that keeps s away from 0, > 0.
        beta1: decay of m, in [0, 1).
        beta2: decay of s, in [0, 1).
        s: initial value of s, > 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    examples: float
    rho: float = 0.01
    ascent: Objective | None = field(default=None, kw_only=True)
    descent: Objective | None = field(default=None, kw_only=True)
    prior: float = field(default=40.0, kw_only=True)
    damping: float = field(default=0.1, kw_only=True)
    beta1: float = field(default=0.9, kw_only=True)
    beta2: float = field(default=0.999, kw_only=True)
    s: float = field(default=1.0, kw_only=True)
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("examples", "damping", "s"):
            positive(name, getattr(self, name))
        for name in ("rho", "prior"):
            non_negative(name, getattr(self, name))
        for name in ("beta1", "beta2"):
            share(name, getattr(self, name), zero=True, one=False)
        for name in ("ascent", "descent"):
            if (objective := getattr(self, name)) is not None:
                instance(name, objective, "an objective such as NegLog()")

    def __call__(self, oracle: Oracle, batch: Batch) -> Evaluation:
        """Makes two queries; three if `ascent` and `descent` differ."""
        w, delta = oracle.weights, self.prior / self.examples
        s: Vector = oracle.state.get("s") or w.abs() * 0 + self.s
        noise = w.random(torch.randn_like)
        around = oracle.shifted(noise / (s * self.examples).sqrt(), track=True)
        g = around.query(batch, self.descent).gradient
        other = self.ascent != self.descent
        a = around.query(batch, self.ascent, track=False).gradient if other else g
        e = a / s * self.rho
        del noise, around, a
        answer = oracle.query(batch, self.descent, at=e)
        m = (answer.gradient + w * delta) * (1 - self.beta1)
        oracle.state["m"] = m = m if "m" not in oracle.state else oracle.state["m"] * self.beta1 + m
        oracle.state["s"] = s * self.beta2 + (s.sqrt() * g.abs() + (self.damping + delta)) * (1 - self.beta2)
        # Not the prior alone: a parameter that no loss depends on must have no gradient, as in a plain training loop.
        return replace(answer, grad=w.like((m / s).tensors, g.holes & answer.gradient.holes))
