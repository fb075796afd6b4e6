"""Masks: perturbations that move a part of the weights.

    RandomMask(L2(0.05), beta=0.6)                   # another random part at each step, enlarged: half of ESAM
    FisherMask(L2(0.05), keep=0.1, every=100)        # where the batch's gradient is largest
    DropGrow(L2(0.05), keep=0.5, every=2_000)        # a mask that wanders: SSAM-D

The displacement is that of the perturbation inside, whose norm is over all weights, times the mask.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bisam.oracle import Oracle
from bisam.perturbations import Around
from bisam.validation import portion, share, whole
from bisam.vector import Vector


@dataclass(frozen=True)
class RandomMask(Around):
    """A random part of the displacement, divided by its share: the same on average (Du et al., 2022).

    Stochastic weight perturbation, the first half of ESAM, https://arxiv.org/abs/2110.03141. The authors' code decides
    for each parameter tensor as a whole and divides by beta, as here; the 1 - beta of the paper's algorithm is an
    error, they say.

    Args:
        perturb: the displacement that a part is taken of.
        beta: probability of being in the part, in (0, 1]; 1 is SAM.
        per: what is drawn: "tensor", each parameter tensor as a whole, or "entry".

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `beta` or `per` is not what it should be.
    """

    beta: float = 0.6
    per: Literal["tensor", "entry"] = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("beta", self.beta)
        if self.per not in ("tensor", "entry"):
            raise ValueError(f"per must be 'tensor' or 'entry', got {self.per!r}")

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The part of the displacement, enlarged."""
        e = self.inner(gradient, oracle)
        if self.beta == 1:
            return e
        if self.per == "tensor":
            drawn = e.from_first_rank(torch.rand(len(e), device="cpu"))  # on the CPU: no device waits
            factors = ((drawn < self.beta).double() / self.beta).unbind()
            return e.like([t * factor for t, factor in zip(e, factors, strict=True)], e.holes)
        return e * e.like([noise < self.beta for noise in _noise(e)]) * (1 / self.beta)


@dataclass(frozen=True)
class FisherMask(Around):
    """The displacement of the weights with the largest diagonal Fisher information (Zhong et al., 2022).

    https://arxiv.org/abs/2210.05497. The Fisher information is estimated by the square of a batch's gradient; the mask
    is made anew every `every` steps. Biases, embeddings and normalisation layers are not masked, as in the authors'
    code.

    Args:
        perturb: the displacement that a part is taken of.
        keep: share of the maskable entries that are moved, rounded up, in (0, 1]; 1 is SAM.
        every: steps between two masks, >= 1.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `keep` or `every` is outside its range.
    """

    keep: float = 0.1
    every: int = 100
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        share("keep", self.keep)
        whole("every", self.every)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement where the mask is."""
        if oracle.step % self.every == 0 or "mask" not in oracle.state:
            maskable = [
                g.dim() > 1 and not any(kind in layer.lower() for kind in ("norm", "embedding"))
                for g, layer in zip(gradient, oracle.layers, strict=True)
            ]
            # In the order of the squares, which are not defined for complex entries, and underflow.
            oracle.state["mask"] = top(gradient.abs(), self.keep, maskable)
        return self.inner(gradient, oracle) * oracle.state["mask"]


@dataclass(frozen=True)
class DropGrow(Around):
    """A sparse displacement whose mask drops the flattest weights and grows others at random (Mi et al., 2022).

    The ascent of SSAM-D, https://arxiv.org/abs/2210.05177. The mask starts at random; every `every` steps the share
    `drop` of it, rounded down, that has the smallest |g| makes room for as many weights outside of it.

    Args:
        perturb: the displacement that a part is taken of.
        keep: share of the entries that are moved, rounded up, in (0, 1]; 1 is SAM; the authors' sparsity is 1 - keep.
        drop: share of the mask that changes, in [0, 1].
        every: steps between two masks, >= 1; the authors take 5 epochs.
        steps: steps of the training run, over which `drop` goes to 0 on a cosine; None keeps it.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its range.
    """

    keep: float = 0.5
    drop: float = 0.5
    every: int = 1000
    steps: int | None = None
    stateful: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        share("keep", self.keep)
        share("drop", self.drop, zero=True)
        whole("every", self.every)
        if self.steps is not None:
            whole("steps", self.steps)

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """The displacement where the mask is."""
        if "mask" not in oracle.state:
            oracle.state["mask"] = top(_noise(gradient), self.keep)
        elif oracle.step % self.every == 0:
            oracle.state["mask"] = self._renewed(oracle.state["mask"], gradient, oracle.step)
        return self.inner(gradient, oracle) * oracle.state["mask"]

    def _renewed(self, mask: Vector, gradient: Vector, step: int) -> Vector:
        time = 0.0 if self.steps is None else min(1.0, step / self.steps)
        old = _flat(mask.whole())
        kept = portion(self.keep, len(old))
        dropped = min(int(kept * self.drop * (1 + math.cos(math.pi * time)) / 2), len(old) - kept)
        new = torch.zeros_like(old)
        new[_flat(gradient.whole().abs()).masked_fill(~old, -1).topk(kept - dropped).indices] = True
        new[_flat(_noise(gradient).whole()).masked_fill(old, -1).topk(dropped).indices] = True
        return mask.part(_shaped(new, mask.whole()))


def top(scores: Vector, keep: float, maskable: Sequence[bool] | None = None) -> Vector:
    """A mask of the largest scores.

    Args:
        scores: one per weight, >= 0.
        keep: share of the maskable weights, rounded up.
        maskable: which tensors the choice is made in, all others are in the mask; None for all.

    Returns:
        A Vector of booleans. Where weights are sharded, all scores are gathered for it.
    """
    chosen = [True] * len(scores) if maskable is None else list(maskable)
    whole = scores.whole()
    inside = Vector([t for t, choose in zip(whole, chosen, strict=True) if choose])
    mask = [torch.ones_like(t, dtype=torch.bool) for t in whole]
    if len(inside):
        flat = _flat(inside)
        found = torch.zeros_like(flat, dtype=torch.bool)
        found[flat.topk(portion(keep, len(flat))).indices] = True
        parts = iter(_shaped(found, inside))
        mask = [next(parts) if choose else t for t, choose in zip(mask, chosen, strict=True)]
    return scores.part(Vector(mask))


def _noise(like: Vector) -> Vector:
    return like.random(lambda t: torch.rand(t.shape, device=t.device))


def _flat(vector: Vector) -> Tensor:
    return torch.cat([t.flatten() for t in vector])


def _shaped(flat: Tensor, like: Vector) -> Vector:
    sizes = [t.numel() for t in like]
    return Vector([part.view(t.shape).clone() for part, t in zip(flat.split(sizes), like, strict=True)])
