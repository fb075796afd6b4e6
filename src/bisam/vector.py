"""Vector: the trainable weights, a gradient or a displacement, as one object with vector arithmetic.

The parameters of a network are a list of tensors; the papers write one letter. With `Vector`, `w + rho * g / g.norm()`
is valid code. Each operation is one `_foreach` call, so the number of kernel launches does not grow with the number of
tensors:

    >>> g = Vector([torch.tensor([3.0]), torch.tensor([[4.0]])])
    >>> w = Vector([torch.tensor([1.0]), torch.tensor([[2.0]])])
    >>> e = g * (0.05 / g.norm())                  # two calls for the norm, one for the product
    >>> t = w.abs() + 0.01                         # elementwise, with scalars
    >>> g.dot(w) / (g.norm() * w.norm())           # cosine similarity
    tensor(0.9839)

Vectors are values: no operation changes its operands. If parameters are sharded over ranks, a Vector holds the local
parts, and its `layout` defines how they make up the whole. Norms and inner products are those of the whole vector and
the same on all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from typing import Any, SupportsIndex, cast

import torch
from torch import Tensor

Scalar = float | Tensor
"""A Python number, or a 0-dimensional tensor, which stays on its device: no synchronisation."""

Tensors = list[Tensor] | tuple[Tensor, ...]

TINY = 1e-12
"""Added to the norm in a divisor, as in every public implementation of SAM: prevents a division by zero."""

_HALF = frozenset({torch.float16, torch.bfloat16})
_HAVE_DOUBLE = frozenset({"cpu", "cuda"})  # other devices may have no float64, as MPS
ORDINARY = 1e-15, float("inf")
"""A norm of float32 numbers between these is exact: its squares are normal numbers."""


class Layout:
    """How tensors that several ranks share are made of their parts. This class is for whole tensors on a single rank.

    All ranks call each method together.

    Attributes:
        sharded: whether a rank holds parts of the tensors.
    """

    sharded: bool = False

    def __repr__(self) -> str:
        return "WHOLE" if self is WHOLE else f"{type(self).__name__}()"

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        # `is WHOLE` must hold for copies and pickles too: norms of other layouts are summed in another order.
        return "WHOLE" if self is WHOLE else super().__reduce_ex__(protocol)

    def total(self, parts: Tensor) -> Tensor:
        """Returns the sum over tensors and ranks of `parts` (n,), the sums over the local entries; of shape ()."""
        return parts.sum()

    def whole(self, i: int, part: Tensor) -> Tensor:
        """Returns tensor `i`, gathered from the parts."""
        return part

    def part(self, i: int, whole: Tensor) -> Tensor:
        """Returns the local part of tensor `i`."""
        return whole

    def empty(self, i: int, part: Tensor) -> Tensor:
        """Returns an uninitialised tensor of the shape of the whole tensor `i`, with the type and device of `part`."""
        return part

    def random(self, i: int, whole: Tensor) -> Tensor:
        """Returns the local part of tensor `i`, from random numbers `whole` that may differ between ranks."""
        return whole

    def from_first_rank(self, value: Tensor) -> Tensor:
        """Returns the value on the first rank."""
        return value

    def wrapped(self, i: int, part: Tensor) -> Tensor:
        """Returns tensor `i` in the type that parameters and checkpoints have, made of its local part."""
        return part


WHOLE = Layout()
"""The layout of ordinary tensors."""


class Vector:
    """A list of tensors with the arithmetic of one flat vector.

    It supports `+`, `-`, `*`, `/` with another Vector of the same shapes (elementwise) or with a scalar, except that
    `-` takes a Vector only. `holes` are positions that are zero by structure: parameters that a loss does not depend
    on, whose gradient autograd leaves undefined, or whose gradient a query did not ask for. Their tensors are zeros,
    and operations do not compute with them. A result keeps the holes that are still structurally zero, so that an
    optimizer has `grad is None` exactly where it has in a plain training loop. The zeros of `confined` and of a
    gradient of a part of the weights are expanded from one number: they take no memory, and only functions that copy
    (`reshape`, not `view`) can flatten them.

    Args:
        tensors: the tensors, in the order of the model's trainable parameters; at least one.
        holes: positions of `tensors` that are structurally zero.
        layout: how whole tensors are made of these parts.

    Example:
        >>> import torch
        >>> from bisam import Vector
        >>> g = Vector([torch.tensor([3.0, 0.0]), torch.tensor([[4.0]])])
        >>> g
        Vector(2 tensors, 3 entries)
        >>> g.norm()
        tensor(5.)
        >>> e = g * (0.5 / g.norm())
        >>> e.tensors[0]
        tensor([0.3000, 0.0000])
        >>> g.dot(e)
        tensor(2.5000)
    """

    __slots__ = ("holes", "layout", "tensors")

    def __init__(self, tensors: Tensors, holes: frozenset[int] = frozenset(), layout: Layout = WHOLE) -> None:
        self.tensors = tensors
        self.holes = holes
        self.layout = layout

    def __len__(self) -> int:
        return len(self.tensors)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.tensors)

    def __repr__(self) -> str:
        return f"Vector({len(self)} tensors, {sum(t.numel() for t in self.tensors)} entries)"

    def __add__(self, other: Vector | Scalar) -> Vector:
        if isinstance(other, Vector):
            return self._with(other, torch._foreach_add, self.holes & other.holes)
        return self.like(torch._foreach_add(self.tensors, other))

    def __sub__(self, other: Vector) -> Vector:
        return self._with(other, torch._foreach_sub, self.holes & other.holes)

    def __mul__(self, other: Vector | Scalar) -> Vector:
        if isinstance(other, Vector):
            return self._with(other, torch._foreach_mul, self.holes | other.holes)
        return self._outside(torch._foreach_mul, other)

    __rmul__ = __mul__

    def __truediv__(self, other: Vector | Scalar) -> Vector:
        if isinstance(other, Vector):
            return self._with(other, torch._foreach_div, self.holes - other.holes)  # 0/0 is not zero
        return self._outside(torch._foreach_div, other)

    def __neg__(self) -> Vector:
        return self._outside(torch._foreach_neg)

    def like(self, tensors: Tensors, holes: frozenset[int] = frozenset()) -> Vector:
        """Returns a Vector of other tensors of the same shapes, in the same layout."""
        return type(self)(tensors, holes, self.layout)

    def _with(self, other: Vector, operation: Callable[..., Any], holes: frozenset[int]) -> Vector:
        """Applies an elementwise operation to two vectors; nothing is computed where the result has a hole."""
        a, b, either = self.tensors, other.tensors, self.holes | other.holes
        if not either:
            tensors = operation(a, b)
        else:
            both = [i for i in range(len(a)) if i not in either]
            results = iter(operation([a[i] for i in both], [b[i] for i in both]) if both else ())
            tensors = [
                next(results)
                if i not in either
                else (a if i in self.holes else b)[i]
                if i in holes
                else operation([a[i]], [b[i]])[0]
                for i in range(len(a))
            ]
        return type(self)(tensors, holes, other.layout if self.layout is WHOLE else self.layout)

    def _outside(self, operation: Callable[..., Any], *arguments: Any) -> Vector:
        """Applies an operation on lists of tensors, which leaves zeros unchanged, outside of the holes."""
        if not self.holes:
            return self.like(operation(self.tensors, *arguments))
        kept = self._kept()
        results = dict(zip(kept, operation([self.tensors[i] for i in kept], *arguments) if kept else (), strict=True))
        return self.like([results.get(i, t) for i, t in enumerate(self.tensors)], self.holes)

    def _kept(self) -> list[int]:
        return [i for i in range(len(self.tensors)) if i not in self.holes]

    def abs(self) -> Vector:
        """Returns the elementwise absolute value (real for complex entries)."""
        result = self._outside(torch._foreach_abs)
        if self.holes:
            result.tensors = [t.real if t.is_complex() else t for t in result.tensors]
        return result

    def sqrt(self) -> Vector:
        """Returns the elementwise square root."""
        return self._outside(torch._foreach_sqrt)

    def norm(self) -> Tensor:
        """Returns the Euclidean norm of the whole vector: a real 0-dimensional tensor, in float32 or a wider type.

        It is finite if all entries are, also where their squares exceed the range of float32, unless the norm itself
        exceeds the range of its type. On devices without float64 the squares must be in the range of float32.
        """
        tensors, dtype = _wide(as_real(self.tensors))
        if self.layout is WHOLE:
            norm = _length(tensors, dtype, self.holes)
        else:
            norms = widened(_norms(tensors, dtype, self.holes))
            norm = self.layout.total(norms * norms).sqrt()
        if norm.dtype != torch.float64:
            return norm
        return norm.to(dtype or reduce(torch.promote_types, {t.dtype for t in tensors}))

    def dot(self, other: Vector) -> Tensor:
        """Returns the inner product with `other` (its real part for complex entries), a 0-dimensional tensor."""
        return self.layout.total(self.dots(other))

    def dots(self, other: Vector) -> Tensor:
        """Returns the inner product of each tensor with that of `other` (n,), over the local entries.

        The sums are computed as the 1-norm of the positive entries minus that of the negative ones, because torch has a
        `_foreach` norm and no `_foreach` sum.
        """
        either = self.holes | other.holes
        a, b = (outside(as_real(v.tensors), either) for v in (self, other))
        products = torch._foreach_mul(_single(a), _single(b))
        gain = torch._foreach_norm(torch._foreach_clamp_min(products, 0.0), 1)
        loss = torch._foreach_norm(torch._foreach_clamp_max(products, 0.0), 1)
        return _spread(torch.stack(gain) - torch.stack(loss), len(self), either)

    def onto(self, other: Vector) -> Vector:
        """Returns the projection of this vector onto `other`, or 0 if `other` is 0."""
        size = power_of_two(other.norm())  # squares of the quotient are in range, and dividing by it is exact
        scaled = other.like(_single(other.tensors), other.holes) / size
        squared = scaled.dot(scaled).clamp_min(torch.finfo(size.dtype).tiny)
        along = scaled * (self.dot(scaled) / squared)
        return along.like([a.to(t.dtype) for a, t in zip(along, other, strict=True)], along.holes)

    def clone(self) -> Vector:
        """Returns a bit-identical copy with its own memory, except for the zeros of holes."""
        return self._outside(clone)

    def where(self, mask: Sequence[bool], other: Vector) -> Vector:
        """Returns the tensors of this vector where `mask` is true and those of `other` elsewhere, without copying."""
        tensors = [a if keep else b for keep, a, b in zip(mask, self.tensors, other.tensors, strict=True)]
        holes = frozenset(i for i, keep in enumerate(mask) if i in (self if keep else other).holes)
        return type(self)(tensors, holes, other.layout if self.layout is WHOLE else self.layout)

    def confined(self, mask: Sequence[bool]) -> Vector:
        """Returns the tensors of this vector where `mask` is true and structural zeros elsewhere, without copying."""
        if len(mask) != len(self):
            raise ValueError(f"the mask of a vector of {len(self)} tensors must have as many values, got {len(mask)}")
        if all(mask):
            return self
        chosen = [t if keep else None for keep, t in zip(mask, self.tensors, strict=True)]
        holes = frozenset([i for i, t in enumerate(chosen) if t is None])
        return self.like(with_zeros(chosen, self.tensors), self.holes | holes)

    # Functions of whole tensors, also if sharded: for operations that are neither elementwise nor norms.

    def whole(self) -> Vector:
        """Returns the whole tensors, gathered from all ranks if this vector is sharded."""
        if not self.layout.sharded:
            return self
        return Vector([self.layout.whole(i, t) for i, t in enumerate(self.tensors)], self.holes)

    def part(self, whole: Vector) -> Vector:
        """Returns the local part of `whole`, which is the same on all ranks."""
        return self.like([self.layout.part(i, t) for i, t in enumerate(whole.tensors)], whole.holes)

    def each(self, function: Callable[[Tensor], Tensor]) -> Vector:
        """Applies a function to each whole tensor, one at a time; it must return a tensor of the same shape."""
        layout = self.layout
        return self.like([layout.part(i, function(layout.whole(i, t))) for i, t in enumerate(self.tensors)])

    def random(self, draw: Callable[[Tensor], Tensor]) -> Vector:
        """Returns random numbers for each entry; `draw` fills a whole tensor, as `torch.randn_like` does."""
        layout = self.layout
        return self.like([layout.random(i, draw(layout.empty(i, t))) for i, t in enumerate(self.tensors)])

    def from_first_rank(self, value: Tensor) -> Tensor:
        """Returns the first rank's `value`, so that all ranks that share this vector use the same random number."""
        return self.layout.from_first_rank(value)


