"""Masks: perturbations that displace a part of the weights.

    >>> from bisam import L2
    >>> random = RandomMask(L2(0.05), beta=0.6)                 # a new random part at each step, rescaled: half of ESAM
    >>> fisher = FisherMask(L2(0.05), keep=0.1, every=100)      # the weights with the largest gradient of a batch
    >>> drop_grow = DropGrow(L2(0.05), keep=0.5, every=2_000)   # a mask that changes gradually: SSAM-D

`RandomMask` applies the inner perturbation to a part of the gradient, whose norm is that of the part. `FisherMask` and
`DropGrow` multiply the displacement of the inner perturbation by the mask, and its norm is that over all weights, as in
the authors' code: they need the whole gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from bisam.oracle import Oracle
from bisam.perturbations import Around, Part
from bisam.validation import portion, share, whole
from bisam.vector import Vector


@dataclass(frozen=True)
class RandomMask(Around):
    """Perturbs a random part of the weights, with a displacement that is divided by beta (Du et al., 2022).

    Stochastic weight perturbation, the first half of ESAM, https://arxiv.org/abs/2110.03141. As in the authors' code,
    whole parameter tensors are drawn before the gradient is computed, no other gradient is computed, the norm is that
    over the drawn tensors, and the displacement is divided by beta, so that its length is always rho / beta; the
    authors say that the 1 - beta in the algorithm of the paper is an error. Their first step draws all tensors, and a
    draw of none stops their training with an error. Here the first step draws as any other, and if no tensor is drawn,
    the one with the smallest random number is.

    If the inner perturbation needs the whole gradient (`Friendly`, `Smoothed`, `FisherMask`, `DropGrow`, or a function
    without a method `part`), its displacement is masked and divided by beta, and the norm is that over all weights.
    `Friendly(RandomMask(L2(rho)))` has the length rho / beta.

    Args:
        perturb: perturbation of the part, or a radius `rho`, which means `L2(rho)`.
        beta: probability of being drawn, in (0, 1]; 1 is SAM.
        per: unit of the mask: "tensor" for whole parameter tensors, "entry" for single entries, for which the gradients
            of all tensors are computed.

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
        """Returns the displacement of the drawn part, divided by beta."""
        drawn: Part = oracle.state.pop("drawn", None)
        if self.beta == 1:
            return self.inner(gradient, oracle)
        first = self._draws_first(oracle)
        if self.per == "tensor":
            if first:
                drawn = drawn or self._draw(gradient)
                return self.inner(gradient.confined(drawn), oracle).confined(drawn) * (1 / self.beta)
            e = self.inner(gradient, oracle)
            return e.confined([number < self.beta for number in self._numbers(e)]) * (1 / self.beta)
        if first:
            mask = gradient.like([noise < self.beta for noise in _noise(gradient)])
            return self.inner(gradient * mask, oracle) * mask * (1 / self.beta)
        e = self.inner(gradient, oracle)
        return e * e.like([noise < self.beta for noise in _noise(e)]) * (1 / self.beta)

    def part(self, oracle: Oracle, among: Part) -> Part:
        """Draws the tensors, and returns those whose gradient the perturbation of them needs; see `needed`."""
        nothing = among is not None and not any(among)
        if self.beta == 1 or self.per == "entry" or nothing or not self._draws_first(oracle):
            return self.inner_part(oracle, among)
        oracle.state["drawn"] = drawn = self._draw(oracle.weights, among)
        return self.inner_part(oracle, drawn)

    def _draws_first(self, oracle: Oracle) -> bool:
        """Whether the inner perturbation needs no gradient of tensors that it does not displace."""
        rest = self.inner_part(oracle, [False] * len(oracle.weights))
        return rest is not None and not any(rest)

    def _draw(self, like: Vector, among: Part = None) -> Sequence[bool]:
        """Draws tensors, at least one of those in `among`, by default those outside of the holes."""
        if among is None:
            among = [i not in like.holes for i in range(len(like))]
        numbers = [number if a else 2.0 for number, a in zip(self._numbers(like), among, strict=True)]
        drawn = [number < self.beta for number in numbers]
        return drawn if any(drawn) else [number == min(numbers) for number in numbers]

    def _numbers(self, like: Vector) -> list[float]:
        """Returns a random number in [0, 1) for each tensor."""
        return like.from_first_rank(torch.rand(len(like), device="cpu")).tolist()  # on the CPU: no synchronisation


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
        if self._is_due(oracle):
            maskable = [
                g.dim() > 1 and not any(kind in layer.lower() for kind in ("norm", "embedding"))
                for g, layer in zip(gradient, oracle.layers, strict=True)
            ]
            # |g| has the same order as its square, which can underflow and is not ordered for complex entries.
            oracle.state["mask"] = top(gradient.abs(), self.keep, maskable)
        return self.inner(gradient, oracle) * oracle.state["mask"]

    def part(self, oracle: Oracle, among: Part) -> Part:
        """Returns all tensors where the mask is computed, else those that the inner perturbation needs."""
        return None if self._is_due(oracle) else self.inner_part(oracle, None)

    def _is_due(self, oracle: Oracle) -> bool:
        return oracle.step % self.every == 0 or "mask" not in oracle.state


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
        elif self._is_due(oracle):
            oracle.state["mask"] = self._renewed(oracle.state["mask"], gradient, oracle.step)
        return self.inner(gradient, oracle) * oracle.state["mask"]

    def part(self, oracle: Oracle, among: Part) -> Part:
        """Returns all tensors where the mask changes, else those that the inner perturbation needs."""
        return None if self._is_due(oracle) else self.inner_part(oracle, None)

    def _is_due(self, oracle: Oracle) -> bool:
        return "mask" in oracle.state and oracle.step % self.every == 0

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
