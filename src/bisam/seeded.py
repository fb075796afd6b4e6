"""Seeded: random displacements that are drawn from a seed, so that they can be drawn again and need not be stored.

    >>> import torch
    >>> from bisam import Vector
    >>> w = Vector([torch.zeros(2, 3), torch.zeros(3)])
    >>> z = Seeded([(0, 7)])                              # Gaussian noise, a function of the numbers 0 and 7 alone
    >>> torch.equal(z.vector(w).tensors[0], z.vector(w).tensors[0])
    True
    >>> e = Seeded([(0, 7)], [0.1], scales=[1.0, None])   # a tenth of it, in the first tensor alone
    >>> e.vector(w).holes
    frozenset({1})

The numbers do not depend on the state of the global generators, and are the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Literal

import torch
from torch import Tensor

from bisam.vector import Scalar, Vector, with_zeros

Kind = Literal["gaussian", "rademacher"]
"""The distribution of an entry: standard normal, or 1 and -1 with equal probability."""

Key = tuple[int, ...]
"""The integers that determine a draw, such as a seed, a step and a number."""


def seed_of(*key: int) -> int:
    """Returns a seed of 64 bits that is a function of the numbers in `key`."""
    return int.from_bytes(blake2b(repr(key).encode(), digest_size=8).digest(), "little")


class Seeded:
    """A displacement c_1 z_1 + ... + c_n z_n, where z_k is noise that is drawn from key k, times a scale per tensor.

    It has no memory of the size of the weights: `vector` computes it, and `each` computes one tensor after the other. A
    complex number is two entries. If the tensors are sharded, each rank draws whole tensors and keeps its part.

    Args:
        keys: the key of each draw.
        factors: the factor c of each draw, a number or a 0-dimensional tensor. Default: 1.
        scales: for each tensor of the weights the number or tensor that multiplies it, which is broadcast to the shape
            of the tensor, or None where the displacement is zero by structure. Default: 1 everywhere.
        kind: the distribution of an entry.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        factors: Sequence[Scalar] | None = None,
        scales: Sequence[Scalar | None] | None = None,
        kind: Kind = "gaussian",
    ) -> None:
        self.keys, self.scales = list(keys), scales
        self.kind: Kind = kind
        self.factors: list[Scalar] = [1.0] * len(self.keys) if factors is None else list(factors)

    def each(self, like: Vector) -> Iterator[tuple[int, Tensor]]:
        """Yields the number of each displaced tensor of `like` and its displacement, a new tensor.

        It must be run to its end, or over the same tensors again from the beginning: a tensor has the numbers that
        follow those of the tensors before it.
        """
        drawers = [_Drawer(key, self.kind) for key in self.keys]
        for i, t in enumerate(like.tensors):
            scale = 1.0 if self.scales is None else self.scales[i]
            if scale is None:
                continue
            total: Tensor | None = None
            for drawer, factor in zip(drawers, self.factors, strict=True):
                z = like.layout.random(i, drawer(like.layout.empty(i, t)))
                z = z.mul_(_there(factor, z))
                total = z if total is None else total.add_(z)
            assert total is not None
            yield i, total.mul_(_there(scale, total))

    def vector(self, like: Vector) -> Vector:
        """Returns the displacement of weights `like`."""
        tensors: list[Tensor | None] = [None] * len(like)
        for i, part in self.each(like):
            tensors[i] = part
        holes = frozenset([i for i, t in enumerate(tensors) if t is None])
        return like.like(with_zeros(tensors, like.tensors), holes)

    def lengths(self, like: Vector) -> Vector:
        """Returns the norm of each tensor of the displacement, in tensors of shape (1,) with the same holes."""
        # Shape (1,) and not (): the result is a Vector of tensors that have an entry each.
        norms: list[Tensor | None] = [None] * len(like)
        for i, part in self.each(like):
            norms[i] = Vector([part]).norm().view(1)
        holes = frozenset([i for i, n in enumerate(norms) if n is None])
        known = next((n for n in norms if n is not None), torch.zeros(1))
        return like.like([known.new_zeros(1) if n is None else n for n in norms], holes)

    def times(self, factor: Scalar) -> Seeded:
        """Returns the product with a number."""
        return Seeded(self.keys, [f * factor for f in self.factors], self.scales, self.kind)

    def scaled(self, scales: Sequence[Scalar | None]) -> Seeded:
        """Returns the same noise with other scales."""
        return Seeded(self.keys, self.factors, scales, self.kind)


class _Drawer:
    """Draws tensors from a key, one after the other."""

    def __init__(self, key: Key, kind: Kind) -> None:
        self._seed, self._kind = seed_of(*key), kind
        self._generators: dict[torch.device, torch.Generator] = {}

    def __call__(self, like: Tensor) -> Tensor:
        device = like.device
        if device not in self._generators and device.type != "meta":
            self._generators[device] = torch.Generator(device).manual_seed(self._seed)
        generator, pair = self._generators.get(device), (2,) if like.is_complex() else ()
        shape, dtype = (*like.shape, *pair), like.real.dtype if pair else like.dtype
        if self._kind == "gaussian":
            z = torch.randn(shape, dtype=dtype, device=device, generator=generator)
        else:
            z = torch.randint(0, 2, shape, dtype=dtype, device=device, generator=generator).mul_(2).sub_(1)
        return torch.view_as_complex(z) if pair else z


def _there(factor: Scalar, tensor: Tensor) -> Scalar:
    return factor.to(tensor.device) if isinstance(factor, Tensor) else factor