def clone(tensors: Tensors) -> Tensors:
    """Returns bit-identical copies of `tensors`, in one call if this version of torch supports it."""
    together = getattr(torch, "_foreach_clone", None)
    return cast(Tensors, together(tensors)) if together else [t.clone() for t in tensors]


def with_zeros(tensors: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor]:
    """Returns tensors with zeros in place of None; all zeros of a type are expanded from one number.

    Args:
        tensors: the tensors.
        like: tensors of the same shapes, whose type and device the zeros have.
    """
    numbers: dict[tuple[torch.dtype, torch.device], Tensor] = {}
    filled: list[Tensor] = []
    for t, other in zip(tensors, like, strict=True):
        if t is None:
            kind = other.dtype, other.device
            if kind not in numbers:
                numbers[kind] = torch.zeros((), dtype=other.dtype, device=other.device)
            t = numbers[kind].expand(other.shape)
        filled.append(t)
    return filled


def outside(tensors: Tensors, holes: frozenset[int]) -> Tensors:
    """Returns the tensors outside of the holes; all of them if there is none."""
    if not holes or len(holes) == len(tensors):
        return tensors
    return [t for i, t in enumerate(tensors) if i not in holes]


def finite(vectors: Sequence[Vector]) -> Tensor:
    """Returns 0 if all entries of `vectors` are finite, else NaN: a 0-dimensional tensor, the same on all ranks.

    All ranks that share the first vector call it together. If that is sharded, they exchange one number.
    """
    tensors, dtype = _wide(as_real([t for v in vectors for t in v.tensors]))
    if not vectors[0].layout.sharded:
        return _length(tensors, dtype) * 0
    flags, n = _norms(tensors, dtype) * 0, len(vectors[0])
    return vectors[0].layout.total(flags[:n] + flags[n:].sum())


