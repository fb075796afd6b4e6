"""Masks: perturbations that displace a part of the weights.

    >>> from bisam import L2
    >>> random = RandomMask(L2(0.05), beta=0.6)                 # a new random part at each step, rescaled: half of ESAM
    >>> fisher = FisherMask(L2(0.05), keep=0.1, every=100)      # the weights with the largest gradient of a batch
    >>> drop_grow = DropGrow(L2(0.05), keep=0.5, every=2_000)   # a mask that changes gradually: SSAM-D

The displacement is that of the inner perturbation times the mask. The norm of the inner perturbation is that over all
weights.
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
    """Keeps a random part of the displacement and divides it by beta, so that its mean is unchanged (Du et al., 2022).

    Stochastic weight perturbation, the first half of ESAM, https://arxiv.org/abs/2110.03141. As in the authors' code,
    the mask selects whole parameter tensors and the displacement is divided by beta; the authors say that the 1 - beta
    in the algorithm of the paper is an error.

    Args:
        perturb: perturbation whose displacement is masked, or a radius `rho`, which means `L2(rho)`.
        beta: probability of being kept, in (0, 1]; 1 is SAM.
        per: unit of the mask: "tensor" for whole parameter tensors, "entry" for single entries.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `beta` is outside its range, or `per` is neither "tensor" nor "entry".
    """

    beta: float = 0.6
    per: Literal["tensor", "entry"] = "tensor"

    def __post_init__(self) -> None:
        super().__post_init__()
        share("beta", self.beta)
        if self.per not in ("tensor", "entry"):
            raise ValueError(f"per must be 'tensor' or 'entry', got {self.per!r}")

    def __call__(self, gradient: Vector, oracle: Oracle) -> Vector:
        """Returns the masked and rescaled displacement."""
        e = self.inner(gradient, oracle)
        if self.beta == 1:
            return e
        if self.per == "tensor":
            drawn = e.from_first_rank(torch.rand(len(e), device="cpu"))  # on the CPU: no device synchronisation
            factors = ((drawn < self.beta).double() / self.beta).unbind()
            return e.like([t * factor for t, factor in zip(e, factors, strict=True)], e.holes)
        return e * e.like([noise < self.beta for noise in _noise(e)]) * (1 / self.beta)


@dataclass(frozen=True)
class FisherMask(Around):
    """Keeps the displacement of the weights with the largest diagonal Fisher information (Zhong et al., 2022).

    Source: https://arxiv.org/abs/2210.05497. The Fisher information is estimated by the square of the gradient of a
    batch; the mask is recomputed every `every` steps. Biases, embeddings and normalisation layers are not masked, as in
    the authors' code.

    Args:
        perturb: perturbation whose displacement is masked, or a radius `rho`, which means `L2(rho)`.
        keep: share of the maskable entries that are displaced, rounded up, in (0, 1]; 1 is SAM.
        every: interval between two computations of the mask in steps, >= 1.

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
        """Returns the masked displacement."""
        if oracle.step % self.every == 0 or "mask" not in oracle.state:
            maskable = [
                g.dim() > 1 and not any(kind in layer.lower() for kind in ("norm", "embedding"))
                for g, layer in zip(gradient, oracle.layers, strict=True)
            ]
            # |g| has the same order as its square, which can underflow and is not ordered for complex entries.
            oracle.state["mask"] = top(gradient.abs(), self.keep, maskable)
        return self.inner(gradient, oracle) * oracle.state["mask"]


@dataclass(frozen=True)
class DropGrow(Around):
    """A sparse mask that drops the weights with the smallest gradients and grows random others (Mi et al., 2022).

    The mask of SSAM-D, https://arxiv.org/abs/2210.05177. It is random at first. Every `every` steps the share `drop` of
    it with the smallest |g|, rounded down, is replaced by as many random weights outside of the mask.

    Args:
        perturb: perturbation whose displacement is masked, or a radius `rho`, which means `L2(rho)`.
        keep: share of the entries that are displaced, rounded up, in (0, 1]; 1 is SAM; the authors' sparsity is 1 -
            keep.
        drop: share of the mask that is replaced, in [0, 1].
        every: interval between two updates of the mask in steps, >= 1; the authors use 5 epochs.
        steps: length of the training run in steps, over which `drop` decays to 0 along a cosine. Default: no decay.

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
        """Returns the masked displacement."""
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
    """Returns a mask of the largest scores.

    Args:
        scores: one per weight, >= 0.
        keep: share of the maskable weights that are selected, rounded up.
        maskable: for each tensor, whether its entries are selected by score; all entries of other tensors are in the
            mask. Default: all tensors.

    Returns:
        A Vector of booleans. If the weights are sharded, all scores are gathered to compute it.
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