def known(condition: Tensor) -> bool | None:
    """Returns the value of a 0-dimensional condition if no device has to be waited for (on a CPU), else None."""
    return bool(condition.tolist()) if condition.is_cpu else None


def same_values(a: Tensor, b: Tensor) -> bool:
    """Returns whether two tensors of one shape and type have equal values; a NaN equals a NaN.

    Tensors on the meta device, which have none, count as equal.
    """
    if a.is_meta:
        return True
    if a.is_floating_point() or a.is_complex():
        return torch.equal(a.nan_to_num(), b.nan_to_num())
    return torch.equal(a, b)


def widened(number: Tensor) -> Tensor:
    """Returns numbers in float64, in which squares of float32 are in range, or unchanged if the device has none."""
    return number.double() if number.device.type in _HAVE_DOUBLE else number


def power_of_two(number: Tensor) -> Tensor:
    """Returns the power of two in (number / 2, number], or 1 if the number, which is >= 0, is 0 or not finite."""
    quotient = number / (torch.frexp(number).mantissa * 2)
    return torch.where(quotient.isfinite(), quotient, 1.0)


def _length(tensors: Tensors, dtype: torch.dtype | None, holes: frozenset[int] = frozenset()) -> Tensor:
    """Returns the norm of real tensors as one flat tensor, in the type in which it is summed."""
    if _is_small_on_cpu(tensors):
        norm = torch.linalg.vector_norm(torch._C._nn.flatten_dense_tensors(tensors), dtype=dtype)  # pyright: ignore
        if _is_ordinary(norm):
            return norm
    return torch.linalg.vector_norm(_norms(tensors, dtype, holes))


def _norms(tensors: Tensors, dtype: torch.dtype | None, holes: frozenset[int] = frozenset()) -> Tensor:
    """Returns the norms (n,) of real tensors, whose squares may exceed the range of float32.

    On a CPU float64 is much slower, so it is used only if the norms are not ordinary; elsewhere, reading them would
    wait for the device.
    """
    if holes:
        return _spread(_norms(outside(tensors, holes), dtype), len(tensors), holes)
    if tensors[0].is_cpu:
        norms = torch.stack(torch._foreach_norm(tensors, 2, dtype))
        if _is_ordinary(torch.linalg.vector_norm(norms)):
            return norms
    if tensors[0].device.type in _HAVE_DOUBLE:
        dtype = torch.float64
    return torch.stack(torch._foreach_norm(tensors, 2, dtype))


def _spread(numbers: Tensor, n: int, holes: frozenset[int]) -> Tensor:
    """Returns the numbers (k,) of the tensors outside of the holes as numbers (n,) of all tensors, 0 in the holes."""
    if len(numbers) == n:
        return numbers
    zero, kept = numbers.new_zeros(()), iter(numbers.unbind())
    return torch.stack([zero if i in holes else next(kept) for i in range(n)])


def _is_ordinary(norm: Tensor) -> bool:
    """Whether the squares of float32 numbers with this norm (on a CPU) are in range."""
    least, most = ORDINARY
    return least < cast(float, norm.tolist()) < most


def _is_small_on_cpu(tensors: Tensors) -> bool:
    """Whether one call per tensor, as `_foreach` does on a CPU, costs more than copying the tensors together."""
    if {type(t) for t in tensors} != {Tensor} or not tensors[0].is_cpu:
        return False
    return sum([t.numel() for t in tensors]) <= 2**20


def _wide(tensors: Tensors) -> tuple[Tensors, torch.dtype | None]:
    """Returns tensors and the type for sums: float32 for half precision, which is converted first in mixed lists."""
    dtypes = {t.dtype for t in tensors}
    if not dtypes & _HALF:
        return tensors, None
    if dtypes <= _HALF | {torch.float32}:
        return tensors, torch.float32
    return _single(tensors), None


def _single(tensors: Tensors) -> Tensors:
    """Returns tensors of half precision in float32, and others unchanged."""
    return [t.float() if t.dtype in _HALF else t for t in tensors]


def as_real(tensors: Tensors) -> Tensors:
    """Returns complex tensors as real ones with a last dimension of two, and others unchanged."""
    return [torch.view_as_real(t.resolve_conj()) if t.is_complex() else t for t in tensors]
